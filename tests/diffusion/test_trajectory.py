"""Sampling paths: their first state is the noise, their last one the sample, bit for bit, and nothing is changed on the way."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import genzoo
from genzoo.conditions import ClassLabels
from genzoo.diffusion import samplers
from genzoo.diffusion.samplers.sampler import initial_state
from genzoo.diffusion.schedules import CondOT, EDMSchedule, VPSchedule
from genzoo.diffusion.trajectory import RecordingSampler, frame_indices, path_denoiser, trajectory
from genzoo.families.vae import VAE
from genzoo.model import AbilityError, GenerativeModel
from genzoo.numerics.random import SampleStreams, randn
from tests.exact import MU, SIGMA, GaussianDenoiser, every_schedule
from tests.test_interface import batch, every

FIXED = {
    "ancestral": samplers.Ancestral(steps=12),
    "ddim": samplers.DDIM(steps=12),
    "dpm_solver": samplers.DPMSolver(steps=12),
    "euler": samplers.Euler(steps=12),
    "midpoint": samplers.Midpoint(steps=12),
    "heun": samplers.Heun(steps=12),
    "euler_maruyama": samplers.EulerMaruyama(steps=12),
    "predictor_corrector": samplers.PredictorCorrector(steps=12),
}
every_sampler = pytest.mark.parametrize("sampler", FIXED.values(), ids=FIXED)


def streams(n: int, seed: int = 0) -> SampleStreams:
    return SampleStreams(seed, range(n))


@every_sampler
@every_schedule
def test_a_recorded_path_is_that_of_the_sampler(sampler, schedule):
    denoiser = GaussianDenoiser(schedule, MU, SIGMA)
    plain = sampler(denoiser, 5, rng=streams(5))
    recorder = RecordingSampler(sampler, estimate=True)
    x, nfe, _ = recorder(denoiser, 5, rng=streams(5))
    assert torch.equal(x, plain.x) and nfe == plain.nfe
    assert len(recorder.states) == len(recorder.times) == len(recorder.estimates) == 13
    assert torch.equal(recorder.states[-1], x) and torch.equal(recorder.estimates[-1], x)
    noise = randn((5, 3), rng=streams(5), dtype=torch.float64)
    first = recorder.states[0] / noise  # the prior is noise of one scale
    torch.testing.assert_close(first, first[:1, :1].expand_as(first), rtol=1e-9, atol=0)
    assert recorder.times[-1] == 0 and sorted(recorder.times, reverse=True) == recorder.times
    assert recorder.noise[-1] == 0 and sorted(recorder.noise, reverse=True) == recorder.noise


@every_schedule
def test_the_times_are_those_of_the_states(schedule):
    """Along an accurate path, the state at a time is the closed form of the initial one."""
    denoiser = GaussianDenoiser(schedule, MU, SIGMA)
    recorder = RecordingSampler(samplers.Heun(steps=400), frames=9, estimate=True)
    recorder(denoiser, 4, rng=streams(4))
    start = recorder.states[0]
    for x, estimate, t in list(zip(recorder.states, recorder.estimates, recorder.times, strict=True))[1:-1]:
        torch.testing.assert_close(x, denoiser.carry(start, recorder.times[0], t), rtol=0, atol=0.02)
        at = torch.full((4,), t, dtype=torch.float64)
        torch.testing.assert_close(estimate, denoiser.exact("x0", x, at), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("schedule", "std"), [(CondOT(), 1.0), (VPSchedule(), 1.0), (EDMSchedule(), 80.0)])
def test_the_first_state_is_the_prior(schedule, std):
    recorder = RecordingSampler(samplers.Heun(steps=5))
    recorder(GaussianDenoiser(schedule, MU, SIGMA), 3, rng=streams(3))
    noise = randn((3, 3), rng=streams(3), dtype=torch.float64)
    assert schedule.prior_std == pytest.approx(std)
    t = recorder.times[0]
    torch.testing.assert_close(recorder.states[0], initial_state(schedule, noise, t), rtol=1e-12, atol=1e-12)


def test_estimates_of_images_are_clamped_as_those_of_the_sampler():
    denoiser = GaussianDenoiser(VPSchedule(), [3.0, -3.0], [0.1, 0.1], levels=256)
    for clip in (True, False):
        recorder = RecordingSampler(samplers.DDIM(steps=6, clip=clip), estimate=True)
        recorder(denoiser, 4, rng=streams(4))
        assert (float(recorder.estimates[3].abs().max()) <= 1) == clip


@every(GenerativeModel)
def test_the_last_state_of_a_model_is_its_sample(case):
    model = case.model()
    try:
        denoiser = path_denoiser(model)
    except AbilityError as error:
        assert case.family not in (
            "ddpm",
            "score_sde",
            "flow_matching",
            "mean_flow",
            "consistency",
            "latent",
        ) and "\n" not in str(error)
        with pytest.raises(AbilityError, match="samples in one pass"):
            trajectory(model, 2)
        return
    before, y = denoiser.sampler, batch(model, 3)[1]
    expected = model.sample(3, y, rng=streams(3))
    path = trajectory(model, 3, y, frames=4, estimate=True, rng=streams(3))
    assert torch.equal(path.x[-1], expected.x) and path.nfe == expected.nfe
    assert path.estimate is not None and torch.equal(path.estimate[-1], expected.x)
    states = min(len(before.state_times(denoiser)), 4)
    assert path.x.shape == path.estimate.shape == (states, 3, *model.shape)
    assert len(path.times) == len(path.noise) == states and path.times[-1] == path.noise[-1] == 0
    assert float((path.x[0] - path.x[-1]).abs().max()) > 1e-3
    assert denoiser.sampler is before


def test_conditions_are_drawn_as_by_sample():
    model = genzoo.DDPM((2,), ClassLabels(3)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    path = trajectory(model, 5, frames=2, rng=streams(5))
    drawn = model.conditioner.draw(5, None, rng := streams(5))
    assert torch.equal(path.x[-1], model.sample(5, drawn, rng=rng).x)


def test_a_sampled_likelihood_keeps_its_noise_in_the_last_state():
    """The intermediate states of a latent model draw noise too, but after the sample."""

    def codec(event, condition):
        return VAE(event, condition, sample_likelihood=True, latent_dim=3)

    model = genzoo.latent(genzoo.EventSpec((2,)), codec=codec, prior=genzoo.DDPM).eval()
    expected = model.sample(4, rng=streams(4)).x
    path = trajectory(model, 4, frames=5, rng=streams(4))
    assert torch.equal(path.x[-1], expected)
    assert path.x.shape == (5, 4, 2) and bool(path.x.isfinite().all())


def test_a_sampler_without_common_times_is_refused_and_put_back():
    model = genzoo.DDPM((2,), sampler=samplers.AdaptiveODE()).eval()
    with pytest.raises(AbilityError, match="AdaptiveODE has no time grid"):
        trajectory(model, 2)
    assert isinstance(model.sampler, samplers.AdaptiveODE)


# The choice of states


def test_all_states_are_shown_unless_fewer_are_asked_for():
    noise = [8.0, 4.0, 2.0, 1.0, 0.0]
    assert frame_indices(noise, None) == frame_indices(noise, 5) == frame_indices(noise, 99) == [0, 1, 2, 3, 4]
    assert frame_indices(noise, 2) == [0, 4]
    with pytest.raises(ValueError, match="at least 2"):
        frame_indices(noise, 1)


@pytest.mark.parametrize("frames", [2, 3, 7, 10, 60, 999])
def test_states_are_distinct_ordered_and_even_in_the_angle(frames):
    t = torch.linspace(1, 0, 1001, dtype=torch.float64)
    for schedule in (VPSchedule(), EDMSchedule(), CondOT()):
        noise: list[float] = schedule.ratio(t).tolist()
        chosen = frame_indices(noise, frames)
        assert len(chosen) == frames and chosen[0] == 0 and chosen[-1] == 1000
        assert all(a < b for a, b in itertools.pairwise(chosen))
        if frames <= 10:
            angles = [math.atan(noise[i]) for i in chosen]
            gaps: Tensor = -torch.tensor(angles).diff()
            torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=0.1, atol=0)
