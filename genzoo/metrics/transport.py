r"""Sliced Wasserstein distance between points of the plane.

    SW^2 = mean over directions of W2^2 of the projections

In one dimension the optimal plan joins equal quantiles, so that each slice is exact, also for sets of different sizes. The
directions are spread evenly over the half circle: nothing is drawn.

References:
    Bonneel, Rabin, Peyre, Pfister, "Sliced and Radon Wasserstein Barycenters of Measures", 2015,
    https://doi.org/10.1007/s10851-014-0506-3 (section 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genzoo.metrics.finite import check_finite

DIRECTIONS = 128


def wasserstein_1d(a: Tensor, b: Tensor) -> Tensor:
    """Squared Wasserstein-2 distance along the last dimension, (..., N) and (..., M) -> (...)."""
    n, m = a.shape[-1], b.shape[-1]
    a, b = a.sort(-1).values, b.sort(-1).values
    # Steps of both quantile functions, in units of 1/(n m): integers, so that none is lost to rounding.
    steps = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    weights = torch.diff(steps, prepend=torch.zeros(1, dtype=steps.dtype)).to(a) / (n * m)
    of_a, of_b = (steps - 1).div(m, rounding_mode="floor"), (steps - 1).div(n, rounding_mode="floor")
    return ((a[..., of_a] - b[..., of_b]).square() * weights.to(a.device)).sum(-1)


def sliced_wasserstein(real: Tensor, fake: Tensor, directions: int = DIRECTIONS) -> float:
    """Distance between two sets of points of the plane, (N, 2) and (M, 2), in units of the data.

    Raises:
        ValueError: for points of other dimensions.
    """
    if real.shape[1:] != (2,) or fake.shape[1:] != (2,):
        raise ValueError(f"points of the plane have two coordinates, not {tuple(real.shape)} and {tuple(fake.shape)}")
    check_finite(points_of_the_data=real, samples=fake)
    angles = (torch.arange(directions, dtype=torch.float64) + 0.5) * (math.pi / directions)
    axes = torch.stack([angles.cos(), angles.sin()])
    return float(wasserstein_1d((real.double() @ axes).T, (fake.double() @ axes).T).mean().sqrt())
