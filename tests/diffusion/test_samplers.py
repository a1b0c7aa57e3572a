"""Samplers, exactly: on Gaussian data with the exact denoiser each is an affine map of its noise, whose mean and
covariance are known.

These are compared with golden numbers of a chain of 1000 steps, with the closed form of a DDIM step, with the
recursion of the reverse chain written in respaced betas, with the closed map of the probability-flow ODE, and with each other.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels, Vector
from genzoo.diffusion.denoiser import Denoiser, DenoiserWrapper
from genzoo.diffusion.path import PARAMETERIZATIONS, GaussianPath, Prediction
from genzoo.diffusion.probability_flow import ProbabilityFlowODE
from genzoo.diffusion.samplers import (
    DDIM,
    AdaptiveODE,
    Ancestral,
    DPMSolver,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    PredictorCorrector,
    Sampler,
)
from genzoo.diffusion.samplers.chain import ChainSampler, CountedDenoiser, StepCoefficients
from genzoo.diffusion.samplers.ode import Solver
from genzoo.diffusion.samplers.sampler import initial_state
from genzoo.diffusion.schedules import (
    CondOT,
    CosineSchedule,
    EDMSchedule,
    LinearSchedule,
    Schedule,
    VESchedule,
    VPSchedule,
)
from genzoo.event import EventSpec
from genzoo.families.ddpm import DDPM
from genzoo.numerics.random import generator
from tests.exact import MU, SIGMA, GaussianDenoiser, every_schedule, moments
from tests.exact import SCHEDULES as ALL

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
    mean, covariance = moments(sampler, centred(hop=1 / 1000), monkeypatch)
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
    covariance = moments(Ancestral(variance, steps), centred(hop=1 / steps), monkeypatch)[1]
    # The grid of times is (i T/S + 1)/T: the hop from all but the first is 1/S exactly.
    expected = [chain(lam, steps, 1000, variance) for lam in LAMBDA]
    torch.testing.assert_close(covariance.diag(), torch.tensor(expected).double(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_a_ddim_step_multiplies_the_variance_by_its_closed_form(schedule, kind, monkeypatch):
    denoiser = GaussianDenoiser(schedule, MU, SIGMA, kind)
    mean, covariance = moments(DDIM(20), denoiser, monkeypatch)
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
    mean, covariance = moments(Ancestral("fixedsmall"), denoiser, monkeypatch)
    torch.testing.assert_close(mean, denoiser.mu, atol=1e-3, rtol=0)
    along_axes = torch.tensor([chain(lam, 1000, 1000, "fixedsmall") for lam in denoiser.lam.tolist()]).double()
    torch.testing.assert_close(covariance, denoiser.axes @ along_axes.diag() @ denoiser.axes.T, atol=1e-9, rtol=0)
    torch.testing.assert_close(covariance, denoiser.covariance, atol=0.02, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_ddim_with_eta_one_is_the_ancestral_sampler(schedule, monkeypatch):
    denoiser = GaussianDenoiser(schedule, MU, SIGMA)
    for ddim, ancestral in zip(
        moments(DDIM(25, eta=1.0), denoiser, monkeypatch),
        moments(Ancestral("fixedsmall", steps=25), denoiser, monkeypatch),
        strict=True,
    ):
        torch.testing.assert_close(ddim, ancestral, atol=1e-9, rtol=1e-9)


def test_ddim_draws_more_noise_as_eta_grows_and_none_at_zero(monkeypatch):
    """Data of variance 4 need all the variance that a step can keep: eq. 16 against the recursion of one dimension."""
    for eta in (0.0, 0.3, 1.0):
        got = float(moments(DDIM(10, eta=eta), GaussianDenoiser(LINEAR, [0.0], [4.0]), monkeypatch)[1])
        abar = (LINEAR.at(LINEAR.times(10)).alpha ** 2).tolist()
        v = 1.0
        for now, before in pairwise(abar):
            drawn = eta**2 * (1 - before) / (1 - now) * (1 - now / before)
            c = 4 * now + 1 - now
            of_x0, of_eps = math.sqrt(before), math.sqrt(1 - before - drawn)
            v = (of_x0 * math.sqrt(now) * 4 / c + of_eps * math.sqrt(1 - now) / c) ** 2 * v + drawn
        assert got == pytest.approx(v, abs=1e-10)


@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_what_a_denoiser_predicts_does_not_change_what_is_sampled(kind, monkeypatch):
    for got, expected in zip(
        moments(Ancestral(steps=100), GaussianDenoiser(LINEAR, MU, SIGMA, kind), monkeypatch),
        moments(Ancestral(steps=100), GaussianDenoiser(LINEAR, MU, SIGMA, "eps"), monkeypatch),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


# Evaluations of 7 steps, in the ratio's coordinates and in time.
COSTS = {
    "ancestral": (Ancestral(steps=7), 7, 7),
    "ddim": (DDIM(7, eta=0.5), 7, 7),
    "dpm_solver": (DPMSolver(7), 7, 7),
    "euler_maruyama": (EulerMaruyama(7), 7, 7),
    "predictor": (PredictorCorrector(7, corrector_steps=0), 7, 7),
    "predictor_corrector": (PredictorCorrector(7, corrector_steps=2), 19, 19),
    "euler": (Euler(7), 7, 7),
    "midpoint": (Midpoint(7), 13, 14),
    "heun": (Heun(7), 13, 14),
    "ode": (AdaptiveODE(1e-3, 1e-3), None, None),
}


@pytest.mark.parametrize(("sampler", "in_ratio", "in_time"), COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("evaluations", [1, 2])
def test_nfe_counts_the_evaluations_that_were_made(sampler, in_ratio, in_time, evaluations):
    for schedule, cost in ((LINEAR, in_ratio), (CondOT(), in_time)):
        denoiser = GaussianDenoiser(schedule, MU, SIGMA, "velocity")
        denoiser.evaluations = evaluations
        samples = sampler(denoiser, 3)
        assert samples.nfe == denoiser.calls * evaluations
        assert cost in (denoiser.calls, None)


def test_without_a_number_of_steps_the_whole_chain_is_walked():
    denoiser = centred()
    assert Ancestral()(denoiser, 1).nfe == denoiser.calls == 1000


@pytest.mark.parametrize("sampler", [cost[0] for cost in COSTS.values()], ids=COSTS)
def test_every_question_names_the_classes_of_its_rows(sampler, monkeypatch):
    denoiser = GaussianDenoiser(LINEAR, MU, SIGMA)
    denoiser.condition = ClassLabels(3)
    y, predict = torch.tensor([2, 0, 1]), denoiser.predict

    def predict_for(x_t: Tensor, t: Tensor, labels: Tensor) -> object:
        assert len(labels) == len(x_t) == len(t)
        assert len(x_t) < 3 or torch.equal(labels, y)  # the adaptive solver asks for the rows that have not arrived
        return predict(x_t, t)

    monkeypatch.setattr(denoiser, "predict", predict_for)
    sampler(denoiser, 3, y)


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
    mean, covariance = moments(Ancestral(steps=50), denoiser, monkeypatch)
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
        mean = moments(sampled, GaussianDenoiser(LINEAR, **FAR, levels=levels), monkeypatch)[0]
        torch.testing.assert_close(mean, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "sampler", [Ancestral(), DDIM(5, eta=0.5), EulerMaruyama(), PredictorCorrector()], ids=lambda s: type(s).__name__
)
def test_paired_noise_refuses_stochastic_samplers(sampler):
    denoiser = centred(independent=False)
    with pytest.raises(ValueError, match="needs an ODE sampler"):
        sampler(denoiser, 2)
    assert denoiser.calls == 0


@pytest.mark.parametrize(
    "sampler",
    [DDIM(50), DPMSolver(10), Euler(10), Midpoint(10), Heun(10), AdaptiveODE(1e-3, 1e-3)],
    ids=lambda s: type(s).__name__,
)
def test_paired_noise_leaves_the_ode_samplers_right(sampler):
    paired, independent = (
        sampler(GaussianDenoiser(LINEAR, MU, SIGMA, independent=independent), 4, rng=torch.Generator().manual_seed(1)).x
        for independent in (False, True)
    )
    assert torch.equal(paired, independent)


def test_a_variance_that_was_not_learned_cannot_be_sampled_with():
    with pytest.raises(ValueError, match="has no learned variance"):
        Ancestral("learned")(centred(), 2)


# ---------------------------------------------------------------------------------------------------------------------
# The probability-flow ODE.


def walked(sampler: Sampler, denoiser: GaussianDenoiser, noise: Tensor) -> Tensor:
    """Where a deterministic sampler takes some noise."""
    *_, (x, _) = sampler.iterate(denoiser, noise, None, None)
    return x


def ideal(sampler: Sampler, denoiser: GaussianDenoiser, noise: Tensor) -> Tensor:
    """Where the ODE takes it: the closed map from the time of the sampler's start to that of its stop, then the estimate."""
    schedule = denoiser.path.schedule
    if isinstance(sampler, (Solver, AdaptiveODE)):
        ode = ProbabilityFlowODE(denoiser)
        if ode.in_time:
            return denoiser.carry(noise, 1.0, 0.0)
        first = ode.ends[1] if isinstance(sampler, AdaptiveODE) else min(sampler.ratio_max, ode.ends[1])
        t, s = ode.time_at(first), schedule.t_last
    else:
        t, s = sampler.times(schedule)[[0, -2]].tolist()
    first = schedule.t_max if isinstance(sampler, ChainSampler) and sampler.rho is None and schedule.t_first == 1 else t
    x = denoiser.carry(initial_state(schedule, noise, first), t, s)
    return denoiser.exact("x0", x, torch.tensor([s], dtype=torch.float64))


def spread_out(schedule: Schedule) -> Schedule:
    """The same schedule, whose chains take equal steps in log(sigma/alpha), where DPM-Solver++ is of second order."""
    spread = copy.copy(schedule)
    first, last = min(schedule.t_first, schedule.t_max), schedule.t_last
    ends = schedule.ratio(torch.tensor([first, last], dtype=torch.float64)).clamp(max=80).log10().tolist()

    def times(steps: int) -> Tensor:
        inner = schedule.time_of(torch.logspace(*ends, steps, dtype=torch.float64))
        return torch.cat([inner, torch.zeros(1, dtype=torch.float64)])

    spread.times = times
    return spread


CORNERS = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
ORDERS = {
    "euler": (Euler, 1),
    "midpoint": (Midpoint, 2),
    "heun": (Heun, 2),
    "ddim": (DDIM, 1),
    "dpm_solver": (functools.partial(DPMSolver, rho=None), 2),
    "dpm_solver-rho": (DPMSolver, 2),
}


@every_schedule
@pytest.mark.parametrize(("sampler", "order"), ORDERS.values(), ids=ORDERS)
def test_twice_the_steps_make_the_error_smaller_by_two_to_the_order(sampler, order, schedule):
    chain = isinstance(sampler(2), ChainSampler)
    denoiser = GaussianDenoiser(spread_out(schedule) if chain else schedule, MU, SIGMA, "velocity")
    errors = [
        float((walked(sampler(steps), denoiser, CORNERS) - ideal(sampler(steps), denoiser, CORNERS)).abs().max())
        for steps in (50, 100)
    ]
    measured = math.log2(errors[0] / errors[1])
    assert measured > order - 0.15
    if sampler is not Midpoint:  # whose error on the straight path is of third order by luck
        assert measured < order + 0.25
    assert errors[1] < (0.06 if order == 1 else 3e-3)


def test_dpm_solver_extrapolates_the_data_to_the_middle_of_each_step(monkeypatch):
    """An estimate that is linear in lambda = log(alpha/sigma) is foretold exactly, however uneven the steps are."""
    schedule = VPSchedule()
    denoiser = GaussianDenoiser(schedule, MU, SIGMA)

    def estimate(log_snr: Tensor) -> Tensor:
        return torch.tensor([1.0, -0.5, 0.2]).double() + log_snr[:, None] * torch.tensor([0.1, 0.3, -0.2]).double()

    monkeypatch.setattr(
        denoiser, "predict", lambda x_t, t, y: Prediction("x0", estimate(-schedule.ratio(t).log()).expand_as(x_t))
    )
    states = DPMSolver(8, rho=None, trajectory=True)(denoiser, 2).trajectory
    c = schedule.at(schedule.times(8))
    log_snr = torch.log(c.alpha / c.sigma)
    gaps = log_snr[:-1].diff()
    assert gaps.max() > 3 * gaps.min()
    for i, h in enumerate(gaps):
        middle = log_snr[i] + (h / 2 if i else 0)  # the first step has no step before it
        gain = c.sigma[i + 1] / c.sigma[i], -c.alpha[i + 1] * torch.expm1(-h)
        expected = gain[0] * states[i] + gain[1] * estimate(middle[None])
        torch.testing.assert_close(states[i + 1], expected, atol=1e-10, rtol=1e-10)


@every_schedule
def test_the_adaptive_solver_is_as_good_as_its_tolerance(schedule):
    denoiser = GaussianDenoiser(schedule, MU, SIGMA, "velocity")
    for tolerance in (1e-3, 1e-6):
        sampler = AdaptiveODE(tolerance, tolerance)
        error = (walked(sampler, denoiser, CORNERS) - ideal(sampler, denoiser, CORNERS)).abs().max()
        assert float(error) < 40 * tolerance


# Final variances of Karras et al.'s sampler from N(0, 80^2), for data N(0, lambda), by the number of steps.
KARRAS = {18: [1.09146, 0.27839, 4.29344], 40: [1.01586, 0.25490, 4.04975]}


@pytest.mark.parametrize(("steps", "golden"), KARRAS.items())
def test_heun_on_karras_noise_has_its_golden_variance(steps, golden, monkeypatch):
    covariance = moments(Heun(steps), centred(EDMSchedule()), monkeypatch)[1]
    torch.testing.assert_close(covariance.diag(), torch.tensor(golden).double(), atol=1e-5, rtol=0)


def test_heuns_variance_nears_that_of_the_ode_and_not_of_the_data(monkeypatch):
    """6400 lambda/(lambda + 6400): the noise of 80 that stands for all noise makes the rest of the difference."""
    lam = torch.tensor(LAMBDA).double()
    exact = 6400 * lam / (lam + 6400)
    errors = [
        (moments(Heun(steps), centred(EDMSchedule()), monkeypatch)[1].diag() - exact).abs() for steps in (80, 160, 320)
    ]
    for coarse, fine in pairwise(errors):
        torch.testing.assert_close(torch.log2(coarse / fine), torch.full((3,), 2.0).double(), atol=0.1, rtol=0)
    assert errors[-1].max() < (lam - exact).max()


@pytest.mark.parametrize("name", ["vp", "ve", "cosine"])
def test_an_euler_step_in_the_ratio_is_a_step_of_ddim(name):
    schedule = copy.copy(ALL[name])
    denoiser = GaussianDenoiser(schedule, MU, SIGMA)
    ode, euler = ProbabilityFlowODE(denoiser), Euler(15)
    times = ode.time(torch.tensor(euler.grid(ode), dtype=torch.float64))
    schedule.times, schedule.t_first = (lambda steps: times), float(times[0])
    torch.testing.assert_close(walked(DDIM(15), denoiser, CORNERS), walked(euler, denoiser, CORNERS), atol=1e-7, rtol=0)


def test_steps_are_even_in_time_and_in_the_root_of_the_ratio():
    straight = ProbabilityFlowODE(GaussianDenoiser(CondOT(), MU, SIGMA))
    assert Euler(4).grid(straight) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert Euler(1).grid(straight) == [1.0, 0.0]
    for schedule, first in ((VPSchedule(), 80.0), (VESchedule(), 50.0)):
        ode = ProbabilityFlowODE(GaussianDenoiser(schedule, MU, SIGMA))
        *grid, end = Euler(9, rho=3.0).grid(ode)
        assert end == 0
        assert grid[0] == pytest.approx(first, rel=1e-7)
        assert grid[-1] == pytest.approx(float(schedule.ratio(torch.tensor(schedule.t_last))), rel=1e-6)
        np.testing.assert_allclose(np.diff(np.cbrt(grid), 2), 0, atol=1e-12)
        assert Euler(9, ratio_max=7.0).grid(ode)[0] == pytest.approx(7.0)
        assert Euler(1).grid(ode) == [pytest.approx(first), 0.0]


@pytest.mark.parametrize("sampler", [Euler(6), Heun(6), AdaptiveODE(1e-2, 1e-2)], ids=lambda s: type(s).__name__)
def test_of_an_ode_on_images_the_result_alone_is_clipped(sampler):
    sampler.trajectory = True
    x, _, states = sampler(GaussianDenoiser(VPSchedule(), **FAR, levels=256), 5)
    free, _, unclipped = sampler(GaussianDenoiser(VPSchedule(), **FAR), 5)
    # As the noise is drawn anew, only what does not depend on it is compared.
    assert torch.equal(x[:, :2], torch.tensor([1.0, -1.0]).double().expand(5, 2))
    assert torch.equal(states[-1], x)
    assert torch.equal(unclipped[-1], free)
    assert free[:, 0].min() > 4
    assert states[-2, :, 0].abs().max() > 1
    assert len(states) == (2 if isinstance(sampler, AdaptiveODE) else 7)


# ---------------------------------------------------------------------------------------------------------------------
# Every sampler on every schedule.

STOCHASTIC: dict[str, Callable[[int], Sampler]] = {
    "fixedlarge": lambda n: Ancestral("fixedlarge", n),
    "fixedsmall": lambda n: Ancestral("fixedsmall", n),
    "ddim-1/2": lambda n: DDIM(n, eta=0.5),
    "ddim-1": lambda n: DDIM(n, eta=1.0),
    "euler_maruyama": EulerMaruyama,
    "predictor": lambda n: PredictorCorrector(n, corrector_steps=0),
    "predictor_corrector": PredictorCorrector,
}


def errors(sampler: Sampler, denoiser: GaussianDenoiser, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """How far the mean and the covariance of the samples are from those of the data."""
    mean, covariance = moments(sampler, denoiser, monkeypatch)
    return float((mean - denoiser.mu).abs().max()), float((covariance - denoiser.covariance).abs().max())


@every_schedule
@pytest.mark.parametrize("make", STOCHASTIC.values(), ids=STOCHASTIC)
def test_a_stochastic_sampler_recovers_the_data_and_halves_its_error_with_its_steps(make, schedule, monkeypatch):
    """Of weak order one. The corrector has an error of its own, which the number of steps does not reduce."""
    denoiser = GaussianDenoiser(schedule, MU, SIGMA)
    (_, coarse), (mean, fine) = (errors(make(steps), denoiser, monkeypatch) for steps in (40, 80))
    assert mean < 0.06
    assert fine < 0.25
    if make is not PredictorCorrector:
        # The distributions of the prior and of the data at the first time differ by up to this.
        assert fine < 0.6 * coarse + 1e-3


@every_schedule
@pytest.mark.parametrize("make", [Midpoint, Heun, DPMSolver, DDIM], ids=lambda make: make.__name__)
def test_an_ode_sampler_recovers_the_data_but_for_their_mean_in_the_prior(make, schedule, monkeypatch):
    sampler = make(60)
    mean, covariance = errors(sampler, GaussianDenoiser(schedule, MU, SIGMA, "velocity"), monkeypatch)
    assert covariance < (0.18 if make is DDIM else 0.03)
    # alpha_T mu, as the ODE carries it to the data; nothing where the path ends in noise alone.
    assert mean < (1e-5 if schedule.coordinates == "time" and not issubclass(make, ChainSampler) else 0.06)


# ---------------------------------------------------------------------------------------------------------------------
# Langevin's corrector.


@pytest.mark.parametrize("snr", [0.16, 0.5])
def test_the_corrector_alone_settles_at_its_closed_variance(snr):
    """At one noise level forever: x <- x - e x/c + sqrt(2e) z has the variance 2c^2/(2c - e)."""
    n, denoiser, t = 5_000, centred(VPSchedule()), 0.3
    at_t = denoiser.path.schedule.at(torch.tensor(t).double())
    alpha, sigma = float(at_t.alpha), float(at_t.sigma)
    # Predictor steps that change nothing.
    chain = [StepCoefficients(i, t, t, alpha, sigma, alpha, sigma, 0.0, 0.0, 0.0, 0.0) for i in range(7)]
    sampler, rng = PredictorCorrector(snr=snr, corrector_steps=50), torch.Generator().manual_seed(0)
    x = 3 * torch.ones(n, 3).double()
    denoise = CountedDenoiser(denoiser, None, False, chain, x)
    for c in chain[:-1]:
        x = sampler.step(denoise, x, c, rng)
    size = 2 * (snr * sigma) ** 2
    spread = denoiser.spread(t)
    expected = 2 * spread**2 / (2 * spread - size)
    assert (expected / spread - 1).max() > 0.1 or snr < 0.5  # the bias is large enough to be seen
    error = 5 * math.sqrt(2 / n) + 3 * (1 - size / spread).abs() ** 600
    assert ((x.var(0) / expected - 1).abs() < error).all()


# Where, at what number of evaluations, and with what signal-to-noise ratio.
FAIR = {
    "ve": ("ve", 200, 0.35),
    "ve-short": ("ve", 50, 0.5),
    "edm": ("edm", 200, 0.35),
    "cosine": ("cosine", 200, 0.16),
}


@pytest.mark.parametrize(("name", "evaluations", "snr"), FAIR.values(), ids=FAIR)
def test_a_corrector_lowers_the_error_at_the_same_number_of_evaluations(name, evaluations, snr, monkeypatch):
    """Half as many steps, each corrected once, with a step size fit for the schedule; not so for any: on the VP path
    at 200 evaluations the predictor alone is as good."""
    denoiser = GaussianDenoiser(ALL[name], MU, SIGMA)
    predictor, corrected = PredictorCorrector(evaluations, corrector_steps=0), PredictorCorrector(evaluations // 2, snr)
    alone, both = errors(predictor, denoiser, monkeypatch)[1], errors(corrected, denoiser, monkeypatch)[1]
    assert corrected(denoiser, 1).nfe < predictor(denoiser, 1).nfe == evaluations
    assert both < 0.85 * alone


@pytest.mark.parametrize("norms", ["expected", "sample", "batch"])
def test_a_corrector_recovers_the_data_whatever_norms_it_takes(norms):
    """By draws: with norms of its own a step is no affine map. In 12 dimensions none of them vanishes."""
    A = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    denoiser = GaussianDenoiser(VPSchedule(), [0.5] * 12, A @ A.T / 12 + 0.1 * torch.eye(12))
    x = PredictorCorrector(60, norms=norms)(denoiser, 5000, rng=torch.Generator().manual_seed(0)).x
    assert (x.mean(0) - denoiser.mu).abs().max() < 0.08
    # A step size that depends on the state has a bias of its own.
    bound = 0.15 if norms == "sample" else 0.1
    assert (x.T.cov() - denoiser.covariance).norm() / denoiser.covariance.norm() < bound


def test_the_norms_are_those_of_the_authors():
    """One step by hand, with the batch's means, the row's own, and what they come to."""
    rng = torch.Generator().manual_seed(0)
    z, score = torch.randn(2, 5, 4, generator=rng, dtype=torch.float64)
    z_norm, score_norm = z.norm(dim=1), score.norm(dim=1)
    ratio = {norms: PredictorCorrector(norms=norms)._ratio(z, score, 0.7) for norms in ("expected", "sample", "batch")}
    assert ratio["expected"] == 0.7
    torch.testing.assert_close(ratio["sample"].squeeze(), z_norm / score_norm)
    torch.testing.assert_close(ratio["batch"].squeeze(), z_norm.mean() / score_norm.mean())


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: PredictorCorrector(snr=0.0), "snr must be positive"),
        (lambda: PredictorCorrector(corrector_steps=-1), "and -1"),
        (lambda: PredictorCorrector(norms="mean"), "'mean'"),
        (lambda: Heun(rho=0.5), "rho must be at least 1"),
        (lambda: Heun(ratio_max=0.0), "ratio_max positive"),
        (lambda: AdaptiveODE(rtol=0.0), "must be positive"),
        (lambda: DDIM(eta=1.5), "not 1.5"),
        (lambda: Ancestral("small"), "'small'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, what):
    with pytest.raises(ValueError, match=what):
        make()


@pytest.mark.parametrize("steps", [0, -3])
def test_a_sampler_takes_at_least_one_step(steps):
    with pytest.raises(ValueError, match="at least 1"):
        DDIM(steps)


class Shrinking(Denoiser):
    """Estimates the data as ``w x_t + y``."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.event, self.condition, self.path = EventSpec((2,)), Vector(2), GaussianPath(schedule)
        self.w = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        return Prediction("x0", self.w * x_t + (0 if y is None else y))


EVERY = [Ancestral(steps=4), DDIM(4), DDIM(4, eta=1.0), DPMSolver(4), EulerMaruyama(4), PredictorCorrector(4)]


@pytest.mark.parametrize("schedule", [VPSchedule(), CondOT()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("sampler", [*EVERY, Euler(4), Midpoint(4), Heun(4)], ids=lambda s: type(s).__name__)
def test_the_gradient_of_samples_is_the_quotient_of_their_differences(sampler, schedule):
    denoiser, y = Shrinking(schedule), torch.randn(3, 2, generator=generator("y"), dtype=torch.float64)

    def total(y: Tensor, shift: float = 0.0) -> Tensor:
        moved = copy.deepcopy(denoiser) if shift else denoiser
        moved.w.data += shift
        return sampler(moved, 3, y, rng=generator("gradient")).x.sum()

    y.requires_grad_()
    of_w, of_y = torch.autograd.grad(total(y), [denoiser.w, y])
    with torch.no_grad():
        quotient = (total(y, 1e-6) - total(y, -1e-6)) / 2e-6
        along = (total(y + 1e-6) - total(y - 1e-6)) / 2e-6
    torch.testing.assert_close(of_w, quotient, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_y.sum(), along, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [VPSchedule(), CondOT()], ids=lambda s: type(s).__name__)
def test_the_adaptive_solver_has_no_gradient_rather_than_one_of_its_last_step(schedule):
    assert not AdaptiveODE(1e-2, 1e-2)(Shrinking(schedule), 3).x.requires_grad


@pytest.mark.parametrize("sampler", [DDIM(3), Heun(3), AdaptiveODE(1e-2, 1e-2)], ids=lambda s: type(s).__name__)
def test_a_denoiser_needs_no_weights(sampler):
    class Halved(Denoiser):
        event, condition = EventSpec((2,)), None

        def __init__(self, counts: bool):
            super().__init__()
            self.path = GaussianPath(VPSchedule())
            if counts:
                self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

        def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
            return Prediction("x0", 0.5 * x_t)

    for denoiser in (Halved(False), Halved(True)):
        x = sampler(denoiser, 3).x
        assert x.shape == (3, 2) and x.dtype == torch.get_default_dtype() and bool(x.isfinite().all())


class Wrapped(DenoiserWrapper):
    """The denoiser as it is."""

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        return self.denoiser.predict(x_t, t, y)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapped], ids=["model", "wrapped"])
def test_a_sampler_refuses_conditions_that_are_not_the_denoisers(wrap):
    conditional, unconditional = wrap(DDPM((2,), ClassLabels(3)).eval()), wrap(DDPM((2,)).eval())
    for y, message in (
        (torch.tensor([0, 1, 4]), "0..2"),
        (torch.tensor([0, 1]), r"\(3,\)"),
        (torch.rand(3), "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            DDIM(3)(conditional, 3, y)
    with pytest.raises(ValueError, match="unconditional"):
        DDIM(3)(unconditional, 3, torch.tensor([0, 1, 2]))
    assert DDIM(3)(conditional, 3, torch.tensor([0, 3, 2])).x.shape == (3, 2)  # 3 is the null value
