"""Samplers, exactly: on Gaussian data with the exact denoiser each is an affine map of its noise, and its law is known.

The laws are compared with golden numbers of a chain of 1000 steps, with the closed form of a DDIM step, with the
recursion of the reverse chain written in respaced betas, and with each other.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from genzoo.prob.paths import KINDS
from genzoo.prob.schedules import CondOT, CosineSchedule, LinearSchedule, VESchedule
from genzoo.samplers import DDIM, Ancestral
from tests.exact import MU, SIGMA, GaussianDenoiser, law

LAMBDA = [1.0, 0.25, 4.0]
LINEAR = LinearSchedule(1000)
SCHEDULES = [LINEAR, CosineSchedule(500), CondOT(), VESchedule()]

# Final variances of the chain of 1000 linear steps from N(0, 1), for data N(0, lambda), by lambda.
GOLDEN = {
    "fixedlarge": (Ancestral("fixedlarge"), [0.99990, 0.25075, 3.99057]),
    "fixedsmall": (Ancestral("fixedsmall"), [0.99107, 0.24613, 3.97478]),
    "optimal": (Ancestral("learned"), [0.99990, 0.24990, 3.99990]),
    "ddim-10": (DDIM(10), [0.69172, 0.13997, 2.95799]),
    "ddim-20": (DDIM(20), [0.83271, 0.18813, 3.44087]),
    "ddim-50": (DDIM(50), [0.92945, 0.22320, 3.76604]),
    "ddim-100": (DDIM(100), [0.96403, 0.23618, 3.88098]),
}


def centred(schedule=LINEAR, **kwargs) -> GaussianDenoiser:
    return GaussianDenoiser(schedule, [0.0] * len(LAMBDA), LAMBDA, **kwargs)


@pytest.mark.parametrize(("sampler", "golden"), GOLDEN.values(), ids=GOLDEN)
def test_final_variance_is_the_golden_one(sampler, golden, monkeypatch):
    mean, covariance = law(sampler, centred(hop=1 / 1000), monkeypatch)
    assert mean.abs().max() == 0
    torch.testing.assert_close(covariance.diag(), torch.tensor(golden).double(), atol=1e-5, rtol=0)
    assert (covariance - covariance.diag().diag()).abs().max() == 0


def chain(lam: float, steps: int, T: int, variance: str) -> float:
    """Final variance of a respaced ancestral chain, in the betas and the posterior coefficients of its paper."""
    abar_all = np.cumprod(1 - np.linspace(1e-4, 2e-2, T) * 1000 / T)
    abar = np.append(1.0, abar_all[[i * T // steps for i in range(steps)]])
    betas = 1 - abar[1:] / abar[:-1]
    v = 1.0
    for i in range(steps, 0, -1):
        beta, now, before = betas[i - 1], abar[i], abar[i - 1]
        of_x0 = math.sqrt(before) * beta / (1 - now)
        of_x_t = math.sqrt(1 - beta) * (1 - before) / (1 - now)
        c = now * lam + 1 - now
        noise = {
            "fixedlarge": beta,
            "fixedsmall": beta * (1 - before) / (1 - now),
            "learned": beta * (1 - before) / (1 - now) + of_x0**2 * lam * (1 - now) / c,
        }[variance]
        v = (of_x0 * math.sqrt(now) * lam / c + of_x_t) ** 2 * v + (noise if i > 1 else 0.0)
    return v


@pytest.mark.parametrize("variance", ["fixedlarge", "fixedsmall", "learned"])
@pytest.mark.parametrize("steps", [1, 10, 250])
def test_a_thinned_ancestral_chain_is_the_chain_of_its_respaced_betas(steps, variance, monkeypatch):
    covariance = law(Ancestral(variance, steps), centred(hop=1 / steps), monkeypatch)[1]
    # The grid of times is (i T/S + 1)/T: the hop from all but the first is 1/S exactly.
    expected = [chain(lam, steps, 1000, variance) for lam in LAMBDA]
    torch.testing.assert_close(covariance.diag(), torch.tensor(expected).double(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_a_ddim_step_multiplies_the_variance_by_its_closed_form(schedule, kind, monkeypatch):
    denoiser = GaussianDenoiser(schedule, MU, SIGMA, kind)
    mean, covariance = law(DDIM(20), denoiser, monkeypatch)
    c = schedule.at(schedule.times(20))
    gain = torch.ones_like(denoiser.lam)
    for i in range(20):
        total = c.alpha[i] ** 2 * denoiser.lam + c.sigma[i] ** 2
        gain *= (c.alpha[i + 1] * c.alpha[i] * denoiser.lam + c.sigma[i + 1] * c.sigma[i]) / total
    U, start = denoiser.axes, schedule.prior_std if schedule.t_first == 1 else float(c.sigma[0])
    torch.testing.assert_close(covariance, U @ (start * gain).square().diag() @ U.T, atol=1e-7, rtol=1e-7)
    # The noise starts around 0 and not around alpha_1 mu.
    torch.testing.assert_close(
        mean, denoiser.mu - U @ (gain * (U.T @ (c.alpha[0] * denoiser.mu))), atol=1e-7, rtol=1e-7
    )


def test_ancestral_draws_recover_the_mean_and_the_correlations_of_the_data(monkeypatch):
    denoiser = GaussianDenoiser(LINEAR, MU, SIGMA)
    mean, covariance = law(Ancestral("fixedsmall"), denoiser, monkeypatch)
    torch.testing.assert_close(mean, denoiser.mu, atol=1e-3, rtol=0)
    along_axes = torch.tensor([chain(lam, 1000, 1000, "fixedsmall") for lam in denoiser.lam.tolist()]).double()
    torch.testing.assert_close(covariance, denoiser.axes @ along_axes.diag() @ denoiser.axes.T, atol=1e-9, rtol=0)
    torch.testing.assert_close(covariance, denoiser.covariance, atol=0.02, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_ddim_with_eta_one_is_the_ancestral_sampler(schedule, monkeypatch):
    denoiser = GaussianDenoiser(schedule, MU, SIGMA)
    for ddim, ancestral in zip(
        law(DDIM(25, eta=1.0), denoiser, monkeypatch),
        law(Ancestral("fixedsmall", steps=25), denoiser, monkeypatch),
        strict=True,
    ):
        torch.testing.assert_close(ddim, ancestral, atol=1e-9, rtol=1e-9)


def test_ddim_draws_more_noise_as_eta_grows_and_none_at_zero(monkeypatch):
    """Data of variance 4 need all the variance that a step can keep: eq. 16 against the recursion of one dimension."""
    for eta in (0.0, 0.3, 1.0):
        got = float(law(DDIM(10, eta=eta), GaussianDenoiser(LINEAR, [0.0], [4.0]), monkeypatch)[1])
        abar = (LINEAR.at(LINEAR.times(10)).alpha ** 2).tolist()
        v = 1.0
        for now, before in pairwise(abar):
            drawn = eta**2 * (1 - before) / (1 - now) * (1 - now / before)
            c = 4 * now + 1 - now
            of_x0, of_eps = math.sqrt(before), math.sqrt(1 - before - drawn)
            v = (of_x0 * math.sqrt(now) * 4 / c + of_eps * math.sqrt(1 - now) / c) ** 2 * v + drawn
        assert got == pytest.approx(v, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_denoiser_predicts_does_not_change_what_is_sampled(kind, monkeypatch):
    for got, expected in zip(
        law(Ancestral(steps=100), GaussianDenoiser(LINEAR, MU, SIGMA, kind), monkeypatch),
        law(Ancestral(steps=100), GaussianDenoiser(LINEAR, MU, SIGMA, "eps"), monkeypatch),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "sampler", [DDIM(7), DDIM(7, eta=0.5), Ancestral(steps=7), Ancestral()], ids=lambda s: str(s.steps)
)
@pytest.mark.parametrize("evaluations", [1, 2])
def test_nfe_counts_the_evaluations_that_were_made(sampler, evaluations):
    denoiser = centred()
    denoiser.evaluations = evaluations
    samples = sampler(denoiser, 3)
    assert denoiser.calls == (sampler.steps or 1000)
    assert samples.nfe == denoiser.calls * evaluations


def test_the_trajectory_runs_from_the_first_noise_to_the_samples():
    sampler, rng = DDIM(5, trajectory=True), torch.Generator().manual_seed(0)
    x, _, states = sampler(centred(), 4, rng=rng)
    noise = torch.randn(4, 3, generator=rng.manual_seed(0), dtype=torch.float64)
    assert states.shape == (6, 4, 3)
    assert torch.equal(states[0], noise)
    assert torch.equal(states[-1], x)
    c = LINEAR.at(LINEAR.times(5))
    lam = torch.tensor(LAMBDA).double()
    for i in range(5):
        total = c.alpha[i] ** 2 * lam + c.sigma[i] ** 2
        gain = (c.alpha[i + 1] * c.alpha[i] * lam + c.sigma[i + 1] * c.sigma[i]) / total
        torch.testing.assert_close(states[i + 1], gain * states[i], atol=1e-12, rtol=1e-10)


# Data far outside of [-1, 1], so that every estimate of them is clipped.
FAR = {"mean": [5.0, -5.0, 0.0], "covariance": [1e-4] * 3}


def test_on_images_ddim_clips_the_data_and_recomputes_the_noise():
    x, _, states = DDIM(4, trajectory=True)(GaussianDenoiser(LINEAR, **FAR, levels=256), 6)
    c = LINEAR.at(LINEAR.times(4))
    for i in range(4):
        x0 = torch.tensor([1.0, -1.0, 0.0]).double().expand(6, 3)
        eps = (states[i] - c.alpha[i] * x0) / c.sigma[i]
        expected = c.alpha[i + 1] * x0 + c.sigma[i + 1] * eps
        torch.testing.assert_close(states[i + 1][:, :2], expected[:, :2], atol=1e-12, rtol=0)
    assert torch.equal(x[:, :2], x0[:, :2])


def test_on_images_the_ancestral_sampler_clips_the_data_and_recomputes_the_mean(monkeypatch):
    denoiser = GaussianDenoiser(LINEAR, **FAR, levels=256)
    mean, covariance = law(Ancestral(steps=50), denoiser, monkeypatch)
    torch.testing.assert_close(mean[:2], torch.tensor([1.0, -1.0]).double(), atol=1e-12, rtol=0)
    assert covariance[:2].abs().max() < 1e-20  # x at the last step is the clipped estimate, whatever the noise was
    states = Ancestral(steps=4, trajectory=True)(denoiser, 20_000).trajectory
    betas = 1 - (LINEAR.at(LINEAR.times(4)).alpha[:-1] / LINEAR.at(LINEAR.times(4)).alpha[1:]) ** 2
    abar = LINEAR.at(LINEAR.times(4)).alpha ** 2
    for i in range(3):
        of_x0 = math.sqrt(abar[i + 1]) * betas[i] / (1 - abar[i])
        of_x_t = torch.sqrt(1 - betas[i]) * (1 - abar[i + 1]) / (1 - abar[i])
        noise = (states[i + 1] - of_x_t * states[i])[:, 0] - of_x0
        assert float(noise.mean()) == pytest.approx(0.0, abs=5 * math.sqrt(betas[i] / 20_000))
        assert float(noise.var() / betas[i]) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("sampler", [DDIM(10), Ancestral(steps=50)], ids=["ddim", "ancestral"])
def test_nothing_is_clipped_without_clip_and_for_points_of_the_plane(sampler, monkeypatch):
    unclipped = type(sampler)(steps=sampler.steps, clip=False)
    expected = torch.tensor(FAR["mean"]).double()
    for sampled, levels in ((unclipped, 256), (sampler, None)):
        mean = law(sampled, GaussianDenoiser(LINEAR, **FAR, levels=levels), monkeypatch)[0]
        torch.testing.assert_close(mean, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", [Ancestral(), DDIM(5, eta=0.5)], ids=["ancestral", "ddim"])
def test_paired_noise_refuses_stochastic_samplers(sampler):
    with pytest.raises(ValueError, match="needs an ODE sampler"):
        sampler(centred(independent=False), 2)


def test_paired_noise_leaves_the_ode_samplers_right(monkeypatch):
    covariance = law(DDIM(50), centred(independent=False), monkeypatch)[1]
    torch.testing.assert_close(covariance.diag(), torch.tensor(GOLDEN["ddim-50"][1]).double(), atol=1e-5, rtol=0)


def test_a_variance_that_was_not_learned_cannot_be_sampled_with():
    with pytest.raises(ValueError, match="has learned no variance"):
        Ancestral("learned")(centred(), 2)


@pytest.mark.parametrize("steps", [0, -3])
def test_a_sampler_takes_at_least_one_step(steps):
    with pytest.raises(ValueError, match="at least 1"):
        DDIM(steps)
