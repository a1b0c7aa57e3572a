"""Convolutional networks: image to vector, vector to image, and image to image at one resolution.

The first two down- and upsample by 2 while the sides are even and longer than 4: 28 -> 14 -> 7, 32 -> 16 -> 8 -> 4, 8 -> 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.embeddings import embed
from genzoo.nn.layers import ResBlock, UpsampleConv2d, group_norm, zero_


def resolutions(height: int, width: int) -> list[tuple[int, int]]:
    """Return the sizes of an image under repeated halving, while both sides are even and longer than 4."""
    sizes = [(height, width)]
    while all(side % 2 == 0 and side > 4 for side in sizes[-1]):
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    return sizes


def _pyramid(sides: Sequence[int], width: int, max_width: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the resolutions of a network, from that of the image, and the channels at each."""
    sizes = resolutions(*sides)
    return sizes, [min(width * 2**i, max_width) for i in range(max(len(sizes) - 1, 1))]


class _Block(nn.Module):
    """Residual block of an encoder or decoder; ``norm=False`` for critics."""

    def __init__(self, channels: int, norm: bool):
        super().__init__()
        self.norm1 = group_norm(channels) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = group_norm(channels) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        return x_BCHW + self.conv2(F.silu(self.norm2(h)))


class ConvEncoder(nn.Module):
    """Image to vector, (B, C, H, W) -> (B, *out_shape).

    The first layer downsamples, as in DCGAN, since full resolution is the most expensive.

    Args:
        in_shape: (C, H, W).
        out_shape: of one output.
        condition: of the model; None for an unconditional network.
        width: channels after the first downsampling; doubled at each further one up to ``max_width``.
        max_width: see ``width``.
        blocks: residual blocks at each resolution; 0 for plain strided convolutions.
        norm: whether to use group norm.
        hidden: width of a dense hidden layer before the output; 0 for none.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 32,
        max_width: int = 128,
        blocks: int = 1,
        norm: bool = True,
        hidden: int = 0,
    ):
        super().__init__()
        channels, *sides = in_shape
        self.out_shape = tuple(out_shape)
        sizes, widths = _pyramid(sides, width, max_width)
        halves = len(sizes) > 1
        layers: list[nn.Module] = []
        for i, w in enumerate(widths):
            before = widths[i - 1] if i else channels
            conv = nn.Conv2d(before, w, 4, stride=2, padding=1) if halves else nn.Conv2d(before, w, 3, padding=1)
            layers += [*([nn.SiLU()] if i else []), conv, *(_Block(w, norm) for _ in range(blocks))]
        self.body = nn.Sequential(*layers, nn.SiLU(), nn.Flatten())
        features = widths[-1] * sizes[-1][0] * sizes[-1][1]
        dense = [nn.Linear(features, hidden), nn.SiLU()] if hidden else []
        self.head = nn.Sequential(*dense, nn.Linear(hidden or features, math.prod(out_shape)))
        self.embed_y = embed(condition, features)

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.body(x_BCHW)
        if self.embed_y is not None:
            h = h * (1 + self.embed_y(y))
        return self.head(h).view(-1, *self.out_shape)


class ConvDecoder(nn.Module):
    """Vector to image, (B, *in_shape) -> (B, C, H, W); mirrors ``ConvEncoder``, with the same arguments.

    Nearest-neighbour upsampling before a convolution avoids the checkerboard artifacts of transposed convolutions and pixel
    shuffles.

    References:
        Odena, Dumoulin, Olah, "Deconvolution and Checkerboard Artifacts", 2016, https://doi.org/10.23915/distill.00003.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 32,
        max_width: int = 128,
        blocks: int = 1,
        norm: bool = True,
    ):
        super().__init__()
        channels, *sides = out_shape
        sizes, widths = _pyramid(sides, width, max_width)
        widths = widths[::-1]
        self.size, self.width = sizes[-1], widths[0]
        features = math.prod(in_shape)
        self.stem = nn.Linear(features, widths[0] * self.size[0] * self.size[1])
        self.embed_y = embed(condition, features)
        # nn.Identity takes the place of a former upsampling layer, for the parameter names of old checkpoints.
        layers: list[nn.Module] = []
        for i, w in enumerate(widths):
            if i:
                before = widths[i - 1]
                layers += [group_norm(before) if norm else nn.Identity(), nn.SiLU()]
                layers += [nn.Identity(), UpsampleConv2d(before, w)]
            layers += [_Block(w, norm) for _ in range(blocks)]
        layers += [group_norm(widths[-1]) if norm else nn.Identity(), nn.SiLU()]
        if len(sizes) > 1:
            layers += [nn.Identity(), UpsampleConv2d(widths[-1], channels)]
        else:
            layers += [nn.Conv2d(widths[-1], channels, 3, padding=1)]
        self.body = nn.Sequential(*layers)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        z = z.flatten(1)
        if self.embed_y is not None:
            z = z + self.embed_y(y)
        return self.body(self.stem(z).view(-1, self.width, *self.size))


class ConvNet(nn.Module):
    """The zero-initialised network of a coupling, at one resolution, (B, C, H, W) -> (B, C', H, W)."""

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 64,
        blocks: int = 2,
    ):
        super().__init__()
        self.stem = nn.Conv2d(in_shape[0], width, 3, padding=1)
        self.embed_y = embed(condition, width)
        self.blocks = nn.ModuleList(ResBlock(width, width, embedding=width if condition else 0) for _ in range(blocks))
        self.head = nn.Sequential(group_norm(width), nn.SiLU(), zero_(nn.Conv2d(width, out_shape[0], 3, padding=1)))

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.stem(x_BCHW)
        e = self.embed_y(y) if self.embed_y is not None else None
        for block in self.blocks:
            h = block(h, e)
        return self.head(h)
