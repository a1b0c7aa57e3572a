r"""Precision and recall, density and coverage, by k-nearest-neighbour balls in feature space.

The ball around a feature extends to its k-th neighbour in the same set.

- Precision: fraction of the samples in a ball of the data. Recall: fraction of the data in a ball of the samples.
- Density: mean number of balls of the data around a sample, divided by k; it may exceed 1. Coverage: fraction of the balls of
  the data that contain a sample; for equal distributions, N data and M samples its expectation is
  ``1 - prod_{i<k} (N - 1 - i)/(N + M - 1 - i)``.

References:
    Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019,
    https://arxiv.org/abs/1904.06991 (section 2; k = 3).
    Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", 2020, https://arxiv.org/abs/2002.09797
    (section 3; k = 5).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from genzoo.metrics.finite import check_finite
from genzoo.metrics.pairwise import pairwise_dot

CELLS = 2**23  # distances in memory: 64 MiB in float64
BLOCK = 1024  # rows per block of a distance matrix of a set with itself


def _between(a: Tensor, b: Tensor, squares_a: Tensor, squares_b: Tensor) -> Tensor:
    """Squared distances of rows with given squared norms, (A, D) and (B, D) -> (A, B)."""
    return torch.add(squares_b + squares_a[:, None], pairwise_dot(a, b), alpha=-2).clamp_(min=0)


def squared_distances(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """Squared distances of all rows of ``a``, (N, D), to all rows of ``b``, (M, D), in blocks.

    Yields:
        Row indices of ``a``, (B,), and their squared distances, (B, M).
    """
    # Centred, to reduce cancellation. Bytes are exact in float32.
    precise = torch.promote_types(b.dtype, dtype)
    centre = b.mean(0, dtype=torch.float64).to(precise)
    b = (b.to(precise) - centre).to(dtype)
    squares = b.square().sum(1)
    for rows in torch.arange(len(a), device=a.device).split(max(1, CELLS // len(b))):
        part = (a[rows].to(precise) - centre).to(dtype)
        yield rows, _between(part, b, part.square().sum(1), squares)


def radii(x: Tensor, *ks: int) -> list[Tensor]:
    """Squared distance of each row to its k-th neighbour in the set, (N,) for each k.

    Raises:
        ValueError: for fewer than k + 1 rows.
    """
    k = max(ks)
    if len(x) <= k:
        raise ValueError(f"{len(x)} features are too few for {k} nearest neighbours")
    x = x.double()
    x = x - x.mean(0)
    parts = list(zip(x.split(BLOCK), x.square().sum(1).split(BLOCK), strict=True))
    nearest = [part.new_empty(len(part), 0) for part, _ in parts]
    for i, (a, squares_a) in enumerate(parts):
        for j, (b, squares_b) in enumerate(parts[: i + 1]):  # each pair once, by symmetry
            d = _between(a, b, squares_a, squares_b)
            if i == j:
                d.fill_diagonal_(torch.inf)  # itself
            else:
                nearest[j] = torch.cat([nearest[j], _least(k, d.T)], dim=1)
            nearest[i] = torch.cat([nearest[i], _least(k, d)], dim=1)
    found = torch.cat([_least(k, table) for table in nearest])
    return [found[:, k - 1] for k in ks]


def _least(k: int, table: Tensor) -> Tensor:
    """The k smallest values of each row in order, or all if fewer; ``kthvalue`` takes ten times as long."""
    return table.topk(min(k, table.shape[1]), dim=1, largest=False).values


class Manifold(NamedTuple):
    """Precision, recall, density and coverage; all but the density are in [0, 1]."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real: Tensor, fake: Tensor, k: int = 3, k_coverage: int = 5) -> Manifold:
    """Compute precision, recall, density and coverage of features, (N, D) and (M, D).

    Args:
        real, fake: features of the data and of samples.
        k: number of neighbours for precision and recall.
        k_coverage: number of neighbours for density and coverage.

    Raises:
        NonFiniteError: for non-finite features.
    """
    check_finite(features_of_the_data=real, features_of_the_samples=fake)
    (around_real, wide), (around_fake,) = radii(real, k, k_coverage), radii(fake, k)
    precise = balls = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = recalled.clone()
    for rows, d in squared_distances(fake, real):
        precise += int((d < around_real).any(1).sum())
        recalled |= (d < around_fake[rows, None]).any(0)
        inside = d < wide
        balls += int(inside.count_nonzero())
        covered |= inside.any(0)
    return Manifold(
        precision=precise / len(fake),
        recall=float(recalled.double().mean()),
        density=balls / (k_coverage * len(fake)),
        coverage=float(covered.double().mean()),
    )
