"""Classifiers of noisy images. Shapes: B batch, C channels, H height, W width, E embedding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.layers import ResBlock, TimeAndCondition, group_norm, zero_


class TimeConvNet(nn.Module):
    """A residual network with the downsampling path of a U-Net: (B, C, H, W), times (B,) -> (B, *out_shape).

    Args:
        in_shape: (C, H, W).
        out_shape: (P,).
        condition: of the model; None for an unconditional network.
        channels: width of the first level.
        multipliers: width of each level in units of ``channels``; each level halves the side.
        blocks: residual blocks at each level.
        dropout: inside residual blocks.

    References:
        Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, https://arxiv.org/abs/2105.05233 (section 4).
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 4),
        blocks: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.embedding = TimeAndCondition(4 * channels, condition, frequencies=channels)
        self.stem = nn.Conv2d(in_shape[0], channels, 3, padding=1)
        self.levels = nn.ModuleList()
        c, side = channels, min(in_shape[1:])
        for i, multiplier in enumerate(multipliers):
            if i and side > 1:
                self.levels.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                side = (side + 1) // 2
            for _ in range(blocks):
                self.levels.append(ResBlock(c, channels * multiplier, 4 * channels, dropout))
                c = channels * multiplier
        self.norm = nn.Sequential(group_norm(c), nn.SiLU())
        self.head = zero_(nn.Linear(c, out_shape[0]))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y: Tensor | None = None) -> Tensor:
        e_BE = self.embedding(t_B, y)
        h = self.stem(x_BCHW)
        for layer in self.levels:
            h = layer(h, e_BE) if isinstance(layer, ResBlock) else layer(h)
        return self.head(self.norm(h).mean((2, 3)))
