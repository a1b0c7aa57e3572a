"""The one measure: how the integers of an image become points of [-1, 1] and come back, and what a nat is worth.

An image with ``K`` levels holds integers ``k`` in 0..K-1 (256 for bytes, 17 for scikit-learn's digits, 2 for binary
images). The level ``k`` owns the bin ``[2k/K - 1, 2(k+1)/K - 1)`` of [-1, 1], whose width is ``2/K``:

    x = 2 (k + u)/K - 1,  u ~ U[0, 1)          (uniform dequantisation)
    k = clamp(floor(K (x + 1)/2), 0, K - 1)    (the only way back)

The way back is a floor and not a rounding of ``(K - 1)(x + 1)/2``: rounding moves a quarter of all bytes of a perfect
sampler by one. A density ``p`` on [-1, 1]^D and a probability ``P`` on the integers share one scale, since the uniform
law has ``P = K^-D`` and ``p = 2^-D``: ``log p = log P + D log(K/2)``, and

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
    """Spread integer levels uniformly over their bins of [-1, 1].

    Args:
        k: integers in 0..levels-1, (B, ...), of any integer type.
        levels: how many levels the data have, K.
        rng: where the uniform noise comes from.

    Returns:
        float32 of the same shape, ``2 (k + u)/K - 1``, strictly below 1.
    """
    # Sixteen bits of noise: float32 holds hardly more between two of 256 levels. Nearer to an edge than its roundings, here
    # and in quantize, a point may land in its neighbour's bin.
    margin = levels * 2.0**-22
    u = dither(k.shape, rng=rng, device=k.device).clamp_(margin, 1 - margin)
    return u.add_(k).mul_(2.0 / levels).sub_(1.0)  # in one place: fresh memory costs more than the arithmetic


def quantize(x: Tensor, levels: int) -> Tensor:
    """Find the level whose bin holds each value: ``clamp(floor(K (x + 1)/2), 0, K - 1)``, int64."""
    return torch.floor((x + 1.0) * (levels / 2)).clamp_(0, levels - 1).long()


def bin_center(k: Tensor, levels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Middle of each level's bin, ``2 (k + 1/2)/K - 1``."""
    return k.to(dtype, copy=True).add_(0.5).mul_(2.0 / levels).sub_(1.0)


def to_bin_centers(x: Tensor, levels: int) -> Tensor:
    """Move each value to the middle of its bin; families with a discrete likelihood see their data this way."""
    return bin_center(quantize(x, levels), levels, x.dtype)


def to_bytes(x: Tensor, levels: int) -> Tensor:
    """Turn points of [-1, 1] into grey values for a picture file: the level, stretched over 0..255.

    The only place where floats become bytes. With 256 levels the byte is the level itself.
    """
    k = quantize(x, levels)
    if levels == 256:
        return k.to(torch.uint8)
    return (k.double() * (255 / (levels - 1))).round_().to(torch.uint8)


def bits_per_dim(log_prob: Tensor, dim: int, levels: int) -> Tensor:
    """Convert nats of a density on [-1, 1]^D into bits per dimension of the integers.

    Args:
        log_prob: log density in nats, any shape.
        dim: D, the number of dimensions of one event.
        levels: K.
    """
    return -log_prob / (dim * math.log(2.0)) + math.log2(levels / 2)


def log_density(log_mass: Tensor, dim: int, levels: int) -> Tensor:
    """Turn the log probability of an integer image into the log density that shares its bits/dim: ``log P + D log(K/2)``."""
    return log_mass + dim * math.log(levels / 2)
