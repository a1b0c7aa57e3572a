"""Dequantisation and quantisation of integer images on [-1, 1], and conversion to bits/dim.

An image with ``K`` levels has integers ``k`` in 0..K-1 (256 for bytes, 17 for scikit-learn's digits, 2 for binary images).
Level ``k`` corresponds to the bin ``[2k/K - 1, 2(k+1)/K - 1)`` of [-1, 1], of width ``2/K``:

    x = 2 (k + u)/K - 1,  u ~ U[0, 1)          (uniform dequantisation)
    k = clamp(floor(K (x + 1)/2), 0, K - 1)    (quantisation)

Quantisation is a floor, not a rounding of ``(K - 1)(x + 1)/2``, which would change a quarter of the bytes of a perfect sampler
by one. A density ``p`` on [-1, 1]^D and a probability ``P`` on the integers are related by the bin volume,
``log p = log P + D log(K/2)``, and

    bits/dim = -log p / (D log 2) + log2(K/2)

which is +7 at 256 levels and +3.0875 at 17.

References:
    Uria, Murray, Larochelle, "RNADE: The real-valued neural autoregressive density-estimator", 2013,
    https://arxiv.org/abs/1306.0186 (section 5.1: uniform dequantisation).
    Theis, van den Oord, Bethge, "A note on the evaluation of generative models", 2016,
    https://arxiv.org/abs/1511.01844 (section 3.1: the density of the dequantised data bounds the probability).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genzoo.numerics.random import dither


def dequantize(k: Tensor, levels: int, rng: torch.Generator | None = None) -> Tensor:
    """Uniform dequantisation to [-1, 1].

    Args:
        k: integers in 0..levels-1, (B, ...), of any integer type.
        levels: number of levels of the data, K.
        rng: source of randomness.

    Returns:
        float32 of the same shape, ``2 (k + u)/K - 1``, strictly below 1.
    """
    # 16 bits of noise, about the float32 resolution within a bin of 256 levels. The margin prevents rounding to the adjacent
    # bin, here and in quantize.
    margin = levels * 2.0**-22
    u = dither(k.shape, rng=rng, device=k.device).clamp_(margin, 1 - margin)
    return u.add_(k).mul_(2.0 / levels).sub_(1.0)  # in place: allocation is slower than the arithmetic


def quantize(x: Tensor, levels: int) -> Tensor:
    """Quantise to levels, ``clamp(floor(K (x + 1)/2), 0, K - 1)``, int64."""
    return torch.floor((x + 1.0) * (levels / 2)).clamp_(0, levels - 1).long()


def bin_center(k: Tensor, levels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Centre of the bin of each level, ``2 (k + 1/2)/K - 1``."""
    return k.to(dtype, copy=True).add_(0.5).mul_(2.0 / levels).sub_(1.0)


def to_bin_centers(x: Tensor, levels: int) -> Tensor:
    """Round each value to the centre of its bin, the input of families with a discrete likelihood."""
    return bin_center(quantize(x, levels), levels, x.dtype)


def to_bytes(x: Tensor, levels: int) -> Tensor:
    """Convert to bytes for image files: the level, rescaled to 0..255 for fewer than 256 levels."""
    k = quantize(x, levels)
    if levels == 256:
        return k.to(torch.uint8)
    return (k.double() * (255 / (levels - 1))).round_().to(torch.uint8)


def from_bytes(b: Tensor, levels: int) -> Tensor:
    """Return the level of each byte, int64, the inverse of ``to_bytes`` after ``bin_center``."""
    return b.long() if levels == 256 else (b.double() * ((levels - 1) / 255)).round_().long()


def bits_per_dim(log_prob: Tensor, dim: int, levels: int) -> Tensor:
    """Convert the log density on [-1, 1]^D to bits per dimension of the integers.

    Args:
        log_prob: log density in nats, any shape.
        dim: D, the dimension of one event.
        levels: K.
    """
    return -log_prob / (dim * math.log(2.0)) + math.log2(levels / 2)


def log_density(log_mass: Tensor, dim: int, levels: int) -> Tensor:
    """Convert the log probability of an integer image to a log density on [-1, 1]^D, ``log P + D log(K/2)``."""
    return log_mass + dim * math.log(levels / 2)
