"""Precision, recall, density and coverage against all pairs in numpy, and in cases where they are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genzoo.metrics import manifold as module
from genzoo.metrics.manifold import manifold, radii, squared_distances


def cloud(n: int, d: int = 3, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(shift + scale * np.random.default_rng(seed).normal(size=(n, d)))


def table(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return np.linalg.norm(a.numpy()[:, None] - b.numpy()[None], axis=2)


def by_pairs(real: torch.Tensor, fake: torch.Tensor, k: int, k_coverage: int) -> tuple[float, ...]:
    def reach(x: torch.Tensor, k: int) -> np.ndarray:
        return np.sort(table(x, x), axis=1)[:, k]  # column 0 is itself

    d = table(real, fake)
    wide = d < reach(real, k_coverage)[:, None]
    return (
        (d < reach(real, k)[:, None]).any(0).mean(),
        (d < reach(fake, k)[None]).any(1).mean(),
        wide.sum() / (k_coverage * len(fake)),
        wide.any(1).mean(),
    )


REAL, FAKE = cloud(60), cloud(45, seed=1, scale=0.8, shift=0.5)


@pytest.mark.parametrize(("cells", "block"), [(2**24, 1024), (200, 13), (1, 1)])
@pytest.mark.parametrize(("k", "k_coverage"), [(3, 5), (1, 1), (5, 2)])
def test_all_four_are_those_of_all_pairs_whatever_is_held_at_once(monkeypatch, cells, block, k, k_coverage):
    monkeypatch.setattr(module, "CELLS", cells)
    monkeypatch.setattr(module, "BLOCK", block)
    assert manifold(REAL, FAKE, k, k_coverage) == pytest.approx(by_pairs(REAL, FAKE, k, k_coverage), rel=1e-12)
    assert manifold(FAKE, REAL, k, k_coverage) == pytest.approx(by_pairs(FAKE, REAL, k, k_coverage), rel=1e-12)


def test_three_neighbours_make_a_ball_and_five_for_coverage():
    assert manifold(REAL, FAKE) == manifold(REAL, FAKE, k=3, k_coverage=5)


@pytest.mark.parametrize("cells", [2**24, 100])
def test_blocks_hold_all_squared_distances(monkeypatch, cells):
    monkeypatch.setattr(module, "CELLS", cells)
    blocks = list(squared_distances(REAL, FAKE))
    assert torch.equal(torch.cat([rows for rows, _ in blocks]), torch.arange(60))
    np.testing.assert_allclose(torch.cat([d for _, d in blocks]).sqrt(), table(REAL, FAKE), rtol=1e-10)


def test_a_ball_reaches_the_kth_other():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert [radius.sqrt().tolist() for radius in radii(line, 1, 2)] == [[1, 1, 2, 4], [3, 2, 3, 6]]
    with pytest.raises(ValueError, match="too few for 4 nearest neighbours"):
        radii(line, 4)


def test_the_same_set_is_all_inside_and_a_distant_one_is_all_outside():
    precision, recall, density, coverage = manifold(REAL, REAL.clone())
    assert (precision, recall, coverage) == (1, 1, 1) and density >= 1
    assert manifold(REAL, FAKE + 100) == (0, 0, 0, 0)


def test_a_wide_cloud_recalls_a_narrow_one_and_a_narrow_one_is_precise():
    wide, narrow = cloud(80, scale=4.0), cloud(80, seed=1, scale=0.2)
    assert manifold(wide, narrow).precision == 1 and manifold(wide, narrow).recall < 0.5
    assert manifold(narrow, wide).recall == 1 and manifold(narrow, wide).precision < 0.5


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float64, 24), (torch.float32, 12)], ids=str)
def test_nothing_is_lost_far_from_the_origin(dtype, offset):
    real, fake = (x.add(2.0**offset).to(dtype) for x in (cloud(60, 16), cloud(45, 16, 1, 0.8, 0.1)))
    assert manifold(real, fake) == pytest.approx(by_pairs(real.double(), fake.double(), 3, 5), rel=1e-12)


def test_equal_laws_are_covered_as_their_numbers_say():
    N, M, k = 40, 30, 5
    values = [manifold(cloud(N, 2, 2 * i), cloud(M, 2, 2 * i + 1), 3, k).coverage for i in range(400)]
    expected = 1 - math.prod((N - 1 - i) / (N + M - 1 - i) for i in range(k))
    assert abs(np.mean(values) - expected) < 4 * np.std(values, ddof=1) / 20


def test_equal_laws_have_a_density_of_one():
    N, M = 40, 30
    values = [manifold(cloud(N, 2, 2 * i), cloud(M, 2, 2 * i + 1)).density for i in range(400)]
    assert abs(np.mean(values) - 1) < 4 * np.std(values, ddof=1) / 20
