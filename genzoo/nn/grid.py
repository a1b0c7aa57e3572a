"""The encoder and decoder of VQ-VAE, between images and feature grids.

Strided convolutions on the side of the image, a stack of residual layers on the side of the grid. With ``patch`` a block of
pixels is one position of many channels, in which the convolutions are as cheap as on the grid.

References:
    van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, https://arxiv.org/abs/1711.00937
    (section 4.1).
    DeepMind, Sonnet 2, ``vqvae_example.ipynb``, https://github.com/google-deepmind/sonnet (widths and order of the layers).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.embeddings import embed
from genzoo.nn.layers import group_norm


def num_downsamplings(image: Sequence[int], grid: Sequence[int]) -> int:
    """Number of halvings from an image, (C, H, W), to a grid, (D, h, w).

    Raises:
        ValueError: if H/h and W/w are not the same power of two.
    """
    count = max(image[1] // grid[1], 1).bit_length() - 1
    if any(side != small * 2**count for side, small in zip(image[1:], grid[1:], strict=True)):
        raise ValueError(f"downsampling from {image[1]}x{image[2]} to {grid[1]}x{grid[2]} is not a power of two")
    return count


def latent_grid(sides: Sequence[int], downsampling: int, tokens: int) -> tuple[int, int]:
    """Return the sides of the latent grid, (h, w), of an image, or of a vector as (tokens, 1).

    Args:
        sides: (H, W) of images, () of vectors.
        downsampling: for images, H/h = W/w.
        tokens: for vectors, the number of latents.

    Raises:
        ValueError: for images whose sides ``downsampling`` does not divide.
    """
    if downsampling < 1 or tokens < 1:
        raise ValueError(f"downsampling and tokens must be at least 1, not {downsampling} and {tokens}")
    if not sides:
        return tokens, 1
    height, width = sides
    if height % downsampling or width % downsampling:
        raise ValueError(f"downsampling={downsampling} does not divide the sides of {height}x{width} pixels")
    return height // downsampling, width // downsampling


def patched(image: Sequence[int], patch: int) -> tuple[int, int, int]:
    """Return the shape of an image whose blocks are positions, (C, H, W) -> (C patch^2, H/patch, W/patch).

    Raises:
        ValueError: if ``patch`` does not divide the sides.
    """
    channels, height, width = image
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch={patch} does not divide the sides of {height}x{width} pixels")
    return channels * patch**2, height // patch, width // patch


class ResidualStack(nn.Module):
    """Layers ``h <- h + conv1x1 relu conv3x3 relu h``, and a final ReLU; with ``norm`` after group norms."""

    def __init__(self, width: int, residual_width: int, blocks: int, norm: bool = False):
        super().__init__()
        self.narrow = nn.ModuleList(nn.Conv2d(width, residual_width, 3, padding=1) for _ in range(blocks))
        self.widen = nn.ModuleList(nn.Conv2d(residual_width, width, 1) for _ in range(blocks))
        self.norms = nn.ModuleList(group_norm(width) if norm else nn.Identity() for _ in range(blocks + 1))
        self.inner = nn.ModuleList(group_norm(residual_width) if norm else nn.Identity() for _ in range(blocks))

    def forward(self, h: Tensor) -> Tensor:
        *norms, last = self.norms
        for norm, narrow, inner, widen in zip(norms, self.narrow, self.inner, self.widen, strict=True):
            h = h + widen(F.relu(inner(narrow(F.relu(norm(h))))))
        return F.relu(last(h))


class GridEncoder(nn.Module):
    """Image to grid, (B, C, H, W) -> (B, D, h, w).

    Args:
        in_shape: (C, H, W).
        out_shape: (D, h, w).
        condition: of the model; None for an unconditional network.
        width: channels of the hidden layers, half of it in the first.
        residual_width: channels inside residual layers.
        blocks: number of residual layers.
        norm: whether to use group norm in residual layers.
        patch: side of the blocks of pixels that are one position.

    Raises:
        ValueError: if the downsampling factor, beyond that of the blocks, is not a power of two.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 128,
        residual_width: int = 32,
        blocks: int = 2,
        norm: bool = False,
        patch: int = 1,
    ):
        super().__init__()
        self.patch = patch
        in_shape = patched(in_shape, patch)
        channels, layers = in_shape[0], []
        for i in range(num_downsamplings(in_shape, out_shape)):
            wider = width // 2 if i == 0 else width
            layers += [nn.Conv2d(channels, wider, 4, stride=2, padding=1), nn.ReLU()]
            channels = wider
        self.down = nn.Sequential(*layers, nn.Conv2d(channels, width, 3, padding=1))
        self.embed_y = embed(condition, width)
        self.stack = ResidualStack(width, residual_width, blocks, norm)
        self.head = nn.Conv2d(width, out_shape[0], 1)

    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.down(F.pixel_unshuffle(x_BCHW, self.patch))
        if self.embed_y is not None:
            h = h + self.embed_y(y)[:, :, None, None]
        return self.head(self.stack(F.relu(h)))


class GridDecoder(nn.Module):
    """Grid to image, (B, D, h, w) -> (B, C, H, W); mirrors ``GridEncoder``, with the same arguments."""

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 128,
        residual_width: int = 32,
        blocks: int = 2,
        norm: bool = False,
        patch: int = 1,
    ):
        super().__init__()
        self.patch = patch
        out_shape = patched(out_shape, patch)
        self.stem = nn.Conv2d(in_shape[0], width, 3, padding=1)
        self.embed_y = embed(condition, width)
        self.stack = ResidualStack(width, residual_width, blocks, norm)
        count = num_downsamplings(out_shape, in_shape)
        layers: list[nn.Module] = []
        for i in range(count - 1):
            before, after = width if i == 0 else width // 2, width // 2
            layers += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        channels = width // 2 if count > 1 else width
        last = nn.ConvTranspose2d(channels, out_shape[0], 4, stride=2, padding=1)
        layers += [last if count else nn.Conv2d(channels, out_shape[0], 3, padding=1)]
        self.up = nn.Sequential(*layers)

    def forward(self, z_BDHW: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.stem(z_BDHW)
        if self.embed_y is not None:
            h = h + self.embed_y(y)[:, :, None, None]
        return F.pixel_shuffle(self.up(self.stack(h)), self.patch)
