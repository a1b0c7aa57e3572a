r"""Sliced Wasserstein distance between sets of vectors.

    SW^2 = mean over directions of W2^2 of the projections

In one dimension the optimal coupling matches quantiles, so that each slice is exact, also for sets of different sizes. In two
dimensions the directions are equispaced on the half circle; in more dimensions they are a fixed uniform sample.

References:
    Bonneel, Rabin, Peyre, Pfister, "Sliced and Radon Wasserstein Barycenters of Measures", 2015,
    https://doi.org/10.1007/s10851-014-0506-3 (section 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genzoo.metrics.finite import check_finite
from genzoo.numerics.random import generator

DIRECTIONS = 128


def wasserstein_1d(a: Tensor, b: Tensor) -> Tensor:
    """Squared Wasserstein-2 distance along the last dimension, (..., N) and (..., M) -> (...)."""
    n, m = a.shape[-1], b.shape[-1]
    a, b = a.sort(-1).values, b.sort(-1).values
    # Breakpoints of both quantile functions, as exact integers in units of 1/(n m).
    steps = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    weights = torch.diff(steps, prepend=torch.zeros(1, dtype=steps.dtype)).to(a) / (n * m)
    of_a, of_b = (steps - 1).div(m, rounding_mode="floor"), (steps - 1).div(n, rounding_mode="floor")
    return ((a[..., of_a] - b[..., of_b]).square() * weights.to(a.device)).sum(-1)


def sliced_wasserstein(real: Tensor, fake: Tensor, directions: int = DIRECTIONS) -> float:
    """Sliced Wasserstein distance between two sets of vectors, (N, D) and (M, D), in units of the data.

    Raises:
        ValueError: for different dimensions.
    """
    if real.dim() != 2 or real.shape[1:] != fake.shape[1:] or not real.shape[1]:
        raise ValueError(
            f"expected vectors of equal dimension, (N, D) and (M, D), not {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    check_finite(points_of_the_data=real, samples=fake)
    axes = _axes(real.shape[1], directions).to(real.device)
    return float(wasserstein_1d((real.double() @ axes).T, (fake.double() @ axes).T).mean().sqrt())


def _axes(D: int, directions: int) -> Tensor:
    """Unit vectors, (D, directions) float64, (1, 1) for D = 1."""
    if D == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if D == 2:
        angles = (torch.arange(directions, dtype=torch.float64) + 0.5) * (math.pi / directions)
        return torch.stack([angles.cos(), angles.sin()])
    axes = torch.randn(D, directions, dtype=torch.float64, generator=generator("slices", D, directions))
    return axes / axes.norm(dim=0)
