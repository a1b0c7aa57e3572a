"""NCSN++ and DDPM++, the U-Nets of score-based models. Shapes: B batch, C channels, H height, W width, E embedding.

Differences to DDPM's U-Net: resampling inside residual blocks, as in BigGAN; residual sums divided by sqrt(2); on the
upsampling path, attention once at the end of a level. NCSN++ adds FIR resampling, a downsampled copy of the input at each
level, and random Fourier features of time.

References:
    Song et al., "Score-Based Generative Modeling through SDEs", 2021, https://arxiv.org/abs/2011.13456 (appendix H).
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364 (appendix F.2 trains the same network with multipliers 2, 2, 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.layers import Attention, Dropout, NullableCondition, SinusoidalEmbedding, group_norm, zero_

SQRT_HALF = math.sqrt(0.5)


class RandomFourierFeatures(nn.Module):
    """Sines and cosines at fixed random frequencies, (B,) -> (B, E).

    References:
        Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions", 2020,
        https://arxiv.org/abs/2006.10739 (section 6).
    """

    frequencies: Tensor

    def __init__(self, features: int, scale: float = 16.0):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * scale * torch.randn(features // 2))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Resample(nn.Module):
    """Down- or upsampling by 2, by average pooling or nearest neighbour, or with the FIR filter [1, 3, 3, 1] of StyleGAN."""

    kernel: Tensor

    def __init__(self, up: bool, fir: bool):
        super().__init__()
        self.up, self.fir = up, fir
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(taps, taps)[None, None], persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not self.fir:
            return F.interpolate(x_BCHW, scale_factor=2.0) if self.up else F.avg_pool2d(x_BCHW, 2)
        C = x_BCHW.shape[1]
        kernel = self.kernel.to(x_BCHW.dtype).expand(C, 1, 4, 4)
        if self.up:
            return F.conv_transpose2d(x_BCHW, 4 * kernel, stride=2, padding=1, groups=C)
        return F.conv2d(x_BCHW, kernel, stride=2, padding=1, groups=C)


class Block(nn.Module):
    """The residual block of BigGAN, with optional resampling, conditioned on an embedding."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float, resample: nn.Module | None = None):
        super().__init__()
        self.resample = resample or nn.Identity()
        self.norm1 = group_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.project = nn.Linear(embedding, outputs)
        self.norm2 = group_norm(outputs)
        self.dropout = Dropout(dropout)
        self.conv2 = zero_(nn.Conv2d(outputs, outputs, 3, padding=1))
        same = inputs == outputs and resample is None
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x_BCHW: Tensor, e_BE: Tensor) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x_BCHW))))
        h = h + self.project(F.silu(e_BE))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return SQRT_HALF * (self.skip(self.resample(x_BCHW)) + h)


class NCSNpp(nn.Module):
    """The U-Net of NCSN++ or DDPM++: (B, C, H, W), times (B,), conditions (B, *condition.shape) -> (B, C', H, W).

    Args:
        in_shape: (C, H, W); sides divisible by ``2**(levels - 1)``.
        out_shape: (C', H, W).
        condition: of the model, null values included; None for an unconditional network.
        channels: width of the stem.
        multipliers: width of each level in units of ``channels``; each level halves the side.
        blocks: residual blocks at each level.
        attention: resolutions with self-attention, as sides of the feature map.
        dropout: inside residual blocks.
        fir: whether to use FIR resampling, and add downsampled copies of the input (NCSN++).
        fourier: whether to embed time by random Fourier features (NCSN++).

    Raises:
        ValueError: for sides of the wrong divisibility.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.1,
        fir: bool = False,
        fourier: bool = False,
    ):
        super().__init__()
        in_channels, height, width = in_shape
        if height % 2 ** (len(multipliers) - 1) or width % 2 ** (len(multipliers) - 1):
            raise ValueError(f"{len(multipliers)} levels need sides divisible by {2 ** (len(multipliers) - 1)}")
        E = 4 * channels
        features = 2 * channels if fourier else channels
        first = RandomFourierFeatures(features) if fourier else SinusoidalEmbedding(features)
        self.time = nn.Sequential(first, nn.Linear(features, E), nn.SiLU(), nn.Linear(E, E))
        self.condition = NullableCondition(condition, E)
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)

        skips, c, side = [channels], channels, height
        self.down, self.shrink, self.inject = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i, multiplier in enumerate(multipliers):
            level = nn.ModuleList()
            for _ in range(blocks):
                attend = Attention(channels * multiplier, scale=SQRT_HALF) if side in attention else nn.Identity()
                level.append(nn.ModuleList([Block(c, channels * multiplier, E, dropout), attend]))
                c = channels * multiplier
                skips.append(c)
            self.down.append(level)
            if i < len(multipliers) - 1:
                self.shrink.append(Block(c, c, E, dropout, Resample(up=False, fir=fir)))
                if fir:
                    before = in_channels if i == 0 else channels * multipliers[i - 1]
                    self.inject.append(nn.Sequential(Resample(up=False, fir=True), nn.Conv2d(before, c, 3, padding=1)))
                skips.append(c)
                side //= 2
        self.middle = nn.ModuleList([Block(c, c, E, dropout), Attention(c, scale=SQRT_HALF), Block(c, c, E, dropout)])
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i, multiplier in reversed(list(enumerate(multipliers))):
            level = nn.ModuleList()
            for _ in range(blocks + 1):
                level.append(Block(c + skips.pop(), channels * multiplier, E, dropout))
                c = channels * multiplier
            attend = Attention(c, scale=SQRT_HALF) if side in attention else nn.Identity()
            self.up.append(nn.ModuleList([level, attend]))
            if i:
                self.grow.append(Block(c, c, E, dropout, Resample(up=True, fir=fir)))
                side *= 2
        self.head = nn.Sequential(group_norm(c), nn.SiLU(), zero_(nn.Conv2d(c, out_shape[0], 3, padding=1)))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y: Tensor | None = None) -> Tensor:
        e_BE = self.condition(self.time(t_B), y)
        h, copy = self.stem(x_BCHW), x_BCHW
        skips = [h]
        for i, level in enumerate(self.down):
            for block, attend in level:  # type: ignore[attr-defined]
                h = attend(block(h, e_BE))
                skips.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](h, e_BE)
                if len(self.inject):
                    h = copy = SQRT_HALF * (self.inject[i](copy) + h)
                skips.append(h)
        block1, attend, block2 = self.middle
        h = block2(attend(block1(h, e_BE)), e_BE)
        for i, (level, attend) in enumerate(self.up):  # type: ignore[misc]
            for block in level:  # type: ignore[attr-defined]
                h = block(torch.cat([h, skips.pop()], dim=1), e_BE)
            h = attend(h)
            if i < len(self.grow):
                h = self.grow[i](h, e_BE)
        return self.head(h)
