"""The residual networks of WGAN-GP and SNGAN. Shapes: B batch, C channels, H height, W width.

    generator    dense -> upsampling residual blocks -> batch norm, ReLU, 3x3 convolution
    critic       residual blocks, the first of them downsampling -> ReLU -> pooling -> dense

A block has two 3x3 convolutions and a skip, with a 1x1 convolution if the size or the width changes. The generator has
conditional batch norm; the critic is a projection discriminator, which adds the inner product of its features and an embedding
of the condition to its output.

References:
    Gulrajani et al., "Improved Training of Wasserstein GANs", 2017, https://arxiv.org/abs/1704.00028 (appendix, the
    residual architecture for CIFAR-10).
    Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018, https://arxiv.org/abs/1802.05957
    (appendix B, the residual architecture for CIFAR-10).
    Miyato, Koyama, "cGANs with Projection Discriminator", 2018, https://arxiv.org/abs/1802.05637 (section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.embeddings import embed
from genzoo.nn.layers import BatchNorm2d, UpsampleConv2d, apply_spectral_norm
from genzoo.nn.resnet import resolutions


def _glorot(conv: nn.Conv2d, gain: float) -> nn.Conv2d:
    """Initialise a convolution by Glorot weights and zero bias."""
    nn.init.xavier_uniform_(conv.weight, gain)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _conv(in_channels: int, out_channels: int, kernel: int, gain: float) -> nn.Conv2d:
    """Build a convolution that preserves the size."""
    return _glorot(nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2), gain)


class ConditionalBatchNorm(nn.Module):
    """Conditional batch norm: gain and shift are embeddings of the condition, if any."""

    def __init__(self, channels: int, condition: Condition | None = None):
        super().__init__()
        self.norm = BatchNorm2d(channels, affine=not condition)
        self.gain = embed(condition, channels, constant=1.0)
        self.shift = embed(condition, channels, constant=0.0)

    def forward(self, h_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.norm(h_BCHW)
        if self.gain is not None and self.shift is not None:
            h = h * self.gain(y)[:, :, None, None] + self.shift(y)[:, :, None, None]
        return h


class _UpBlock(nn.Module):
    """Residual block of the generator, with nearest-neighbour upsampling."""

    def __init__(self, width: int, condition: Condition | None):
        super().__init__()
        self.norm1, self.norm2 = ConditionalBatchNorm(width, condition), ConditionalBatchNorm(width, condition)
        self.conv1 = _glorot(UpsampleConv2d(width, width), math.sqrt(2))
        self.conv2 = _conv(width, width, 3, math.sqrt(2))
        self.skip = _conv(width, width, 1, 1.0)

    def forward(self, x_BCHW: Tensor, y: Tensor | None) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x_BCHW, y)))
        h = self.conv2(F.relu(self.norm2(h, y)))
        # A 1x1 convolution commutes with upsampling; applied first it has a quarter of the cost.
        return F.interpolate(self.skip(x_BCHW), scale_factor=2) + h


class _DownBlock(nn.Module):
    """Residual block of the critic, with optional average pooling; the first block has no ReLU on its input."""

    def __init__(self, in_channels: int, width: int, first: bool, downsample: bool):
        super().__init__()
        self.first, self.downsample = first, downsample
        self.conv1, self.conv2 = _conv(in_channels, width, 3, math.sqrt(2)), _conv(width, width, 3, math.sqrt(2))
        self.skip = _conv(in_channels, width, 1, 1.0) if first or downsample else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x_BCHW if self.first else F.relu(x_BCHW))))
        if not self.downsample:
            return self.skip(x_BCHW) + h
        return self.skip(F.avg_pool2d(x_BCHW, 2)) + F.avg_pool2d(h, 2)


class ResNetGenerator(nn.Module):
    """Vector to image, (B, *in_shape) -> (B, C, H, W).

    Args:
        in_shape: of one input.
        out_shape: (C, H, W).
        condition: of the model; None for an unconditional network.
        width: channels at every resolution.
    """

    def __init__(
        self, in_shape: Sequence[int], out_shape: Sequence[int], condition: Condition | None = None, width: int = 128
    ):
        super().__init__()
        channels, *sides = out_shape
        sizes = resolutions(*sides)
        self.start = (width, *sizes[-1])
        self.stem = nn.Linear(math.prod(in_shape), math.prod(self.start))
        nn.init.xavier_uniform_(self.stem.weight)
        # Without blocks, the final norm is the only conditional layer.
        self.blocks = nn.ModuleList(_UpBlock(width, condition) for _ in sizes[1:])
        self.norm = ConditionalBatchNorm(width, None if self.blocks else condition)
        self.head = _conv(width, channels, 3, 1.0)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.stem(z.flatten(1)).view(-1, *self.start)
        for block in self.blocks:
            h = block(h, y)
        return self.head(F.relu(self.norm(h, y)))


class ResNetCritic(nn.Module):
    """Image to vector, (B, C, H, W) -> (B, *out_shape), without batch norm.

    Args:
        in_shape: (C, H, W).
        out_shape: of one output.
        condition: of the model; None for an unconditional network.
        width: channels at every resolution.
        blocks: number of residual blocks; the first two downsample if the size permits.
        spectral_norm: whether to apply spectral normalisation to all weights.
        pool: over the last feature map, "mean" (Gulrajani et al. 2017) or "sum" (Miyato et al. 2018).
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 128,
        blocks: int = 4,
        spectral_norm: bool = False,
        pool: Literal["mean", "sum"] = "mean",
    ):
        super().__init__()
        if pool not in ("mean", "sum"):
            raise ValueError(f"pool must be 'mean' or 'sum', not {pool!r}")
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, not {blocks}")
        channels, *sides = in_shape
        downsamplings = min(len(resolutions(*sides)) - 1, 2)
        self.out_shape, self.pool = tuple(out_shape), pool
        self.blocks = nn.Sequential(
            *(
                _DownBlock(width if i else channels, width, first=i == 0, downsample=i < downsamplings)
                for i in range(blocks)
            )
        )
        self.head = nn.Linear(width, math.prod(out_shape))
        nn.init.xavier_uniform_(self.head.weight)
        self.embed_y = embed(condition, width)
        if self.embed_y is not None:
            for parameter in self.embed_y.parameters():
                if parameter.ndim > 1:
                    nn.init.xavier_uniform_(parameter)
        if spectral_norm:
            apply_spectral_norm(self)

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        h_BCHW = F.relu(self.blocks(x_BCHW))
        h = h_BCHW.sum((2, 3)) if self.pool == "sum" else h_BCHW.mean((2, 3))
        out = self.head(h)
        if self.embed_y is not None:
            out = out + (self.embed_y(y) * h).sum(1, keepdim=True)
        return out.view(-1, *self.out_shape)
