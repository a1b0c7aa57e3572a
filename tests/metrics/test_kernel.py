"""Discrepancies of kernels against loops over pairs and closed forms; their errors against repetitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genzoo.metrics import kernel
from genzoo.metrics.kernel import gaussian_mmd, kernel_distance, kernel_distance_stderr, median_distance


def points(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(shift + scale * np.random.default_rng(seed).normal(size=(n, d)))


def by_pairs(x: np.ndarray, y: np.ndarray, k) -> float:
    """The unbiased MMD^2, a pair after the other."""
    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def cubic(a: np.ndarray, b: np.ndarray) -> float:
    return float((a @ b / len(a) + 1) ** 3)


@pytest.mark.parametrize("block", [2048, 4])
def test_the_gaussian_discrepancy_is_that_of_all_pairs(monkeypatch, block):
    monkeypatch.setattr(kernel, "BLOCK", block)
    x, y = points(9, 2, 0), points(13, 2, 1, 1.5, 0.3)
    expected = by_pairs(x.numpy(), y.numpy(), lambda a, b: math.exp(-((a - b) @ (a - b)) / (2 * 0.7**2)))
    assert gaussian_mmd(x, y, 0.7) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.8, 1.0), (0.3, 1.6)])
def test_the_gaussian_discrepancy_of_normal_laws_is_right_on_average(shift, scale):
    b, d = 1.3, 2

    def expected_kernel(variance: float, distance: float) -> float:
        total = b**2 + variance
        return (b**2 / total) ** (d / 2) * math.exp(-(distance**2) / (2 * total))

    truth = (
        expected_kernel(2, 0)
        + expected_kernel(2 * scale**2, 0)
        - 2 * expected_kernel(1 + scale**2, shift * math.sqrt(d))
    )
    values = [gaussian_mmd(points(60, d, i), points(40, d, 10**6 + i, scale, shift), b) for i in range(300)]
    error = np.std(values, ddof=1) / math.sqrt(300)
    assert abs(np.mean(values) - truth) < 4 * error
    assert truth == pytest.approx(0, abs=1e-15) if (shift, scale) == (0, 1) else truth > 20 * error


def test_the_bandwidth_is_the_median_distance_of_the_first_points():
    x = points(51, 2, 0)
    distances = sorted(float((x[i] - x[j]).norm()) for i in range(20) for j in range(i))
    assert median_distance(x, limit=20) == pytest.approx(distances[(len(distances) - 1) // 2], rel=1e-12)


def test_sets_of_one_small_size_are_compared_whole():
    x, y = points(14, 3, 0), points(14, 3, 1, shift=0.5)
    assert kernel_distance(x, y) == pytest.approx(by_pairs(x.numpy(), y.numpy(), cubic), rel=1e-12)


@pytest.mark.parametrize(("n", "m", "size"), [(14, 11, 11), (11, 14, 11), (14, 14, 5), (9, 14, 5)])
def test_the_kernel_distance_is_the_mean_over_the_published_subsets(monkeypatch, n, m, size):
    monkeypatch.setattr(kernel, "SUBSETS", 4)
    monkeypatch.setattr(kernel, "SUBSET_SIZE", 1000 if size == 11 else size)
    real, fake = points(n, 3, 0), points(m, 3, 1, shift=0.5)
    rng = np.random.RandomState(2020)
    values = []
    for _ in range(4):
        y, x = fake[rng.choice(m, size, replace=False)], real[rng.choice(n, size, replace=False)]
        values.append(by_pairs(x.numpy(), y.numpy(), cubic))
    assert kernel_distance(real, fake) == pytest.approx(np.mean(values), rel=1e-12)


def test_subsets_hold_a_thousand_and_are_a_hundred(monkeypatch):
    seen = []
    monkeypatch.setattr(kernel, "_unbiased", lambda xx, yy, xy: seen.append(tuple(xy.shape)) or torch.zeros(()))
    monkeypatch.setattr(kernel, "_cubic", lambda x, y: torch.zeros(1, 1).expand(len(x), len(y)))
    kernel_distance(points(1200, 1, 0), points(1001, 1, 1))
    assert seen == [(1000, 1000)] * 100


def test_features_in_float32_are_multiplied_in_float64():
    x, y = points(14, 3, 0, shift=30.0).float(), points(14, 3, 1, shift=30.0).float()
    expected = by_pairs(x.double().numpy(), y.double().numpy(), cubic)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-8)


def test_the_kernel_distance_of_equal_laws_is_zero_on_average():
    values = [kernel_distance(points(40, 4, 2 * i), points(40, 4, 2 * i + 1)) for i in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values, ddof=1) / math.sqrt(400)


@pytest.mark.parametrize("block", [2048, 5])
def test_the_influence_of_each_feature_is_that_of_all_pairs(monkeypatch, block):
    monkeypatch.setattr(kernel, "BLOCK", block)
    x, y = points(9, 3, 0).numpy(), points(12, 3, 1, shift=0.5).numpy()
    influence = [
        2 * (np.mean([cubic(y[i], y[j]) for j in range(12) if j != i]) - np.mean([cubic(y[i], b) for b in x]))
        for i in range(12)
    ]
    found = kernel_distance_stderr(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(np.std(influence, ddof=1) / math.sqrt(12), rel=1e-10)


def test_the_standard_error_is_the_spread_of_repetitions():
    real, n = points(300, 4, 0), 300
    values, errors = [], []
    for i in range(200):
        fake = points(n, 4, 1 + i, 1.2, 0.4)
        values.append(kernel_distance(real, fake))
        errors.append(kernel_distance_stderr(real, fake))
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.18)
