"""Copies are found, exact, noisy or mirrored, and fresh events are not taken for such."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, hypergeom

from genzoo.metrics import manifold as manifold_module
from genzoo.metrics import memorisation as memorisation_module
from genzoo.metrics.memorisation import LEVEL, Neighbours, exact_copies, memorisation, neighbours, shifted_copies


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


# The alarm


def rate(n: int, n_test: int, p: float) -> float:
    """Probability of an alarm where samples and test events are copies equally often, summed over all outcomes."""
    copies, of_test = np.arange(n + 1)[:, None], np.arange(n_test + 1)[None]
    likely = hypergeom.sf(copies - 1, n + n_test, copies + of_test, n)
    return float((binom.pmf(copies, n, p) * binom.pmf(of_test, n_test, p))[likely < LEVEL / 2].sum())


@pytest.mark.parametrize(("n", "n_test"), [(500, 36), (36, 500), (150, 150), (36, 36)])
def test_a_false_alarm_is_as_rare_as_is_said_whatever_the_sizes(n, n_test):
    rates = [rate(n, n_test, p) for p in (1e-3, 0.01, 0.05, 0.2, 0.5, 0.9)]
    assert max(rates) <= LEVEL / 2
    assert max(rates) > LEVEL / 200, "nor is the test so careful that it sees nothing"


def test_alarms_are_counted_in_a_simulation_of_the_whole_judgement():
    rng, flagged = np.random.default_rng(0), 0
    for _ in range(300):
        p = rng.uniform(0, 0.3)
        fake, test = (torch.from_numpy(rng.uniform(size=n) < p) for n in (2000, 36))
        flagged += memorisation(of_copied(fake), of_copied(test), (fake[:500], test)).flagged
    assert flagged == 0, "by the samples' number for both sides it would be some 50"


def of_copied(copied: torch.Tensor) -> Neighbours:
    one = torch.ones(len(copied)).double()
    return Neighbours(torch.where(copied, 0.1, 0.9).double(), one, one)


def test_either_kind_of_copies_raises_the_alarm_and_is_named():
    none, some = torch.zeros(100, dtype=torch.bool), torch.arange(100) < 40
    both = [memorisation(of_copied(a), of_copied(none), (b, none)).alarms for a, b in ((some, none), (none, some))]
    assert [[alarm[2] for alarm in alarms] for alarms in both] == [[""], [" up to a shift by a pixel"]]
    assert both[1][0][:2] == (0.4, 0.0)
    assert not memorisation(of_copied(none), of_copied(none), (none, none)).flagged


def test_the_ratio_is_one_of_medians():
    nearest = torch.tensor([1.0, 2.0, 30.0]).double()
    found = memorisation(Neighbours(nearest, nearest, nearest), Neighbours(nearest / 4, nearest, nearest))
    assert found.nearest_ratio == pytest.approx(4)
    skewed = memorisation(Neighbours(nearest, nearest, nearest), Neighbours(torch.ones(3).double(), nearest, nearest))
    assert skewed.nearest_ratio == pytest.approx(2)


LARGE = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (300, 1, 8, 9), dtype=np.uint8))


def moved(x: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Shift images, with zeros where nothing was."""
    height, width = x.shape[-2:]
    around = torch.nn.functional.pad(x, (2, 2, 2, 2))
    return around[..., 2 - down : 2 - down + height, 2 - right : 2 - right + width]


@pytest.mark.parametrize("down", [-1, 0, 1])
@pytest.mark.parametrize("right", [-1, 0, 1])
def test_copies_that_were_moved_by_a_pixel_are_found(down, right):
    x = moved(LARGE[:40], down, right)
    assert shifted_copies(x, LARGE[:200]).all() and not shifted_copies(x.flip(-1), LARGE[:200]).any()
    assert shifted_copies(x.flip(-1), LARGE[:200], flip=True).all()
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=x.shape)) * 3
    assert shifted_copies((x.double() + noise).round().clamp(0, 255).to(torch.uint8), LARGE[:200]).all()


def test_what_is_no_copy_is_none_in_any_place(monkeypatch):
    assert (
        not shifted_copies(LARGE[200:250], LARGE[:200]).any()
        and not shifted_copies(LARGE[250:], LARGE[:200], flip=True).any()
    )
    assert not shifted_copies(moved(LARGE[:40], 2, 0), LARGE[:200]).any(), "two pixels are further than is looked"
    whole = shifted_copies(torch.cat([LARGE[200:209], moved(LARGE[:9], 1, 1)]), LARGE[:200])
    monkeypatch.setattr(memorisation_module, "CELLS", 700)
    assert torch.equal(whole, shifted_copies(torch.cat([LARGE[200:209], moved(LARGE[:9], 1, 1)]), LARGE[:200]))


def test_exact_copies_are_counted_byte_for_byte():
    nearly = TRAIN[:7].clone()
    nearly[:, 0, 0, 0] ^= 1
    x = torch.cat([TRAIN[:5], TRAIN[:1], nearly, TRAIN[8:10].flip(-1)])
    assert exact_copies(x, TRAIN) == 6 and exact_copies(x, TRAIN, flip=True) == 8
    points = torch.randn(20, 2)
    assert exact_copies(torch.cat([points[:3], points[:3] + 1e-3]), points) == 3
