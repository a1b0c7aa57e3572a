r"""The diffusion transformer (DiT). Shapes: B batch, C channels, H height, W width, N patches, P numbers of a patch, E width.

An image is a sequence of patches of p x p pixels with sines and cosines of their positions. The embedding e of time and
condition modulates each layer (adaLN-Zero), by shifts b, scales a and gates g that are linear in silu(e) and zero at
initialisation, so that every layer starts as the identity:

    h <- h + g_1 * Attention((1 + a_1) * LayerNorm(h) + b_1)
    h <- h + CrossAttention(LayerNorm(h), text)                     if there is cross-attention
    h <- h + g_2 * MLP((1 + a_2) * LayerNorm(h) + b_2)

with norms without weights. The last layer is zero at initialisation, and so is the output. With ``convolution`` the hidden
layer of the MLP is a map of patches, to which its depthwise 3x3 convolution is added: patches then see their neighbours from
the first step on, which attention has to learn.

References:
    Peebles, Xie, "Scalable Diffusion Models with Transformers", 2023, https://arxiv.org/abs/2212.09748 (section 3.2).
    Chen et al., "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image Synthesis", 2023,
    https://arxiv.org/abs/2310.00426 (section 2.3: cross-attention between self-attention and MLP, zero-initialised).
    Xie et al., "SegFormer: Simple and Efficient Design for Semantic Segmentation with Transformers", 2021,
    https://arxiv.org/abs/2105.15203 (eq. 3: the convolution in the MLP).
    Xie et al., "SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers", 2024,
    https://arxiv.org/abs/2410.10629 (section 2.2: the same in a diffusion transformer).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.attention import attend
from genzoo.nn.cross_attention import CrossAttention, Text, TimeAndText
from genzoo.nn.embeddings import ImageChannels
from genzoo.nn.layers import Dropout, TimeAndCondition, zero_

FREQUENCIES = 256  # of the sinusoidal embedding of time


def patchify(x_BCHW: Tensor, p: int) -> Tensor:
    """Cut images into patches, (B, C, H, W) -> (B, H W / p^2, C p^2), in raster order."""
    B, C, H, W = x_BCHW.shape
    blocks = x_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(B, (H // p) * (W // p), C * p**2)


def unpatchify(h_BNP: Tensor, p: int, height: int, width: int) -> Tensor:
    """Put patches together, the inverse of ``patchify``, (B, H W / p^2, C p^2) -> (B, C, H, W)."""
    return F.pixel_shuffle(h_BNP.transpose(1, 2).unflatten(2, (height // p, width // p)), p)


def positions(height: int, width: int, features: int) -> Tensor:
    """Sines and cosines of the column and of the row of each patch, (height * width, features), float32.

    Raises:
        ValueError: for a number of features that 4 does not divide.
    """
    if features % 4:
        raise ValueError(f"width must be a multiple of 4, for sines and cosines of two coordinates, not {features}")
    frequencies = 10_000.0 ** (-torch.arange(features // 4, dtype=torch.float64) / (features // 4))

    def embed(place: Tensor) -> Tensor:
        angles = place[..., None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    row, column = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return torch.cat([embed(column), embed(row)], dim=-1).flatten(0, 1).float()


def modulate(h_BNE: Tensor, scale_BE: Tensor, shift_BE: Tensor) -> Tensor:
    """Scale and shift all positions of a sequence, (1 + scale) h + shift."""
    return h_BNE * (1 + scale_BE[:, None]) + shift_BE[:, None]


class DiTBlock(nn.Module):
    """A layer with adaLN-Zero, (B, N, E) -> (B, N, E).

    Args:
        width: E.
        heads: attention heads.
        mlp_ratio: width of the MLP in units of E.
        dropout: after the attention and the MLP.
        text_width: width of the text that is attended to; None without cross-attention.
        grid: rows and columns of patches, for a convolution in the MLP; None without it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        text_width: int | None = None,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.heads = heads
        hidden = round(mlp_ratio * width)
        self.modulation = zero_(nn.Linear(width, 6 * width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.text_norm = None if text_width is None else nn.LayerNorm(width)
        self.text = None if text_width is None else CrossAttention(width, text_width, width // heads)
        # The paper's approximation by a tanh takes three times as long on a CPU.
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        if grid is not None:
            self.mlp.insert(1, GridConvolution(hidden, grid))
        self.dropout = Dropout(dropout)
        for layer in (self.qkv, self.out, *self.mlp):
            if isinstance(layer, nn.Linear):
                _xavier(layer)

    def forward(self, h_BNE: Tensor, e_BE: Tensor, text: Text | None = None) -> Tensor:
        """Apply to a sequence of patches.

        Args:
            h_BNE: the sequence.
            e_BE: silu of the embedding of time and condition.
            text: that is attended to.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(e_BE).chunk(6, dim=1)
        h = h_BNE + gate1[:, None] * self.dropout(self.attention(modulate(_norm(h_BNE), scale1, shift1)))
        if self.text is not None and self.text_norm is not None and text is not None:
            h = h + self.text(self.text_norm(h), text)
        return h + gate2[:, None] * self.dropout(self.mlp(modulate(_norm(h), scale2, shift2)))

    def attention(self, h_BNE: Tensor) -> Tensor:
        """Self-attention of all positions, (B, N, E) -> (B, N, E)."""
        B, N, E = h_BNE.shape
        q, k, v = self.qkv(h_BNE).view(B, N, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v).transpose(1, 2).reshape(B, N, E))


class GridConvolution(nn.Module):
    """Add a depthwise 3x3 convolution over the grid of patches, (B, N, C) -> (B, N, C).

    Args:
        channels: C.
        grid: rows and columns.
    """

    def __init__(self, channels: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, h_BNC: Tensor) -> Tensor:
        h_BCHW = h_BNC.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return h_BNC + self.convolution(h_BCHW).permute(0, 2, 3, 1).flatten(1, 2)


def _xavier(layer: nn.Linear) -> nn.Linear:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _norm(h_BNE: Tensor) -> Tensor:
    return F.layer_norm(h_BNE, h_BNE.shape[-1:], eps=1e-6)


class DiT(nn.Module):
    """The diffusion transformer: (B, C, H, W), times (B,), conditions (B, *condition.shape) -> (B, C', H, W).

    Args:
        in_shape: (C, H, W).
        out_shape: (C', H, W); twice the channels for a learned variance.
        condition: of the model, null values included; None for an unconditional network.
        patch: side p of a patch; half of it takes about four times as long.
        width: E.
        layers: number of layers.
        heads: attention heads per layer.
        mlp_ratio: width of the MLPs in units of E.
        dropout: after the attention and the MLP of each layer.
        convolution: whether the MLPs have a depthwise 3x3 convolution over the patches.
        concat: whether image conditions are further channels of the input, as in super-resolution, or embedded.
        cross_attention: whether each layer attends to the tokens of a text.
        text_width: width of the encoder of the text.
        text_layers: its layers.

    Raises:
        ValueError: if ``patch`` does not divide the sides, or ``heads`` the width, for vectors, and for cross-attention without
            one text as condition.
    """

    positions: Tensor

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        patch: int = 2,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        convolution: bool = False,
        concat: bool = False,
        cross_attention: bool = False,
        text_width: int = 128,
        text_layers: int = 2,
    ):
        super().__init__()
        self.images = ImageChannels(condition if concat else None)
        embedded = self.images.rest if concat else condition
        self.embedding: TimeAndCondition | TimeAndText
        if cross_attention:
            self.embedding = TimeAndText(width, embedded, FREQUENCIES, text_width, text_layers)
        else:
            self.embedding = TimeAndCondition(width, embedded, FREQUENCIES)
        if len(in_shape) != 3:
            raise ValueError(f"a diffusion transformer is for images (C, H, W), not {tuple(in_shape)}")
        channels, self.height, self.breadth = in_shape
        if patch < 1 or self.height % patch or self.breadth % patch:
            raise ValueError(f"patch={patch} does not divide the {self.height}x{self.breadth} image")
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide the width {width}")
        if layers < 1:
            raise ValueError(f"layers must be at least 1, not {layers}")
        self.patch = patch
        self.stem = _xavier(nn.Linear((channels + self.images.channels) * patch**2, width))
        grid = self.height // patch, self.breadth // patch
        self.register_buffer("positions", positions(*grid, width), persistent=False)
        read, mixed = text_width if cross_attention else None, grid if convolution else None
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio, dropout, read, mixed) for _ in range(layers))
        self.modulation = zero_(nn.Linear(width, 2 * width))
        self.head = zero_(nn.Linear(width, out_shape[0] * patch**2))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y: Tensor | None = None) -> Tensor:
        x_BCHW, y = self.images(x_BCHW, y)
        text: Text | None = None
        if isinstance(self.embedding, TimeAndText):
            e_BE, text = self.embedding(t_B, y)
        else:
            e_BE = self.embedding(t_B, y)
        e_BE = F.silu(e_BE)
        h = self.stem(patchify(x_BCHW, self.patch)) + self.positions
        for block in self.blocks:
            h = block(h, e_BE, text)
        shift, scale = self.modulation(e_BE).chunk(2, dim=1)
        return unpatchify(self.head(modulate(_norm(h), scale, shift)), self.patch, self.height, self.breadth)
