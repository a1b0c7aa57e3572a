"""Neighbouring times: the grids of Karras et al., their probabilities, ratios of Geng et al., and the halvings."""

from __future__ import annotations

import math

import pytest
import torch

from genzoo.diffusion.noise_levels import LogNormalRatio, UniformTime
from genzoo.diffusion.schedules import EDMSchedule
from genzoo.diffusion.time_pairs import GridPairs, RatioPairs, TimePairs
from genzoo.numerics.random import generator
from tests.exact import every_schedule

CPU = torch.device("cpu")


def karras(N: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    i = torch.arange(N + 1, dtype=torch.float64) / N
    return (low ** (1 / rho) + i * (high ** (1 / rho) - low ** (1 / rho))) ** rho


def test_the_grid_is_that_of_karras_and_each_time_lies_in_its_cell():
    schedule, pairs = EDMSchedule(), GridPairs(start=10, end=40, doubling=100)
    t = torch.linspace(schedule.t_min, 1, 5000, dtype=torch.float64)
    for seen, N in ((0, 10), (99, 10), (100, 20), (250, 40), (1000, 40)):
        pairs.seen.fill_(seen)
        later, earlier = pairs.pair(t, schedule)
        assert bool(((earlier <= t + 1e-9) & (t <= later + 1e-9) & (earlier < later)).all())
        sigmas = karras(N)
        index = torch.searchsorted(sigmas, schedule.ratio(later) * (1 - 1e-9))
        torch.testing.assert_close(schedule.ratio(later), sigmas[index], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(schedule.ratio(earlier), sigmas[index - 1], rtol=1e-9, atol=1e-12)
        assert set(index.tolist()) == set(range(1, N + 1))


def test_log_normal_levels_choose_cells_with_discretized_log_normal_probabilities():
    """p(i) proportional to erf((log sigma_{i+1} - m)/(sqrt 2 s)) - erf((log sigma_i - m)/(sqrt 2 s))."""
    schedule, pairs, n = EDMSchedule(), GridPairs(start=12, end=12, doubling=1), 200_000
    t = LogNormalRatio(-1.1, 2.0).sample(n, schedule, generator("levels"), CPU)
    later, _ = pairs.pair(t, schedule)
    edges = karras(12).log()
    edges[0], edges[-1] = -math.inf, math.inf  # times beyond the ends are clamped
    expected = (torch.special.ndtr((edges + 1.1) / 2.0)).diff()
    index = torch.searchsorted(karras(12), schedule.ratio(later) * (1 - 1e-9)) - 1
    share = torch.bincount(index, minlength=12) / n
    assert bool(((share - expected).abs() <= 4.5 * (expected * (1 - expected) / n).sqrt() + 1e-4).all())


def test_ratios_are_those_of_easy_consistency_tuning():
    schedule, pairs = EDMSchedule(), RatioPairs(doubling=100, halvings=3)
    t = schedule.time_of(torch.tensor([0.01, 0.5, 3.0, 70.0], dtype=torch.float64))
    for seen, k in ((0, 1), (100, 2), (399, 4), (900, 4)):
        pairs.seen.fill_(seen)
        later, earlier = (schedule.ratio(time) for time in pairs.pair(t, schedule))
        n = 1 + 8 / (1 + torch.exp(later))
        expected = (later * (1 - n / 2**k)).clamp(min=0.002)
        torch.testing.assert_close(later, schedule.ratio(t))
        torch.testing.assert_close(earlier, expected, rtol=1e-9, atol=1e-12)


@every_schedule
@pytest.mark.parametrize("pairs", [GridPairs(5, 640, 10), RatioPairs(10, 8)], ids=["grid", "ratio"])
@pytest.mark.parametrize("levels", [UniformTime(), LogNormalRatio(-1.1, 2.0)], ids=["uniform", "log_normal"])
def test_pairs_are_ordered_on_any_schedule_at_any_stage(schedule, pairs, levels):
    gaps = []
    for seen in (0, 35, 100):
        pairs.seen.fill_(seen)
        later, earlier = pairs.pair(levels.sample(2000, schedule, generator("pairs"), CPU), schedule)
        assert bool((schedule.t_min - 1e-9 <= earlier).all() and (earlier < later).all() and (later <= 1).all())
        ratios = schedule.ratio(later).float(), schedule.ratio(earlier).float()
        assert bool((ratios[0] > ratios[1]).all()), "a gap that single precision rounds to zero"
        gaps.append(float((later - earlier).mean()))
    assert gaps[0] > gaps[1] > gaps[2]


def test_images_are_counted_and_saved_with_the_weights():
    pairs, other = GridPairs(10, 80, 100), GridPairs(10, 80, 100)
    for _ in range(5):
        pairs.count(64)
    assert int(pairs.seen) == 320 and float(pairs.fineness()) == 8
    other.load_state_dict(pairs.state_dict())
    assert float(other.fineness()) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GridPairs(1, 10), "start"),
        (lambda: GridPairs(20, 10), "start"),
        (lambda: GridPairs(10, 20, 0), "doubling"),
        (lambda: RatioPairs(0), "doubling"),
        (lambda: RatioPairs(10, -1), "halvings"),
    ],
)
def test_values_outside_their_domain_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    assert issubclass(GridPairs, TimePairs)
