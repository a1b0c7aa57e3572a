r"""The gated PixelCNN. Shapes: B batch, C channels, H height, W width, E width of the network, P parameters of a pixel.

Two stacks of convolutions: the receptive field of the vertical stack, v, is the rows above a pixel, that of the horizontal
stack, h, the pixels to the left in the same row, with v as an input through a 1x1 convolution. Together they cover all
preceding pixels, without the blind spot of a single stack of masked convolutions. A layer is

    v' = Conv_v(v),                    v <- tanh(v'_1 + e_1) sigmoid(v'_2 + e_2)
    h' = Conv_h(h) + W v' + e,         h <- h + U tanh(h'_1) sigmoid(h'_2)

with the halves 1 and 2 of the channels, and the embedding e of the condition. Kernels are not masked: the input of v is shifted
down by a row, that of h right by a pixel, and every kernel ends at its own row or pixel. Three additional input channels give
the position: ones, which show the zero-padded border, row and column.

In sampling the vertical stack runs once per row, the horizontal stack once per pixel, on cached inputs.

References:
    van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu, "Conditional Image Generation with PixelCNN
    Decoders", 2016, https://arxiv.org/abs/1606.05328 (eq. 2 and 4, figure 2).
    Ramachandran et al., "Fast Generation for Convolutional Autoregressive Models", 2017, https://arxiv.org/abs/1704.06001.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.causal import CausalNetwork, IncrementalState
from genzoo.nn.embeddings import embed
from genzoo.nn.layers import Dropout


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


def _conv_at_pixel(conv: nn.Conv2d, window: Tensor) -> Tensor:
    """Apply a convolution to a single window as a matrix product, (B, C, ...) -> (B, E)."""
    return F.linear(window.flatten(1), conv.weight.flatten(1), conv.bias)


class GatedLayer(nn.Module):
    """A gated layer of both stacks.

    Args:
        in_channels: of either stack; a residual connection is used if they equal ``width``.
        width: E, the output channels.
        condition: of the model; None for an unconditional network.
        kernel: odd side of the equivalent masked kernel.
        dilation: of the kernels.
        dropout: of the horizontal stack before its last convolution.
    """

    def __init__(
        self, in_channels: int, width: int, condition: Condition | None, kernel: int, dilation: int, dropout: float
    ):
        super().__init__()
        self.in_channels, self.dilation, self.reach = in_channels, dilation, dilation * (kernel // 2)
        half = kernel // 2 + 1
        self.vertical = nn.Conv2d(in_channels, 2 * width, (half, kernel), padding=(0, self.reach), dilation=dilation)
        self.horizontal = nn.Conv2d(in_channels, 2 * width, (1, half), dilation=dilation)
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.dropout = Dropout(dropout)
        self.out = nn.Conv2d(width, width, 1)
        self.residual = in_channels == width
        self.embed_y = embed(condition, 4 * width, null=True)

    def embed(self, y: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """Return the embeddings of the condition for the vertical and the horizontal stack."""
        if self.embed_y is None:
            return 0.0, 0.0
        vertical, horizontal = self.embed_y(y)[:, :, None, None].chunk(2, dim=1)
        return vertical, horizontal

    def down(self, v: Tensor, e: Tensor | float) -> tuple[Tensor, Tensor]:
        """Apply the vertical stack, to rows from ``reach`` above the first output; return its output and the link to h."""
        features = self.vertical(v)
        return _gate(features + e), self.link(features)

    def right(self, h: Tensor, link: Tensor, e: Tensor | float) -> Tensor:
        """Apply the horizontal stack, to columns from ``reach`` left of the first output."""
        out = self.out(self.dropout(_gate(self.horizontal(h) + link + e)))
        return h[..., self.reach :] + out if self.residual else out

    def right_at_pixel(self, h: Tensor, link: Tensor, e: Tensor | float) -> Tensor:
        """Apply the horizontal stack at one pixel, (B, C, reach + 1) and (B, 2E) -> (B, E)."""
        features = _conv_at_pixel(self.horizontal, h[..., :: self.dilation])
        out = _conv_at_pixel(self.out, self.dropout(_gate(features + link + e)))
        return h[..., -1] + out if self.residual else out


class PixelCNN(CausalNetwork):
    """A gated PixelCNN, (B, C, H, W) and conditions -> (B, P, H, W).

    Args:
        in_shape: (C, H, W).
        out_shape: (P, H, W).
        condition: of the model; None for an unconditional network.
        width: E, the channels of either stack.
        layers: number of layers.
        first_kernel: odd kernel size of the first layer.
        kernel: odd kernel size of the other layers.
        dilations: of the layers after the first, repeated cyclically.
        dropout: in every layer.

    Raises:
        ValueError: for even kernel sizes.
    """

    coordinates: Tensor

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 64,
        layers: int = 6,
        first_kernel: int = 7,
        kernel: int = 3,
        dilations: Sequence[int] = (1,),
        dropout: float = 0.0,
    ):
        super().__init__()
        if first_kernel % 2 == 0 or kernel % 2 == 0:
            raise ValueError(f"first_kernel and kernel must be odd, not {first_kernel} and {kernel}")
        if layers < 1 or not dilations:
            raise ValueError(f"layers and dilations must be at least one, not {layers} and {list(dilations)}")
        channels, *self.sides = in_shape
        rows, columns = (torch.linspace(-1, 1, side) for side in self.sides)
        place = torch.stack([torch.ones(*self.sides), *torch.meshgrid(rows, columns, indexing="ij")])
        self.register_buffer("coordinates", place, persistent=False)
        settings = [(channels + len(place), first_kernel, 1)]
        settings += [(width, kernel, dilations[i % len(dilations)]) for i in range(layers - 1)]
        chain = [GatedLayer(c, width, condition, side, dilation, dropout) for c, side, dilation in settings]
        self.layers: Sequence[GatedLayer] = nn.ModuleList(chain)  # type: ignore[assignment]
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Conv2d(width, out_shape[0], 1))

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        x = torch.cat([x_BCHW, self.coordinates.to(x_BCHW.dtype).expand(len(x_BCHW), -1, -1, -1)], dim=1)
        v, h = F.pad(x[:, :, :-1], (0, 0, 1, 0)), F.pad(x[..., :-1], (1, 0))
        for layer in self.layers:
            e_v, e_h = layer.embed(y)
            v, link = layer.down(F.pad(v, (0, 0, layer.reach, 0)), e_v)
            h = layer.right(F.pad(h, (layer.reach, 0)), link, e_h)
        return self.head(h)

    def head_at_pixel(self, h: Tensor) -> Tensor:
        """Apply the head at one pixel, (B, E) -> (B, P)."""
        hidden, last = (layer for layer in self.head if isinstance(layer, nn.Conv2d))
        return _conv_at_pixel(last, F.relu(_conv_at_pixel(hidden, F.relu(h))))

    def incremental(self, n: int, y: Tensor | None = None) -> IncrementalState:
        return _PixelCNNState(self, n, y)


class _PixelCNNState(IncrementalState):
    """Cached inputs of each layer: all rows for the vertical stack, the current row for the horizontal stack."""

    def __init__(self, network: PixelCNN, n: int, y: Tensor | None):
        self.network, self.position = network, 0
        height, self.width = network.sides
        self.embeddings = [layer.embed(y) for layer in network.layers]
        self.right_embeddings = [e if isinstance(e, float) else e[:, :, 0, 0] for _, e in self.embeddings]
        zeros = network.layers[0].out.weight.new_zeros
        self.row = zeros((n, network.layers[0].in_channels, 1, self.width))
        self.rows = [zeros((n, one.in_channels, one.reach + height, self.width)) for one in network.layers]
        self.columns = [zeros((n, one.in_channels, one.reach + self.width)) for one in network.layers]
        self.links: list[Tensor] = []

    def step(self, pixel_BC: Tensor | None) -> Tensor:
        i, j = divmod(self.position, self.width)
        if pixel_BC is None:
            h = torch.zeros_like(self.row[:, :, 0, 0])
        else:
            place = self.network.coordinates.flatten(1)[:, self.position - 1].to(pixel_BC.dtype)
            left = torch.cat([pixel_BC, place.expand(len(pixel_BC), -1)], dim=1)
            self.row[:, :, 0, j - 1] = left
            h = left if j else torch.zeros_like(left)
        if j == 0:
            self._begin_row(i)
        for layer, columns, link, e in zip(
            self.network.layers, self.columns, self.links, self.right_embeddings, strict=True
        ):
            columns[..., layer.reach + j] = h
            h = layer.right_at_pixel(columns[..., j : j + layer.reach + 1], link[:, :, 0, j], e)
        self.position += 1
        return self.network.head_at_pixel(h)

    def _begin_row(self, i: int) -> None:
        """Apply the vertical stack for a row, whose input is the row above, initially zero."""
        self.links, v = [], self.row
        for layer, rows, (e, _) in zip(self.network.layers, self.rows, self.embeddings, strict=True):
            rows[:, :, layer.reach + i : layer.reach + i + 1] = v
            v, link = layer.down(rows[:, :, i : i + layer.reach + 1], e)
            self.links.append(link)
