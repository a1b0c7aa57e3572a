"""Samplers, paths and solvers against libraries written by others: diffusers, torchcfm and torchdiffeq.

The network is a fixed nonlinear function and the noise is the same, so that every step must agree and not the law alone.
Tables of diffusers are in float32: they are overwritten with ours, and what is left is the rounding of its steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from genzoo.diffusion.ode_solvers import dopri5
from genzoo.diffusion.path import GaussianPath
from genzoo.diffusion.probability_flow import ProbabilityFlowODE
from genzoo.diffusion.samplers import DDIM, AdaptiveODE, Ancestral, DPMSolver, Euler, Heun
from genzoo.diffusion.schedules import CondOT, CosineSchedule, LinearSchedule, VariancePreserving
from genzoo.event import EventSpec
from genzoo.families.ddpm import DDPM
from genzoo.families.flow_matching import minibatch_ot
from genzoo.families.score_sde import ScoreSDE
from tests.exact import network, set_randn

T = 1000
SCHEDULES = {"linear": LinearSchedule(T), "cosine": CosineSchedule(T)}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
SHAPE = (2, 3, 3)


def answer(x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """A network that is trained on nothing: it looks at its neighbours and at the time."""
    t = t.to(x_t).view(-1, 1, 1, 1)
    return torch.tanh(x_t + 0.5 * x_t.roll(1, -1)) * (0.5 + t) + 0.1 * torch.cos(7 * t)


def learned(x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """The same with a second half for the variance."""
    return torch.cat([answer(x_t, t), torch.sin(2 * x_t)], dim=1)


def model(schedule, prediction="eps", variance="fixedlarge") -> DDPM:
    return DDPM(
        SHAPE,
        network=network(learned if variance == "learned" else answer),
        schedule=schedule,
        prediction=prediction,
        variance=variance,
        objective="hybrid" if variance == "learned" else "simple",
    ).double()


def scheduler(name: str, schedule, **kwargs):
    """Build a scheduler of diffusers with our tables."""
    diffusers = pytest.importorskip("diffusers")
    made = getattr(diffusers, name)(num_train_timesteps=T, trained_betas=schedule.betas.tolist(), **kwargs)
    made.betas = schedule.betas
    made.alphas = 1 - schedule.betas
    made.alphas_cumprod = made.alphas.cumprod(0)
    made.one = torch.tensor(1.0, dtype=torch.float64)
    return made


@pytest.fixture
def noise(monkeypatch) -> Iterator[list[Tensor]]:
    """One list of draws for both sides: the first is where the walk begins."""
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randn(4, *SHAPE, generator=rng, dtype=torch.float64) for _ in range(60)]
    ours, theirs = iter(drawn), iter(drawn[1:])
    set_randn(monkeypatch, lambda *_, **__: next(ours))
    for module in ("scheduling_ddpm", "scheduling_ddim"):
        path = f"diffusers.schedulers.{module}.randn_tensor"
        pytest.importorskip("diffusers")
        monkeypatch.setattr(path, lambda *_, **__: next(theirs))
    yield drawn


def walk(made, denoiser: DDPM, x: Tensor, **step) -> list[Tensor]:
    """States of a scheduler of diffusers that walks down the chain's indices."""
    states = [x]
    for index in made.timesteps:
        t = torch.full((len(x),), (int(index) + 1) / T, dtype=torch.float64)
        x = made.step(denoiser.network(x, t, None), index, x, **step).prev_sample
        states.append(x)
    return states


def agree(ours: Tensor, theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.double(), rtol=1e-5, atol=1e-5 * float(mine.abs().max()))


PARAMETERIZATIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
every_kind = pytest.mark.parametrize("kind", PARAMETERIZATIONS)
VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small", "learned": "learned_range"}


@every_schedule
@every_kind
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [10, 50])
def test_ancestral_steps(schedule, kind, variance, steps, noise):
    made = scheduler(
        "DDPMScheduler",
        schedule,
        clip_sample=False,
        prediction_type=PARAMETERIZATIONS[kind],
        variance_type=VARIANCES[variance],
    )
    made.set_timesteps(steps)
    denoiser = model(schedule, kind, variance)
    ours = Ancestral(variance, steps, trajectory=True)(denoiser, 4).trajectory
    agree(ours, walk(made, denoiser, noise[0]))


@every_schedule
@every_kind
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps(schedule, kind, eta, noise):
    made = scheduler("DDIMScheduler", schedule, clip_sample=False, prediction_type=PARAMETERIZATIONS[kind])
    made.final_alpha_cumprod = made.one
    made.set_timesteps(25)
    ours = DDIM(25, eta, trajectory=True)(model(schedule, kind), 4).trajectory
    agree(ours, walk(made, model(schedule, kind), noise[0], eta=eta))


def test_clipped_steps(noise):
    """On images both clip the data and recompute the noise; levels mark the data as images on our side."""
    schedule = SCHEDULES["linear"]
    denoiser = model(schedule)
    denoiser.event = EventSpec(SHAPE, 256)
    made = scheduler("DDIMScheduler", schedule, clip_sample=True)
    made.final_alpha_cumprod = made.one
    made.set_timesteps(25)
    ours = DDIM(25, trajectory=True)(denoiser, 4).trajectory
    agree(ours, walk(made, denoiser, noise[0], use_clipped_model_output=True))
    assert ours[-1].abs().max() == 1


@every_schedule
@pytest.mark.parametrize("steps", [8, 20])
def test_dpm_solver_steps(schedule, steps, noise):
    made = scheduler("DPMSolverMultistepScheduler", schedule, algorithm_type="dpmsolver++", solver_order=2)
    times = schedule.times(steps)
    made.set_timesteps(timesteps=[round(float(t) * T) - 1 for t in times[:-1]])
    made.sigmas = schedule.ratio(times)
    ours = DPMSolver(steps, rho=None, trajectory=True)(model(schedule), 4).trajectory
    agree(ours, walk(made, model(schedule), noise[0]))


@pytest.mark.parametrize(("sampler", "name"), [(Euler, "EulerDiscreteScheduler"), (Heun, "HeunDiscreteScheduler")])
def test_steps_of_solvers(sampler, name, noise):
    """Theirs hold z = x/alpha and the ratio; Heun's list every ratio but the first and the last twice."""
    schedule, steps = SCHEDULES["linear"], 12
    denoiser = model(schedule)
    ours = sampler(steps, trajectory=True)
    ode = ProbabilityFlowODE(denoiser)
    grid = ours.grid(ode)
    scales = torch.tensor(ode.scales(grid), dtype=torch.float64)
    made = scheduler(name, schedule)
    made.set_timesteps(steps)
    ratios = [grid[0], *(r for r in grid[1:-1] for _ in range(2)), 0.0] if sampler is Heun else grid
    made.sigmas = torch.tensor(ratios, dtype=torch.float64)
    made.timesteps = torch.arange(len(ratios) - 1).double()
    made.set_begin_index(0)
    states = ours(denoiser, 4).trajectory
    z = states[0] / scales[0]
    theirs = [z]
    for i, ratio in enumerate(ratios[:-1]):
        t = schedule.time_of(torch.tensor(ratio, dtype=torch.float64)).expand(4)
        output = answer(made.scale_model_input(z, made.timesteps[i]).double(), t)
        z = made.step(output, made.timesteps[i], z).prev_sample.double()
        if sampler is Euler or i % 2 or ratios[i + 1] == 0:
            theirs.append(z)
    agree(states / scales.view(-1, 1, 1, 1, 1), theirs)


# Paths


class Trigonometric(VariancePreserving):
    """alpha = cos(pi t/2), sigma = sin(pi t/2)."""

    def log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = math.pi / 2 * t
        return angle.cos().log(), -math.pi / 2 * angle.tan()

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        return log_alpha.exp().acos() * 2 / math.pi


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("ConditionalFlowMatcher", CondOT()), ("VariancePreservingConditionalFlowMatcher", Trigonometric())],
)
def test_paths_of_torchcfm_run_the_other_way(name, schedule):
    """Their clock begins at the noise: t -> 1 - t, and a velocity changes its sign."""
    matching = pytest.importorskip("torchcfm.conditional_flow_matching")
    matcher, path = getattr(matching, name)(sigma=0.0), GaussianPath(schedule)
    x, eps = torch.randn(2, 50, *SHAPE, dtype=torch.float64)
    t = 0.01 + 0.98 * torch.rand(50, dtype=torch.float64)
    _, x_t, u_t = matcher.sample_location_and_conditional_flow(eps, x, 1 - t)
    torch.testing.assert_close(path.sample(x, eps, t), x_t, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(path.target("velocity", x, eps, t), -u_t, atol=1e-7, rtol=1e-7)


def test_transport_finds_the_plan_of_torchcfm():
    planner = pytest.importorskip("torchcfm.optimal_transport").OTPlanSampler("exact")
    x, eps = torch.randn(2, 64, *SHAPE, dtype=torch.float64)
    plan = torch.as_tensor(planner.get_map(eps, x)) * 64  # rows: noise, columns: data
    assert torch.allclose(plan.max(0).values, torch.ones(64).to(plan))
    torch.testing.assert_close(minibatch_ot(x, eps), eps[plan.argmax(0)])


# The adaptive solver


def test_dopri5_is_torchdiffeqs():
    """To a tolerance of 1e-9 on a driven, damped pendulum; one sample at a time, as theirs takes one step for all."""
    odeint = pytest.importorskip("torchdiffeq").odeint

    def field(u: Tensor, z: Tensor) -> Tensor:
        angle, speed = z.unbind(-1)
        return torch.stack([speed, torch.cos(2 * u) - 0.1 * speed - 4 * torch.sin(angle)], dim=-1)

    z = torch.randn(5, 2, dtype=torch.float64)
    ours, _ = dopri5(lambda u, z, rows: field(u, z), 0.0, 4.0, z, rtol=1e-9, atol=1e-9)
    times = torch.tensor([0.0, 4.0], dtype=torch.float64)
    theirs = torch.stack([odeint(field, row, times, method="dopri5", rtol=1e-9, atol=1e-9)[-1] for row in z])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_densities_and_samples_are_those_of_a_solve_by_torchdiffeq():
    """The ODE in the ratio and its exact divergence, written down anew and solved by the other library."""
    odeint = pytest.importorskip("torchdiffeq").odeint
    flow = ScoreSDE(
        (2,), network=network(lambda x, t, y: torch.tanh(x.flip(1)) * t.to(x)[:, None] + 0.3 * x), tolerance=1e-7
    ).double()
    schedule = flow.path.schedule
    start, stop = (
        float(schedule.ratio(torch.tensor(t, dtype=torch.float64))) for t in (schedule.t_min, schedule.t_max)
    )

    def slope(r: Tensor, z: Tensor) -> Tensor:
        t = schedule.time_of(r.double()).expand(1)
        alpha, sigma, _, _ = schedule.at(t)
        return (alpha * z - alpha * flow.predict((alpha * z)[None], t).mean[0]) / sigma

    def field(r: Tensor, state: Tensor) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(lambda z: slope(r, z), state[:2])
        return torch.cat([slope(r, state[:2]), jacobian.trace()[None]])

    x = torch.randn(2, 2, dtype=torch.float64)
    alpha = schedule.at(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).alpha
    span = torch.tensor([start, stop], dtype=torch.float64)
    with torch.no_grad():
        values = flow.log_prob(x, num_samples=2).value
        for row, value, latent in zip(x, values, flow.encode(x), strict=True):
            state = torch.cat([row / alpha[0], torch.zeros(1).double()])
            end = odeint(field, state, span, method="dopri5", rtol=1e-8, atol=1e-8)[-1]
            z = alpha[1] * end[:2]
            volume = end[2] + 2 * torch.log(alpha[1] / alpha[0])
            torch.testing.assert_close(latent, z, atol=1e-5, rtol=0)
            expected = -0.5 * (z**2 + math.log(2 * math.pi)).sum() + volume
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)


def test_samples_of_the_adaptive_solver_are_torchdiffeqs(monkeypatch):
    odeint = pytest.importorskip("torchdiffeq").odeint
    schedule, start = CondOT(), torch.randn(3, 2, dtype=torch.float64)
    flow = ScoreSDE((2,), network=network(lambda x, t, y: torch.sin(2 * x.flip(1))), schedule=schedule).double()
    set_randn(monkeypatch, lambda *_, **__: start)
    ours = AdaptiveODE(1e-8, 1e-8)(flow, 3).x

    def field(t: Tensor, x: Tensor) -> Tensor:
        return flow.velocity(x[None], t.expand(1))[0]

    times = torch.tensor([1.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        theirs = torch.stack([odeint(field, x, times, method="dopri5", rtol=1e-8, atol=1e-8)[-1] for x in start])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
