"""Wasserstein distances against optimal assignments and quantiles; what moves every point moves the distance as much."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from genzoo.metrics.sliced_wasserstein import sliced_wasserstein, wasserstein_1d


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def by_assignment(a: np.ndarray, b: np.ndarray) -> float:
    """Of points that are repeated until both sets are equally large."""
    size = math.lcm(len(a), len(b))
    cost = (np.repeat(a, size // len(a))[:, None] - np.repeat(b, size // len(b))[None]) ** 2
    return float(cost[linear_sum_assignment(cost)].mean())


@pytest.mark.parametrize(("n", "m"), [(12, 12), (12, 8), (7, 9), (1, 6), (5, 1), (16, 3)])
def test_one_dimension_has_the_optimal_plan(n, m):
    a, b = normal(n), 0.3 + 1.5 * normal(m, seed=1)
    assert float(wasserstein_1d(a, b)) == pytest.approx(by_assignment(a.numpy(), b.numpy()), rel=1e-12)


def test_the_plan_of_large_sets_joins_their_quantiles():
    n, m = 3001, 2003
    a, b = normal(n), 0.3 + 1.5 * normal(m, seed=1)
    expected = np.mean((np.repeat(np.sort(a), m) - np.repeat(np.sort(b), n)) ** 2)
    assert float(wasserstein_1d(a, b)) == pytest.approx(expected, rel=1e-10)


def test_every_line_of_a_batch_has_its_own_plan():
    a, b = normal(2, 3, 12), normal(2, 3, 8, seed=1)
    found = wasserstein_1d(a, b)
    assert found.shape == (2, 3)
    for i in np.ndindex(2, 3):
        assert float(found[i]) == pytest.approx(by_assignment(a[i].numpy(), b[i].numpy()), rel=1e-12)


X, Y = normal(40, 2), 0.5 + 1.5 * normal(25, 2, seed=1)


@pytest.mark.parametrize("v", [(1.0, 0.0), (0.0, -2.0), (3.0, 4.0)])
def test_a_shift_costs_its_length_over_the_root_of_two(v):
    assert sliced_wasserstein(X, X + torch.tensor(v)) == pytest.approx(math.hypot(*v) / math.sqrt(2), rel=1e-12)


def test_scaling_costs_the_spread_along_all_directions():
    centred = X - X.mean(0)
    expected = math.sqrt(float(centred.square().sum(1).mean()) / 2)
    assert sliced_wasserstein(centred, 3 * centred) == pytest.approx(2 * expected, rel=1e-12)


def test_the_distance_is_the_mean_over_many_directions():
    angles = (np.arange(5000) + 0.5) * math.pi / 5000
    squares = []
    for angle in angles[::10]:
        axis = np.array([math.cos(angle), math.sin(angle)])
        a, b = np.sort(X.numpy() @ axis), np.sort(Y.numpy() @ axis)
        squares.append(np.mean((np.repeat(a, len(b)) - np.repeat(b, len(a))) ** 2))
    assert sliced_wasserstein(X, Y) == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-4)


def test_the_distance_is_a_metric_of_laws_and_not_of_lists():
    d = sliced_wasserstein(X, Y)
    assert sliced_wasserstein(Y, X) == pytest.approx(d, rel=1e-12)
    assert sliced_wasserstein(X.flip(0), Y[torch.randperm(25)]) == pytest.approx(d, rel=1e-12)
    assert sliced_wasserstein(X.repeat(3, 1), Y) == pytest.approx(d, rel=1e-12)
    assert sliced_wasserstein(X, Y.repeat_interleave(2, 0)) == pytest.approx(d, rel=1e-12)
    assert sliced_wasserstein(X, X.flip(0)) == 0


def test_sets_of_unlike_dimensions_are_refused():
    for real, fake in ((normal(5, 3), normal(5, 2)), (normal(5, 1)[:, 0], normal(5, 1)[:, 0])):
        with pytest.raises(ValueError, match="vectors of equal dimension"):
            sliced_wasserstein(real, fake)
