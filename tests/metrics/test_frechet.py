"""The Frechet distance against matrix roots, closed forms and exact low ranks; its bias and its error against repetitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from genzoo.metrics.frechet import (
    FeatureMoments,
    Moments,
    frechet_distance,
    frechet_distance_of_features,
    frechet_infinity,
    frechet_stderr,
    moments,
)


def law(mean, cov, n: int = 10**9) -> Moments:
    return Moments(n, torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(cov, dtype=torch.float64))


def random_law(d: int, seed: int) -> Moments:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, 2 * d))
    return law(rng.normal(size=d), root @ root.T / d)


def by_matrix_root(p: Moments, q: Moments) -> float:
    C1, C2 = p.cov.numpy(), q.cov.numpy()
    root = scipy.linalg.sqrtm(C1 @ C2).real
    return float(((p.mean - q.mean) ** 2).sum() + np.trace(C1) + np.trace(C2) - 2 * np.trace(root))


def by_nuclear_norm(x: np.ndarray, y: np.ndarray) -> float:
    """tr (C1 C2)^(1/2) is the sum of the singular values of X Y' for centred X and Y."""
    a, b = x - x.mean(0), y - y.mean(0)
    n, m = len(x) - 1, len(y) - 1
    joint = np.linalg.svd(a @ b.T, compute_uv=False).sum() / math.sqrt(n * m)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() / n + (b**2).sum() / m - 2 * joint)


def features(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(shift + scale * rng.normal(size=(n, d)) @ rng.normal(size=(d, d)))


@pytest.mark.parametrize("d", [3, 64])
def test_the_distance_is_that_of_the_matrix_root(d):
    p, q = random_law(d, 0), random_law(d, 1)
    assert frechet_distance(p, q) == pytest.approx(by_matrix_root(p, q), rel=1e-9)


def test_laws_with_common_axes_differ_by_their_standard_deviations():
    a, b, m = np.array([4.0, 1.0, 9.0, 0.25]), np.array([1.0, 16.0, 9.0, 0.0]), np.array([1.0, 0.0, -2.0, 0.5])
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    for axes in (np.eye(4), turn):
        p, q = law(np.zeros(4), axes @ np.diag(a) @ axes.T), law(m, axes @ np.diag(b) @ axes.T)
        expected = (m**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
        assert frechet_distance(p, q) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("d", [3, 64])
def test_a_law_is_at_no_distance_from_itself_and_two_are_equally_far_from_each_other(d):
    p, q = random_law(d, 0), random_law(d, 1)
    assert 0 <= frechet_distance(p, p) < 1e-10
    assert frechet_distance(p, q) == pytest.approx(frechet_distance(q, p), rel=1e-11)
    x = features(3 * d, d, 0)
    assert 0 <= frechet_distance_of_features(x, moments(x)) < 1e-10 * float(x.square().sum())


# Moments


def test_moments_are_numpys():
    x = features(50, 7, 0, shift=3.0)
    found = moments(x)
    assert found.n == 50
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("sizes", [[300], [1] * 300, [7, 1, 200, 92], [150, 150]], ids=["all", "ones", "any", "halves"])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streams_lose_no_digits_however_far_and_however_they_are_cut(sizes, offset):
    x = features(300, 5, 0, shift=offset)
    metric = FeatureMoments(5)
    for part in x.split(sizes):
        metric.update(part)
    found = metric.compute()
    wide = x.numpy().astype(np.longdouble)
    centred = wide - wide.mean(0)
    assert found.n == 300
    np.testing.assert_allclose(found.mean, wide.mean(0).astype(float), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(found.cov, (centred.T @ centred / 299).astype(float), rtol=1e-8)


def test_float32_is_summed_in_float64():
    x = features(300, 5, 0, shift=1e4).float()
    metric = FeatureMoments(5)
    metric.update(x)
    np.testing.assert_allclose(metric.compute().cov, np.cov(x.double(), rowvar=False), rtol=1e-8)
    np.testing.assert_allclose(moments(x).cov, np.cov(x.double(), rowvar=False), rtol=1e-8)


def test_moments_of_many_processes_are_those_of_all_features():
    x = features(100, 4, 0, shift=1e3)
    ranks = [FeatureMoments(4) for _ in range(4)]
    for metric, part in zip(ranks, x.split([10, 60, 30]), strict=False):  # the last one saw nothing
        metric.update(part)
    states = [metric.packed.clone() for metric in ranks]
    together = FeatureMoments(4, dist_sync_fn=lambda state, group: states, distributed_available_fn=lambda: True)
    together.update(x[:10])
    found = together.compute()
    assert found.n == 100
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-10)


# Missing ranks


@pytest.mark.parametrize(("n", "m"), [(12, 100), (100, 12), (12, 15), (30, 31), (2, 12), (31, 30)])
def test_fewer_features_than_dimensions_have_the_distance_of_their_own_rank(n, m):
    x, y = features(n, 30, 0), features(m, 30, 1, scale=1.5, shift=0.3)
    expected = by_nuclear_norm(x.numpy(), y.numpy())
    assert frechet_distance_of_features(x, moments(y)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("still", "moving"), [("x", "y"), ("y", "x"), ("xy", "")])
def test_constant_features_add_what_they_add(still, moving):
    sides = {"x": features(60, 8, 0), "y": features(70, 8, 1, shift=0.5)}
    for name in still:
        sides[name][:, [2, 5]] = 0.25
    x, y = sides["x"], sides["y"]
    expected = by_nuclear_norm(x.numpy(), y.numpy())
    assert frechet_distance_of_features(x, moments(y)) == pytest.approx(expected, rel=1e-7)
    if not moving:
        kept = [0, 1, 3, 4, 6, 7]
        assert frechet_distance_of_features(x[:, kept], moments(y[:, kept])) == pytest.approx(expected, rel=1e-7)


# Bias


SPECTRUM = np.array([4.0, 2.0, 1.0, 1.0, 0.5, 0.25])


def drawn(rng: np.random.Generator, n: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=(n, len(SPECTRUM))) * np.sqrt(SPECTRUM))


def bias_times_n(spectrum: np.ndarray) -> float:
    """Of equal normal laws: n E d^2 = sum_i l_i + sum_ij l_i l_j (1 + [i = j]) / (2 (l_i + l_j)), to first order."""
    i, j = spectrum[:, None], spectrum[None, :]
    return float(spectrum.sum() + 0.5 * (i * j * (1 + np.eye(len(spectrum))) / (i + j)).sum())


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def test_features_of_equal_laws_are_as_far_apart_as_their_numbers_say():
    rng = np.random.default_rng(0)
    values = [frechet_distance_of_features(drawn(rng, 1500), moments(drawn(rng, 900))) for _ in range(200)]
    mean, error = mean_and_error(values)
    assert abs(mean - bias_times_n(SPECTRUM) * (1 / 1500 + 1 / 900)) < 4 * error < 0.12 * mean


@pytest.mark.parametrize("m", [None, 700])
def test_the_extrapolated_distance_keeps_the_bias_of_the_reference_alone(m):
    rng = np.random.default_rng(1)
    exact = law(np.zeros(6), np.diag(SPECTRUM))
    plain, infinite = [], []
    for _ in range(150):
        x, q = drawn(rng, 800), exact if m is None else moments(drawn(rng, m))
        plain.append(frechet_distance_of_features(x, q))
        infinite.append(frechet_infinity(x, q))
    left = 0.0 if m is None else bias_times_n(SPECTRUM) / m
    (mean, error), (raw, _) = mean_and_error(infinite), mean_and_error(plain)
    assert abs(mean - left) < 4 * error
    assert raw - left > 10 * error


def test_the_extrapolation_is_a_line_through_the_means_of_disjoint_sets():
    x, q = features(403, 3, 0), random_law(3, 1)
    means = [np.mean([frechet_distance_of_features(x[i::k], q) for i in range(k)]) for k in (1, 2, 3, 4)]
    assert frechet_infinity(x, q) == pytest.approx(np.polyfit([1, 2, 3, 4], means, 1)[1], rel=1e-12)
    shuffled = frechet_infinity(x, q, torch.Generator().manual_seed(0))
    assert shuffled == pytest.approx(frechet_infinity(x, q), rel=0.1)
    assert shuffled != frechet_infinity(x, q)


# Error


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_the_standard_error_is_the_spread_of_repetitions(shift):
    rng = np.random.default_rng(2)
    root, q = rng.normal(size=(4, 4)), random_law(4, 3)
    values, errors = [], []
    for _ in range(400):
        x = torch.from_numpy(rng.normal(size=(600, 4)) @ root.T) + q.mean + shift
        values.append(frechet_distance_of_features(x, q))
        errors.append(frechet_stderr(x, q))
    assert np.mean(errors) == pytest.approx(np.std(values, ddof=1), rel=0.15)


def test_too_few_features_have_no_error_and_no_extrapolation():
    q = random_law(10, 0)
    assert frechet_stderr(features(19, 10, 0), q) is None and frechet_stderr(features(20, 10, 0), q) > 0
    assert frechet_infinity(features(43, 10, 0), q) is None and frechet_infinity(features(44, 10, 0), q) is not None


def test_a_reference_that_is_one_point_is_at_the_distance_of_mean_and_spread():
    x = torch.randn(50, 3).double()
    point = moments(torch.ones(1, 3))
    expected = float((moments(x).mean - 1).square().sum() + moments(x).cov.trace())
    assert frechet_distance_of_features(x, point) == pytest.approx(expected, rel=1e-12)
    # The mean of |x - 1|^2, whose error is that of any mean.
    stderr = float((x - 1).square().sum(1).std() / 50**0.5)
    assert frechet_stderr(x, point) == pytest.approx(stderr, rel=1e-6)
