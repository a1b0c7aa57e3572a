r"""The network of PixelCNN++. Shapes: B batch, C channels, H height, W width, E width of the network, P parameters of a pixel.

Two streams of gated residual blocks, as in the gated PixelCNN: the receptive field of u is the rows above a pixel, that of ul
also the pixels to its left. A block is

    x <- x + a sigmoid(b),    (a, b) = Conv(dropout(f(Conv f(x) + W f(s)))),    f(x) = elu([x, -x])

with s the other stream and, on the upsampling path, the skip. Strided convolutions downsample and transposed ones upsample,
with a skip from every block of the downsampling path to a block of the upsampling path. All convolutions are
weight-normalised.

The network is causal: inputs are shifted by a row or a pixel, every kernel ends at its own row or pixel, and a downsampled
pixel depends on the pixels before the first of its 2x2 block.

References:
    Salimans, Karpathy, Chen, Kingma, "PixelCNN++", 2017, https://arxiv.org/abs/1701.05517 (section 2.3 to 2.5, figure 2).
    Salimans, Kingma, "Weight Normalization", 2016, https://arxiv.org/abs/1602.07868.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from genzoo.conditions import Condition
from genzoo.nn.causal import CausalNetwork, IncrementalState
from genzoo.nn.embeddings import embed
from genzoo.nn.layers import Dropout


def _concat_elu(x: Tensor) -> Tensor:
    return F.elu(torch.cat([x, -x], dim=1))


class ShiftedConv(nn.Module):
    """A convolution whose kernel ends at the pixel's own row, and with ``corner`` at its own column too."""

    def __init__(self, inputs: int, outputs: int, corner: bool, kernel: tuple[int, int] | None = None, stride: int = 1):
        super().__init__()
        height, width = kernel or ((2, 2) if corner else (2, 3))
        self.padding = (width - 1, 0, height - 1, 0) if corner else (width // 2, width // 2, height - 1, 0)
        self.conv = weight_norm(nn.Conv2d(inputs, outputs, (height, width), stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.padding))


def _upsampling_conv(width: int, corner: bool) -> nn.Module:
    """An upsampling transposed convolution with the causality of ``ShiftedConv``."""
    if corner:
        return weight_norm(nn.ConvTranspose2d(width, width, (2, 2), 2), dim=1)
    conv = nn.ConvTranspose2d(width, width, (2, 3), 2, padding=(0, 1), output_padding=(0, 1))
    return weight_norm(conv, dim=1)


class GatedResnet(nn.Module):
    """A gated residual block of one stream.

    Args:
        width: E.
        beside: channels of the additional input s, 0 for none.
        corner: whether the stream is ul.
        condition: of the model; None for an unconditional network.
        dropout: between the convolutions.
    """

    def __init__(self, width: int, beside: int, corner: bool, condition: Condition | None, dropout: float):
        super().__init__()
        self.first = ShiftedConv(2 * width, width, corner)
        self.beside = weight_norm(nn.Conv2d(2 * beside, width, 1)) if beside else None
        self.dropout = Dropout(dropout)
        self.second = ShiftedConv(2 * width, 2 * width, corner)
        with torch.no_grad():
            self.second.conv.parametrizations.weight.original0.mul_(0.1)  # near the identity
        self.embed_y = embed(condition, 2 * width, null=True)

    def forward(self, x: Tensor, s: Tensor | None, y: Tensor | None) -> Tensor:
        h = self.first(_concat_elu(x))
        if self.beside is not None and s is not None:
            h = h + self.beside(_concat_elu(s))
        h = self.second(self.dropout(_concat_elu(h)))
        if self.embed_y is not None:
            h = h + self.embed_y(y)[:, :, None, None]
        a, b = h.chunk(2, dim=1)
        return x + a * torch.sigmoid(b)


class PixelCNNPP(CausalNetwork):
    """The network of PixelCNN++, (B, C, H, W) and conditions -> (B, P, H, W).

    Sampling evaluates the full image for every pixel, without a cache.

    Args:
        in_shape: (C, H, W).
        out_shape: (P, H, W).
        condition: of the model; None for an unconditional network.
        width: E.
        resolutions: number of resolutions, including that of the image.
        resnets: blocks per stream and resolution on the downsampling path; one more on the upsampling path.
        dropout: in every block.

    Raises:
        ValueError: for images whose sides are not divisible by ``2**(resolutions - 1)``.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 160,
        resolutions: int = 3,
        resnets: int = 5,
        dropout: float = 0.5,
    ):
        super().__init__()
        channels, H, W = in_shape
        if resolutions < 1 or resnets < 1:
            raise ValueError(f"resolutions and resnets must be at least 1, not {resolutions} and {resnets}")
        if H % 2 ** (resolutions - 1) or W % 2 ** (resolutions - 1):
            raise ValueError(
                f"resolutions={resolutions} needs sides divisible by {2 ** (resolutions - 1)}, not {H}x{W}"
            )
        self.in_shape, inputs = tuple(in_shape), channels + 1
        self.above = ShiftedConv(inputs, width, corner=False)
        self.above_left = ShiftedConv(inputs, width, corner=False, kernel=(1, 3))
        self.left = ShiftedConv(inputs, width, corner=True, kernel=(2, 1))

        def blocks(skip: int) -> nn.ModuleList:
            u = GatedResnet(width, skip, False, condition, dropout)
            return nn.ModuleList([u, GatedResnet(width, width + skip, True, condition, dropout)])

        def downsample() -> nn.ModuleList:
            return nn.ModuleList(ShiftedConv(width, width, corner, stride=2) for corner in (False, True))

        def upsample() -> nn.ModuleList:
            return nn.ModuleList(_upsampling_conv(width, corner) for corner in (False, True))

        # Layers in order, a pair for the two streams.
        down, up = nn.ModuleList(), nn.ModuleList()
        for i in range(resolutions):
            down.extend([downsample()] if i else [])
            down.extend(blocks(skip=0) for _ in range(resnets))
            up.extend([upsample()] if i else [])
            up.extend(blocks(skip=width) for _ in range(resnets + (i > 0)))
        self.down: Sequence[Sequence[nn.Module]] = down  # type: ignore[assignment]
        self.up: Sequence[Sequence[nn.Module]] = up  # type: ignore[assignment]
        self.head = weight_norm(nn.Conv2d(width, out_shape[0], 1))

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        x = F.pad(x_BCHW, (0, 0, 0, 0, 0, 1), value=1.0)  # a channel of ones marks the image against its border

        def lower(h: Tensor) -> Tensor:
            return F.pad(h[:, :, :-1], (0, 0, 1, 0))

        u = lower(self.above(x))
        ul = lower(self.above_left(x)) + F.pad(self.left(x)[..., :-1], (1, 0))
        skips = [(u, ul)]
        for layer_u, layer_ul in self.down:
            if isinstance(layer_u, GatedResnet):
                u = layer_u(u, None, y)
                ul = layer_ul(ul, u, y)
            else:
                u, ul = layer_u(u), layer_ul(ul)
            skips.append((u, ul))
        u, ul = skips.pop()
        for layer_u, layer_ul in self.up:
            if isinstance(layer_u, GatedResnet):
                skip_u, skip_ul = skips.pop()
                u = layer_u(u, skip_u, y)
                ul = layer_ul(ul, torch.cat([u, skip_ul], dim=1), y)
            else:
                u, ul = layer_u(u), layer_ul(ul)
        return self.head(F.elu(ul))

    def incremental(self, n: int, y: Tensor | None = None) -> IncrementalState:
        return _PixelCNNPPState(self, n, y)


class _PixelCNNPPState(IncrementalState):
    """The image so far; activations are not cached."""

    def __init__(self, network: PixelCNNPP, n: int, y: Tensor | None):
        self.network, self.y, self.position = network, y, 0
        self.image = network.head.bias.new_zeros(n, *network.in_shape)

    def step(self, pixel_BC: Tensor | None) -> Tensor:
        if pixel_BC is not None:
            self.image.flatten(2)[..., self.position - 1] = pixel_BC
        self.position += 1
        return self.network(self.image, self.y).flatten(2)[..., self.position - 1]
