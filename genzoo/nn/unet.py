"""The U-Net of diffusion models. Shapes: B batch, C channels, H height, W width, E embedding.

References:
    Ronneberger, Fischer, Brox, "U-Net", 2015, https://arxiv.org/abs/1505.04597.
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239 (appendix B).
    Nichol et al., "GLIDE", 2022, https://arxiv.org/abs/2112.10741 (section 3.1: text).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.cross_attention import MapCrossAttention, Text, TimeAndText
from genzoo.nn.embeddings import ImageChannels
from genzoo.nn.layers import Attention, ResBlock, TimeAndCondition, UpsampleConv2d, group_norm, zero_


class UNet(nn.Module):
    """The U-Net of DDPM: (B, C, H, W), times (B,), conditions (B, *condition.shape) -> (B, C', H, W).

    Args:
        in_shape: (C, H, W).
        out_shape: (C', H, W).
        condition: of the model, null values included; None for an unconditional network.
        channels: width of the first level.
        multipliers: width of each level in units of ``channels``; each level halves the side.
        blocks: residual blocks at each level.
        attention: resolutions with self-attention, as sides of the feature map.
        head_channels: channels per attention head; null for a single head.
        dropout: inside residual blocks.
        scale_shift: whether the embedding scales and shifts the norms of the blocks, or is added.
        patch: side of the pixel blocks folded into channels at the input; 2 makes a step about four times as cheap.
        concat: whether image conditions are further channels of the input, as in super-resolution, or embedded.
        cross_attention: resolutions with cross-attention to the tokens of a text, as sides of the feature map; if there are
            any, the middle has it too.
        text_width: width of the encoder of the text.
        text_layers: its layers.

    Raises:
        ValueError: if ``patch`` does not divide the sides, for vectors, and for cross-attention without one text as condition.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
        attention: Sequence[int] = (),
        head_channels: int | None = None,
        dropout: float = 0.0,
        scale_shift: bool = False,
        patch: int = 1,
        concat: bool = False,
        cross_attention: Sequence[int] = (),
        text_width: int = 128,
        text_layers: int = 2,
    ):
        super().__init__()
        embedding = 4 * channels
        self.images = ImageChannels(condition if concat else None)
        embedded = self.images.rest if concat else condition
        self.embedding: TimeAndCondition | TimeAndText
        if cross_attention:
            self.embedding = TimeAndText(embedding, embedded, channels, text_width, text_layers)
        else:
            self.embedding = TimeAndCondition(embedding, embedded, frequencies=channels)
        if len(in_shape) != 3:
            raise ValueError(f"a U-Net is for images (C, H, W), not {tuple(in_shape)}")
        in_channels, height, width = in_shape
        if height % patch or width % patch:
            raise ValueError(f"patch={patch} does not divide the {height}x{width} image")
        self.patch = patch
        self.stem = nn.Conv2d((in_channels + self.images.channels) * patch**2, channels, 3, padding=1)

        def level(inputs: int, outputs: int, side: int) -> nn.ModuleList:
            attend = Attention(outputs, head_channels) if side in attention else nn.Identity()
            read = [MapCrossAttention(outputs, text_width, head_channels)] if side in cross_attention else []
            return nn.ModuleList([ResBlock(inputs, outputs, embedding, dropout, scale_shift), attend, *read])

        self.down = nn.ModuleList()
        skips, c, side = [channels], channels, height // patch
        for i, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(level(c, channels * multiplier, side))
                c = channels * multiplier
                skips.append(c)
            if i < len(multipliers) - 1:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
                side = (side + 1) // 2
        self.middle = nn.ModuleList(
            [
                ResBlock(c, c, embedding, dropout, scale_shift),
                Attention(c, head_channels),
                ResBlock(c, c, embedding, dropout, scale_shift),
                *([MapCrossAttention(c, text_width, head_channels)] if cross_attention else []),
            ]
        )
        self.up = nn.ModuleList()
        sides = [height // patch]
        for _ in multipliers[1:]:
            sides.append((sides[-1] + 1) // 2)
        for i, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(blocks + 1):
                self.up.append(level(c + skips.pop(), channels * multiplier, sides[i]))
                c = channels * multiplier
            if i:
                self.up.append(UpsampleConv2d(c, c))
        self.head = nn.Sequential(group_norm(c), nn.SiLU(), zero_(nn.Conv2d(c, out_shape[0] * patch**2, 3, padding=1)))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y: Tensor | None = None) -> Tensor:
        x_BCHW, y = self.images(x_BCHW, y)
        text: Text | None = None
        if isinstance(self.embedding, TimeAndText):
            e_BE, text = self.embedding(t_B, y)
        else:
            e_BE = self.embedding(t_B, y)
        h = self.stem(F.pixel_unshuffle(x_BCHW, self.patch))
        skips = [h]
        for layer in self.down:
            h = _apply(layer, h, e_BE, text) if isinstance(layer, nn.ModuleList) else layer(h)
            skips.append(h)
        block1, attend, block2, *read = self.middle
        h = block2(_apply([block1, attend, *read], h, e_BE, text), e_BE)
        for layer in self.up:
            if isinstance(layer, nn.ModuleList):
                h = _apply(layer, torch.cat([h, skips.pop()], dim=1), e_BE, text)
            else:
                # The size of the skip: an odd side was rounded up by the downsampling.
                h = layer(h, tuple(skips[-1].shape[-2:]))
        return F.pixel_shuffle(self.head(h), self.patch)


def _apply(layers: Iterable[nn.Module], h_BCHW: Tensor, e_BE: Tensor, text: Text | None) -> Tensor:
    """Apply a residual block, self-attention and cross-attention, if any."""
    block, attend, *read = layers
    h = attend(block(h_BCHW, e_BE))
    for layer in read:
        h = layer(h, text)
    return h
