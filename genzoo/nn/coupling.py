"""Networks of affine couplings, image to image at one resolution. Shapes: B batch, C channels, H height, W width.

Normalisation follows the papers: activation normalisation for Glow, whose network is zero-initialised, so that a coupling is
initialised as the identity; batch and weight normalisation for RealNVP.

References:
    Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", 2017, https://arxiv.org/abs/1605.08803 (section 4.1),
    and the authors' code, ``research/real_nvp`` in https://github.com/tensorflow/models.
    Salimans, Kingma, "Weight Normalization", 2016, https://arxiv.org/abs/1602.07868 (eq. 2).
    Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", 2018, https://arxiv.org/abs/1807.03039
    (section 3.1 for activation normalisation), and the authors' code, https://github.com/openai/glow.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.embeddings import embed
from genzoo.nn.layers import BatchNorm2d, zero_
from genzoo.numerics import distributed


class ActNorm(nn.Module):
    """Activation normalisation, (B, C, H, W) -> (B, C, H, W): a scale and a shift per channel.

        z = (x + bias) exp(3 scale)

    Within ``data_dependent_init`` bias and scale are set to give zero mean and unit variance per channel; otherwise they are
    ordinary parameters. The authors' factor 3 scales the learning rate of ``scale``.

    Args:
        channels: C.
    """

    LOGSCALE_FACTOR = 3.0

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.initializing = False

    @property
    def log_scale(self) -> Tensor:
        """Log scale of each channel, (C, 1, 1)."""
        return self.LOGSCALE_FACTOR * self.scale

    @torch.no_grad()
    def init_statistics(self, x_BCHW: Tensor) -> None:
        """Initialise by the mean and variance of the channels of a batch."""
        x_BCHW = x_BCHW.to(self.bias.dtype)
        variance, mean = distributed.pooled_moments(*torch.var_mean(x_BCHW, dim=(0, 2, 3), correction=0))
        self.bias.copy_(-mean[:, None, None])
        # The scale of a constant channel is bounded by 1e6.
        self.scale.copy_(-(variance.sqrt() + 1e-6).log()[:, None, None] / self.LOGSCALE_FACTOR)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.initializing:
            self.init_statistics(x_BCHW)
        return (x_BCHW + self.bias) * self.log_scale.exp()

    def inverse(self, z_BCHW: Tensor) -> Tensor:
        return z_BCHW * torch.exp(-self.log_scale) - self.bias

    def fused_conv(self, x_BCHW: Tensor, weight: Tensor) -> Tensor:
        """Apply a convolution without padding and normalise its output, fused into one convolution."""
        if self.initializing:
            self.init_statistics(F.conv2d(x_BCHW, weight))
        factor = self.log_scale.exp()
        return F.conv2d(x_BCHW, weight * factor[..., None], (self.bias * factor).flatten())


@contextlib.contextmanager
def data_dependent_init(model: nn.Module) -> Iterator[bool]:
    """Initialise all activation norms of a model by the batches of this context; yield whether it has any."""
    norms = [module for module in model.modules() if isinstance(module, ActNorm)]
    for norm in norms:
        norm.initializing = True
    try:
        yield bool(norms)
    finally:
        for norm in norms:
            norm.initializing = False


class EdgeConv(nn.Module):
    """A 3x3 convolution with an edge indicator: an additional input channel is 1 on the padding and 0 inside.

    The contribution of that channel is equal for all images. Without a norm it is computed once and added; with a norm it is
    an ordinary input channel.

    Args:
        in_channels, out_channels: of the image.
        scaled: whether the convolution is zero-initialised, with a bias and an output scale ``exp(3 s)`` with learned ``s``;
            otherwise weights are initialised from N(0, .05^2), without bias, for a following normalisation.
    """

    def __init__(self, in_channels: int, out_channels: int, scaled: bool):
        super().__init__()
        self.image = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=scaled)
        self.edge = nn.Conv2d(1, out_channels, 3, bias=False)
        self.scale = nn.Parameter(torch.zeros(out_channels, 1, 1)) if scaled else None
        for conv in (self.image, self.edge):
            zero_(conv) if scaled else nn.init.normal_(conv.weight, std=0.05)

    def forward(self, x_BCHW: Tensor, norm: ActNorm | None = None) -> Tensor:
        """Convolve, and normalise if a norm is given."""
        border = F.pad(x_BCHW.new_zeros(1, 1, *x_BCHW.shape[2:]), (1, 1, 1, 1), value=1.0)
        if norm is not None:
            padded = torch.cat([F.pad(x_BCHW, (1, 1, 1, 1)), border.expand(len(x_BCHW), -1, -1, -1)], dim=1)
            weight = torch.cat([self.image.weight, self.edge.weight], dim=1)
            # The output has the memory format of the weight, in which the following convolutions are faster.
            return norm.fused_conv(padded, weight.contiguous(memory_format=torch.channels_last))
        h = self.image(x_BCHW) + self.edge(border)
        return h if self.scale is None else h * torch.exp(3 * self.scale)


class GlowNet(nn.Module):
    """The coupling network of Glow, (B, C, H, W) -> (B, C', H, W): 3x3, 1x1 and 3x3 convolutions with ActNorm and ReLU.

    Args:
        in_shape, out_shape: (C, H, W) and (C', H, W).
        condition: of the model; None for an unconditional network.
        width: of the hidden layers.
    """

    def __init__(
        self, in_shape: Sequence[int], out_shape: Sequence[int], condition: Condition | None = None, width: int = 512
    ):
        super().__init__()
        self.first, self.norm1 = EdgeConv(in_shape[0], width, scaled=False), ActNorm(width)
        self.second, self.norm2 = nn.Conv2d(width, width, 1, bias=False), ActNorm(width)
        nn.init.normal_(self.second.weight, std=0.05)
        self.last = EdgeConv(width, out_shape[0], scaled=True)
        self.embed_y = embed(condition, width)

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.first(x_BCHW, self.norm1)
        if self.embed_y is not None:
            h = h + self.embed_y(y)[:, :, None, None]
        return self.last(F.relu(self.norm2.fused_conv(F.relu(h), self.second.weight)))


class NormalizedConv(nn.Module):
    """A weight-normalised convolution, ``w = g v/|v|``.

    Args:
        in_channels, out_channels: of the image.
        side: kernel size.
        magnitude: whether g is learned, initialised as ``side/sqrt(6)`` as in the authors' code; otherwise it is 1.
        bias: whether to add a bias.
    """

    def __init__(self, in_channels: int, out_channels: int, side: int, magnitude: bool, bias: bool = True):
        super().__init__()
        self.v = nn.Parameter(torch.empty(out_channels, in_channels, side, side).uniform_(-1, 1))
        start = side / math.sqrt(6)
        self.magnitude = nn.Parameter(torch.full((out_channels, 1, 1, 1), start)) if magnitude else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weight = F.normalize(self.v.flatten(1), dim=1).view_as(self.v)
        if self.magnitude is not None:
            weight = weight * self.magnitude
        return F.conv2d(x_BCHW, weight, self.bias, padding="same")


def _batch_norm(channels: int) -> BatchNorm2d:
    """Batch normalisation with a shift but no scale, which would be redundant with the following weights."""
    norm = BatchNorm2d(channels, eps=1e-4)
    norm.weight.requires_grad_(False)
    return norm


class RealNVPNet(nn.Module):
    """The coupling network of RealNVP, (B, C, H, W) -> (B, C', H, W): a residual network with skips to the output.

    Args:
        in_shape, out_shape: (C, H, W) and (C', H, W).
        condition: of the model; None for an unconditional network.
        width: of the hidden layers for images with ``side`` rows; it doubles with each halving of the rows.
        side: see ``width``; null for a constant width.
        blocks: residual blocks.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 64,
        side: int | None = None,
        blocks: int = 8,
    ):
        super().__init__()
        if side is not None:
            width = width * side // in_shape[1]
        self.norm_in = _batch_norm(in_shape[0])
        self.stem = NormalizedConv(2 * in_shape[0], width, 3, magnitude=False)
        self.embed_y = embed(condition, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                _batch_norm(width),
                nn.ReLU(),
                NormalizedConv(width, width, 3, magnitude=False, bias=False),
                _batch_norm(width),
                nn.ReLU(),
                NormalizedConv(width, width, 3, magnitude=True),
            )
            for _ in range(blocks)
        )
        self.skips = nn.ModuleList(NormalizedConv(width, width, 1, magnitude=True) for _ in range(blocks + 1))
        self.norm_out = _batch_norm(width)
        self.head = NormalizedConv(width, out_shape[0], 1, magnitude=True)

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.norm_in(x_BCHW)
        h = self.stem(F.relu(torch.cat([x, -x], dim=1)))
        if self.embed_y is not None:
            h = h + self.embed_y(y)[:, :, None, None]
        out = self.skips[0](h)
        for block, skip in zip(self.blocks, self.skips[1:], strict=True):
            h = h + block(h)
            out = out + skip(h)
        return self.head(F.relu(self.norm_out(out)))


class FullResolution(nn.Module):
    """The network of a checkerboard coupling at full resolution, with the masked image and the mask as inputs.

    For a coupling with P parameters of an element it maps channels of 2x2 blocks, (B, 2 C, H/2, W/2) -> (B, 2 P C, H/2, W/2).

    Args:
        network: factory of the full-resolution network, from (C + 1, H, W) to (P C, H, W).
        shape: of the image, (C, H, W).
        moved: indices of the transformed elements of a block, of 4 C.
        in_shape, out_shape: shapes at the coupling; the latter has P channels for each transformed element.
        condition: of the network.
    """

    kept: Tensor
    outputs: Tensor
    mask: Tensor

    def __init__(
        self,
        network: Callable[..., nn.Module],
        shape: Sequence[int],
        moved: Sequence[int],
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None,
    ):
        super().__init__()
        C, H, W = shape
        kept = torch.tensor([i for i in range(4 * C) if i not in set(moved)])
        self.register_buffer("kept", kept, persistent=False)
        P = out_shape[0] // len(moved)
        outputs = torch.tensor([4 * C * p + i for p in range(P) for i in moved])
        self.register_buffer("outputs", outputs, persistent=False)
        colours = torch.zeros(1, 4 * C, H // 2, W // 2).index_fill_(1, kept, 1.0)
        self.register_buffer("mask", F.pixel_shuffle(colours, 2)[:, :1], persistent=False)
        self.net = network((C + 1, H, W), (P * C, H, W), condition)

    def forward(self, a: Tensor, y: Tensor | None) -> Tensor:
        blank = a.new_zeros(len(a), 2 * a.shape[1], *a.shape[2:])
        x = F.pixel_shuffle(blank.index_copy(1, self.kept, a), 2)
        h = self.net(torch.cat([x, self.mask.expand(len(x), -1, -1, -1)], dim=1), y)
        return F.pixel_unshuffle(h, 2).index_select(1, self.outputs)
