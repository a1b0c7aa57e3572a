r"""The networks of R3GAN: ResNets without normalisation. Shapes: B batch, C channels, H height, W width.

    generator    basis x dense(z) -> residual blocks -> (bilinear upsampling -> residual blocks) ... -> 1x1 convolution
    critic       1x1 convolution -> (residual blocks -> averages of 2x2) ... -> residual blocks -> depthwise basis -> dense

A block is ``h + W3 f(W2 f(W1 h))`` with a 1x1, a grouped 3x3 and a 1x1 convolution, wider inside than outside, and ``f`` a
leaky ReLU after a bias. Normalisation is replaced by the initialisation (Fixup): ``W3 = 0``, and the variance of the other
weights is that of He et al. divided by ``sqrt(L)``, L the number of blocks. 1x1 convolutions change the width between
resolutions. The basis is a learned feature map of the lowest resolution.

The condition of the generator is embedded beside z. That of the critic is embedded in the space of its last features, and
their inner product, divided by the root of the dimension, is the output.

References:
    Huang, Gokaslan, Kuleshov, Tompkin, "The GAN is dead; long live the GAN! A Modern GAN Baseline", 2024,
    https://arxiv.org/abs/2501.05441 (section 4: config E; appendix, table of hyperparameters).
    Zhang, Dauphin, Ma, "Fixup Initialization: Residual Learning Without Normalization", 2019,
    https://arxiv.org/abs/1901.09321 (section 3.2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.embeddings import embed
from genzoo.nn.layers import zero_
from genzoo.nn.resnet import resolutions

SLOPE = 0.2  # of the leaky ReLU
GAIN = math.sqrt(2 / (1 + SLOPE**2))  # by which weights preserve the second moment through it


def _he(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> nn.Conv2d | nn.Linear:
    """Draw the weights from N(0, gain^2 / fan-in); a bias is zero."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class _Block(nn.Module):
    """Residual block, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, expansion: int, group_width: int, num_blocks: int):
        super().__init__()
        inner, gain = channels * expansion, GAIN * num_blocks**-0.25  # of each of the two layers before the last
        if inner % group_width:
            raise ValueError(
                f"group_width={group_width} does not divide {inner} channels, expansion={expansion} of {channels}"
            )
        self.widen = _he(nn.Conv2d(channels, inner, 1), gain)
        self.mix = _he(nn.Conv2d(inner, inner, 3, padding=1, groups=inner // group_width), gain)
        self.narrow = zero_(nn.Conv2d(inner, channels, 1, bias=False))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        h = F.leaky_relu(self.widen(h_BCHW), SLOPE)
        return h_BCHW + self.narrow(F.leaky_relu(self.mix(h), SLOPE))


def _blocks(widths: Sequence[int], blocks: int, expansion: int, group_width: int) -> nn.ModuleList:
    """Build the residual blocks of each resolution."""
    for name, value in {
        "blocks": blocks,
        "expansion": expansion,
        "group_width": group_width,
        "width": min(widths),
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    count = blocks * len(widths)
    return nn.ModuleList(
        nn.Sequential(*(_Block(width, expansion, group_width, count) for _ in range(blocks))) for width in widths
    )


def _resize(before: int, after: int) -> nn.Module:
    """Build the 1x1 convolution between two widths; the identity if they are equal."""
    return nn.Identity() if before == after else _he(nn.Conv2d(before, after, 1, bias=False))


class R3GANGenerator(nn.Module):
    """Vector to image, (B, *in_shape) -> (B, C, H, W).

    Args:
        in_shape: of one input.
        out_shape: (C, H, W).
        condition: of the model; None for an unconditional network.
        width: channels at full resolution; doubled at each downsampling up to ``max_width``.
        max_width: see ``width``.
        blocks: residual blocks at each resolution.
        expansion: factor of the width inside a block.
        group_width: channels in a group of the 3x3 convolutions.

    Raises:
        ValueError: for groups that do not divide the channels, and sizes below 1.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 32,
        max_width: int = 128,
        blocks: int = 2,
        expansion: int = 2,
        group_width: int = 16,
    ):
        super().__init__()
        channels, *sides = out_shape
        sizes = resolutions(*sides)
        widths = [min(width * 2**i, max_width) for i in reversed(range(len(sizes)))]
        features = math.prod(in_shape)
        self.blocks = _blocks(widths, blocks, expansion, group_width)
        self.embed_y = embed(condition, features)
        self.basis = nn.Parameter(torch.randn(widths[0], *sizes[-1]))
        self.stem = _he(nn.Linear(features * (2 if condition else 1), widths[0], bias=False))
        self.resize = nn.ModuleList(itertools.starmap(_resize, itertools.pairwise(widths)))
        self.head = _he(nn.Conv2d(widths[-1], channels, 1, bias=False))

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        z = z.flatten(1)
        if self.embed_y is not None:
            z = torch.cat([z, self.embed_y(y)], dim=1)
        first, *rest = self.blocks
        h = first(self.stem(z)[:, :, None, None] * self.basis)
        for resize, blocks in zip(self.resize, rest, strict=True):
            # A 1x1 convolution commutes with upsampling; applied first it has a quarter of the cost.
            h = blocks(F.interpolate(resize(h), scale_factor=2, mode="bilinear"))
        return self.head(h)


class R3GANCritic(nn.Module):
    """Image to vector, (B, C, H, W) -> (B, *out_shape); mirrors ``R3GANGenerator``, with the same arguments."""

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 32,
        max_width: int = 128,
        blocks: int = 2,
        expansion: int = 2,
        group_width: int = 16,
    ):
        super().__init__()
        channels, *sides = in_shape
        sizes = resolutions(*sides)
        widths = [min(width * 2**i, max_width) for i in range(len(sizes))]
        last, self.out_shape = widths[-1], tuple(out_shape)
        outputs = math.prod(out_shape)
        self.blocks = _blocks(widths, blocks, expansion, group_width)
        self.stem = _he(nn.Conv2d(channels, widths[0], 1, bias=False))
        self.resize = nn.ModuleList(itertools.starmap(_resize, itertools.pairwise(widths)))
        self.basis = _he(nn.Conv2d(last, last, sizes[-1], groups=last, bias=False))
        # A conditional critic projects its features on the embedding of the condition, one for each output.
        self.embed_y = embed(condition, last * outputs)
        self.head = _he(nn.Linear(last, outputs if condition is None else last, bias=False))

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        first, *rest = self.blocks
        h = first(self.stem(x_BCHW))
        for resize, blocks in zip(self.resize, rest, strict=True):
            h = blocks(resize(F.avg_pool2d(h, 2)))
        h = self.head(self.basis(h).flatten(1))
        if self.embed_y is not None:
            h = (self.embed_y(y).view(len(h), -1, h.shape[1]) * h[:, None]).sum(2) / math.sqrt(h.shape[1])
        return h.view(-1, *self.out_shape)
