"""Distributions of training times, by Kolmogorov's and Smirnov's test against their closed distribution functions."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from genzoo.diffusion.noise_levels import LogitNormalTime, LogNormalRatio, UniformTime
from genzoo.numerics.random import SampleStreams, generator
from tests.exact import SCHEDULES, every_schedule

CPU = torch.device("cpu")
LEVELS = [UniformTime(), LogitNormalTime(-0.5, 1.5), LogNormalRatio(-1.2, 1.2)]
every_levels = pytest.mark.parametrize("levels", LEVELS, ids=lambda levels: type(levels).__name__)


def draws(levels, schedule, n: int = 20_000) -> torch.Tensor:
    return levels.sample(n, schedule, generator("times"), CPU)


@every_schedule
def test_uniform_times_are_uniform_between_the_schedules_ends(schedule):
    low, high = schedule.t_min, schedule.t_max
    assert stats.kstest(draws(UniformTime(), schedule).numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.7, 0.4)])
def test_logit_normal_times_have_normal_logits(mean, std):
    t = draws(LogitNormalTime(mean, std), SCHEDULES["cond_ot"])
    assert stats.kstest(torch.logit(t).numpy(), stats.norm(mean, std).cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", ["edm", "ve", "cond_ot", "vp", "cosine"])
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.3, 0.5)])
def test_log_normal_ratios_are_log_normal_on_any_schedule(name, mean, std):
    schedule = SCHEDULES[name]
    log_ratio = schedule.ratio(draws(LogNormalRatio(mean, std), schedule)).log()
    # Beyond the schedule's ends there are no times: what would lie there lies at the ends.
    low, high = (float(schedule.ratio(torch.tensor(t).double()).log()) for t in (schedule.t_min, schedule.t_max))
    inside = log_ratio[(log_ratio > low + 1e-9) & (log_ratio < high - 1e-9)].numpy()
    assert len(inside) > 19_000
    assert stats.kstest(inside, stats.truncnorm((low - mean) / std, (high - mean) / std, mean, std).cdf).pvalue > 1e-3


@every_schedule
@every_levels
def test_no_time_is_beyond_the_schedules_ends(levels, schedule):
    t = draws(levels, schedule)
    assert t.dtype == torch.float64
    assert schedule.t_min <= float(t.min()) < float(t.max()) <= schedule.t_max
    wide = type(levels)() if isinstance(levels, UniformTime) else type(levels)(0.0, 100.0)
    extreme = draws(wide, schedule, 200)
    assert schedule.t_min <= float(extreme.min()) and float(extreme.max()) <= schedule.t_max


@every_levels
def test_time_i_is_a_function_of_its_own_stream(levels):
    whole = levels.sample(6, SCHEDULES["vp"], SampleStreams(3, range(6)), CPU)
    part = levels.sample(2, SCHEDULES["vp"], SampleStreams(3, [4, 5]), CPU)
    assert torch.equal(whole[4:], part)


@pytest.mark.parametrize("levels", [LogitNormalTime, LogNormalRatio])
@pytest.mark.parametrize("std", [0.0, -1.0])
def test_a_spread_is_positive(levels, std):
    with pytest.raises(ValueError, match=f"not {std}"):
        levels(std=std)


def test_karras_defaults():
    levels = LogNormalRatio()
    assert (levels.mean, levels.std) == (-1.2, 1.2)
    median = float(SCHEDULES["edm"].at(draws(levels, SCHEDULES["edm"]).median()).sigma)
    assert median == pytest.approx(math.exp(-1.2), rel=0.03)
