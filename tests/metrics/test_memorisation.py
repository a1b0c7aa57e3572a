"""Copies are found, exact, noisy or mirrored, and fresh events are not taken for such."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genzoo.metrics import manifold as manifold_module
from genzoo.metrics.memorisation import Neighbours, memorisation, neighbours


def images(n: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 1, 4, 4), dtype=np.uint8))


def noisy(x: torch.Tensor, size: float, seed: int = 9) -> torch.Tensor:
    noise = torch.from_numpy(np.random.default_rng(seed).normal(size=x.shape))
    return (x.double() + size * noise).round().clamp(0, 255).to(torch.uint8)


TRAIN, TEST, FRESH = images(300, 0), images(100, 1), images(100, 2)


def by_pairs(x: torch.Tensor, train: torch.Tensor, flip: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    def table(a: np.ndarray) -> np.ndarray:
        b = train.numpy().astype(float)
        sides = [a, a[..., ::-1]] if flip else [a]
        axes = tuple(range(2, b.ndim + 1))
        return np.min([np.sqrt(((side[:, None] - b[None]) ** 2).sum(axes)) for side in sides], axis=0)

    d, own = table(x.numpy().astype(float)), table(train.numpy().astype(float))
    np.fill_diagonal(own, np.inf)
    return np.sort(d)[:, 0], np.sort(d)[:, 1], own.min(1)[d.argmin(1)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("cells", [2**24, 700])
def test_neighbours_are_those_of_all_pairs(monkeypatch, flip, cells):
    monkeypatch.setattr(manifold_module, "CELLS", cells)
    x = torch.cat([FRESH[:20], TRAIN[:20], noisy(TRAIN[20:40], 3).flip(-1)])
    found = neighbours(x, TRAIN, flip)
    for ours, expected in zip(found, by_pairs(x, TRAIN, flip), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_points_have_neighbours_too():
    rng = np.random.default_rng(0)
    x, train = torch.from_numpy(rng.normal(size=(30, 2))).float(), torch.from_numpy(rng.normal(size=(50, 2))).float()
    for ours, expected in zip(neighbours(x, train), by_pairs(x, train, False), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_three_training_events_are_enough():
    x, train = torch.tensor([[0.0, 0.1]]), torch.tensor([[0.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    found = [float(value) for value in neighbours(x, train)]
    assert found == pytest.approx([0.1, math.hypot(1, 0.1), 1.0], rel=1e-6)


def test_near_neighbours_are_told_apart_far_from_the_origin():
    train = torch.cat([torch.full((5, 2), 1e4), torch.full((5, 2), -1e4)]).double()
    train += torch.arange(10)[:, None] * 1e-3
    x = train[[2, 7]] + 1e-4
    np.testing.assert_allclose(neighbours(x, train).nearest, 1e-4 * math.sqrt(2), rtol=1e-6)


def judged(x: torch.Tensor, train: torch.Tensor = TRAIN, flip: bool = False):
    return memorisation(neighbours(x, train, flip), neighbours(TEST, train, flip))


@pytest.mark.parametrize("copies", [TRAIN[:100], noisy(TRAIN[:100], 4)], ids=["exact", "noisy"])
def test_copies_are_flagged(copies):
    found = judged(copies)
    assert found.flagged
    assert found.copied.value == 1 and found.authentic.value == 0 and found.nearest_ratio < 0.2
    assert found.copied_of_test == 0 and found.authentic_of_test > 0.3


def test_some_copies_among_fresh_events_are_flagged_and_counted():
    found = judged(torch.cat([TRAIN[:30], FRESH[:70]]))
    assert found.flagged and found.copied == pytest.approx((0.3, math.sqrt(0.3 * 0.7 / 99), 100))


def test_mirrored_copies_are_found_where_training_saw_mirror_images():
    mirrored = TRAIN[:100].flip(-1)
    assert judged(mirrored, flip=True).copied.value == 1 and judged(mirrored, flip=True).flagged
    assert judged(mirrored).copied.value == 0 and not judged(mirrored).flagged
    assert judged(TRAIN[:100], flip=True).copied.value == 1


def test_an_image_that_is_its_own_mirror_image_is_one_neighbour():
    half = images(50, 3)
    train = torch.cat([half, half.flip(-1)], dim=-1)
    close = neighbours(noisy(train, 2), train, flip=True)
    assert close.copied.all() and (close.second > 5 * close.nearest).all()


def test_copies_of_events_that_the_training_split_has_twice_are_flagged():
    twice = torch.cat([TRAIN, TRAIN])
    found = judged(TRAIN[:100], twice)
    assert found.flagged and found.copied.value == 1 and found.authentic.value == 0


def test_fresh_events_and_the_test_split_itself_are_not_flagged():
    for x in (FRESH, TEST):
        found = judged(x)
        assert not found.flagged
        assert found.copied.value == 0 and found.nearest_ratio == pytest.approx(1, abs=0.1)
    assert judged(TEST).nearest_ratio == 1
    assert judged(TEST).authentic.value == judged(TEST).authentic_of_test


def of_shares(copied: float, n: int = 400) -> Neighbours:
    """Events of which a share are copies."""
    nearest = torch.full((n,), 0.9).double()
    nearest[: round(copied * n)] = 0.1
    return Neighbours(nearest, torch.ones(n).double(), torch.ones(n).double())


def test_a_third_of_the_distance_to_the_second_makes_a_copy():
    one = torch.ones(4).double()
    found = Neighbours(torch.tensor([0.32, 0.34, 0.0, 1.2]).double(), one * torch.tensor([1, 1, 0, 1.3]), one)
    assert found.copied.tolist() == [True, False, True, False]
    assert found.authentic.tolist() == [False, False, False, True]


def test_a_few_copies_more_than_in_the_test_split_are_chance_and_many_are_not():
    assert not memorisation(of_shares(0.22), of_shares(0.2)).flagged
    assert not memorisation(of_shares(0.3), of_shares(0.5)).flagged
    assert memorisation(of_shares(0.4), of_shares(0.2)).flagged
    assert not memorisation(of_shares(1 / 400), of_shares(0)).flagged
