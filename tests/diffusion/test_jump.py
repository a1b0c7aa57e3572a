r"""Jumps of exact flow maps: whatever the number of steps and the fresh noise, each state has the marginal of its time.

On the straight path the prior N(0, I) is the marginal of t = 1, so that every choice of steps and gamma draws from N(mu, Sigma)
exactly; on other paths the covariance at noise enters by the affine map of each step.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from genzoo.diffusion.flow_map import AnytimeFlowMap, FlowMap
from genzoo.diffusion.path import GaussianPath
from genzoo.diffusion.samplers import DDIM, Euler, Jump
from genzoo.diffusion.schedules import CondOT, EDMSchedule, Schedule
from genzoo.event import EventSpec
from genzoo.families.ddpm import DDPM
from genzoo.numerics.random import SampleStreams
from tests.exact import MU, SCHEDULES, SIGMA, GaussianDenoiser, moments


class ToData(FlowMap):
    """The exact consistency function of N(mu, Sigma)."""

    condition = None

    def __init__(self, schedule: Schedule, levels: int | None = None):
        super().__init__()
        self.denoiser, self.calls = GaussianDenoiser(schedule, MU, SIGMA), 0
        self.event, self.path = EventSpec((3,), levels), GaussianPath(schedule)

    @property
    def dim(self) -> int:
        return 3

    def to_data(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.denoiser.carry(x_t, float(t[0]), self.ends[0])


class Anytime(ToData, AnytimeFlowMap):
    """The exact flow map of N(mu, Sigma)."""

    def jump(self, x_t: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.denoiser.carry(x_t, float(t[0]), float(s[0]))


class Straight(Anytime):
    """On the straight path, to its very ends."""

    ends = (0.0, 1.0)


@pytest.mark.parametrize("gamma", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_on_the_straight_path_samples_have_the_exact_distribution(gamma, steps, monkeypatch):
    model = Straight(CondOT())
    mean, covariance = moments(Jump(steps, gamma), model, monkeypatch)
    torch.testing.assert_close(mean, model.denoiser.mu, rtol=0, atol=1e-9)
    torch.testing.assert_close(covariance, model.denoiser.covariance, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_consistency_function_draws_from_the_law_of_its_affine_steps(name, steps, monkeypatch):
    model = ToData(SCHEDULES[name])
    schedule, d = model.path.schedule, model.denoiser
    mean, covariance = moments(Jump(steps), model, monkeypatch)
    grid, first = Jump(steps).grid(model), model.ends[0]
    variance = torch.full((3,), schedule.prior_std**2, dtype=torch.float64)  # along the axes of Sigma
    shift = -float(schedule.at(torch.tensor(grid[0], dtype=torch.float64)).alpha) * (
        d.mu @ d.axes
    )  # of the mean from the marginal's
    for t, s in itertools.pairwise(grid):
        gain = d.spread(first) / d.spread(t)
        variance, shift = gain * variance, gain.sqrt() * shift
        if s != grid[-1]:
            (a, b), (sigma, fresh) = (schedule.at(torch.tensor([first, s], dtype=torch.float64))[i] for i in (0, 1))
            variance = (b / a) ** 2 * variance + fresh**2 - (b / a * sigma) ** 2
            shift = b / a * shift
    alpha = float(schedule.at(torch.tensor(first, dtype=torch.float64)).alpha)
    torch.testing.assert_close(mean, alpha * d.mu + d.axes @ shift, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(covariance, d.axes @ variance.diag() @ d.axes.T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_an_evaluation_is_counted_for_each_step_and_states_have_their_times(gamma):
    model = Anytime(EDMSchedule())
    sampler = Jump(4, gamma, trajectory=True)
    drawn = sampler(model, 3, rng=torch.Generator())
    assert drawn.nfe == model.calls == 4 and drawn.trajectory.shape == (5, 3, 3)
    times = sampler.state_times(model)
    assert len(times) == 5 and times[0] == 1.0 and times[-1] == 0.0 and times == sorted(times, reverse=True)
    if gamma == 0:
        for t, x in zip(times[1:-1], drawn.trajectory[1:-1], strict=True):
            torch.testing.assert_close(x, model.denoiser.carry(drawn.trajectory[0], 1.0, t), rtol=1e-9, atol=1e-9)


def test_sample_i_depends_on_i_alone_with_fresh_noise():
    model = ToData(EDMSchedule())

    def draw(rows: range) -> Tensor:
        return Jump(3)(model, len(rows), rng=SampleStreams(5, rows)).x

    torch.testing.assert_close(torch.cat([draw(range(2)), draw(range(2, 6))]), draw(range(6)))


@pytest.mark.parametrize("clip", [True, False])
def test_images_are_clamped_where_a_jump_ends_at_the_data(clip):
    x = Jump(2, clip=clip)(ToData(EDMSchedule(), levels=17), 30, rng=torch.Generator()).x
    assert (float(x.abs().max()) <= 1) == clip


def test_samplers_refuse_what_they_cannot_sample_from():
    function, anytime, plain = ToData(EDMSchedule()), Anytime(EDMSchedule()), DDPM((3,))
    with pytest.raises(ValueError, match=r"Jump samples from flow maps.*DDPM is none: choose sampler=heun"):
        Jump()(plain, 2)
    for sampler in (Euler(2), DDIM(2)):
        with pytest.raises(ValueError, match=r"samples from denoisers.*ToData is none: choose sampler=jump"):
            sampler(function, 2)
    for gamma in (0.0, 0.7):
        with pytest.raises(ValueError, match="gamma must be 1"):
            Jump(2, gamma)(function, 2)
        assert Jump(1, gamma)(function, 2).nfe == Jump(2, gamma)(anytime, 2).nfe - 1
    for gamma in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="gamma must be in"):
            Jump(2, gamma)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Jump(0)
