r"""Consistency models with the exact function, on N(mu, Sigma) ``f(x_t, t) = m_min + (C_min C_t^-1)^(1/2) (x_t - m_t)``.

It is a step of Euler's method by an estimate D, and each network is given the output that makes D what f needs. At f the
gradient of consistency training vanishes up to the distance of neighbouring times, and that of distillation up to its third
power.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels
from genzoo.diffusion.noise_levels import LogNormalRatio, UniformTime
from genzoo.diffusion.path import expand
from genzoo.diffusion.preconditioning import precondition
from genzoo.diffusion.samplers import Heun, Jump
from genzoo.diffusion.schedules import CosineSchedule, EDMSchedule, Schedule
from genzoo.diffusion.time_pairs import GridPairs, RatioPairs
from genzoo.families.consistency import HUBER, Consistency
from genzoo.families.ddpm import DDPM
from genzoo.families.flow_matching import FlowMatching
from genzoo.families.score_sde import ScoreSDE
from genzoo.nn.layers import Dropout
from genzoo.nn.mlp import TimeMLP
from genzoo.numerics.random import generator, randn
from tests.exact import MU, SIGMA, GaussianDenoiser, every_schedule, network

S = 0.7
NARROW = EDMSchedule(0.01, 10.0)


def exact_function(denoiser: GaussianDenoiser, x_t: Tensor, t: Tensor) -> Tensor:
    """The consistency function in closed form, (B, D), for times (B,)."""
    schedule, d = denoiser.path.schedule, denoiser
    end, c = schedule.at(torch.tensor(schedule.t_min, dtype=torch.float64)), schedule.at(t)
    alpha, sigma = c.alpha[:, None], c.sigma[:, None]
    gain = ((end.alpha**2 * d.lam + end.sigma**2) / (alpha**2 * d.lam + sigma**2)).sqrt()
    return end.alpha * d.mu + (((x_t - alpha * d.mu) @ d.axes) * gain) @ d.axes.T


def exact_network(denoiser: GaussianDenoiser, gain: Any = 1.0):
    """The network F with which the parameterization gives ``gain`` times the exact function."""
    schedule = denoiser.path.schedule

    def answer(scaled: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        _, _, c_in = precondition(schedule, scaled, t, S)
        x_t = scaled / c_in
        c_skip, c_out, _ = precondition(schedule, x_t, t, S)
        c, end = schedule.at(t), schedule.at(torch.tensor(schedule.t_min, dtype=torch.float64))
        kept = expand(end.sigma / end.alpha * c.alpha / c.sigma, x_t)
        f = gain * exact_function(denoiser, x_t, t) / end.alpha
        x0 = (f - kept * x_t / expand(c.alpha, x_t)) / (1 - kept).clamp(min=1e-12)
        return (x0 - c_skip * x_t) / c_out

    return network(answer)


def exact_model(schedule: Schedule, gain: Any = 1.0, **kwargs) -> tuple[Consistency, GaussianDenoiser]:
    denoiser = GaussianDenoiser(schedule, MU, SIGMA)
    built = exact_network(denoiser, gain)
    return Consistency((3,), network=built, schedule=schedule, sigma_data=S, **kwargs).double(), denoiser


def mlp(*shapes: Any) -> TimeMLP:
    return TimeMLP(*shapes, width=8, depth=1)


def moved(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator("weights"), dtype=torch.float64)
    return model


# The function


@every_schedule
def test_the_exact_estimate_makes_the_exact_function_and_one_step_its_law(schedule):
    model, denoiser = exact_model(schedule)
    t = torch.linspace(0.3, schedule.t_max, 20, dtype=torch.float64)
    x_t = denoiser.path.sample(denoiser.sample(20).x, torch.randn(20, 3, dtype=torch.float64), t)
    torch.testing.assert_close(model.to_data(x_t, t), exact_function(denoiser, x_t, t), rtol=1e-8, atol=1e-8)
    drawn = model.sample(7, rng=generator("noise"))
    noise = schedule.prior_std * randn((7, 3), rng=generator("noise"), dtype=torch.float64)
    last = torch.full((7,), schedule.t_max, dtype=torch.float64)
    torch.testing.assert_close(drawn.x, exact_function(denoiser, noise, last), rtol=1e-8, atol=1e-8)
    assert drawn.nfe == 1 and Jump(3)(model, 2).nfe == 3
    torch.testing.assert_close(model.decode(noise / schedule.prior_std), drawn.x, rtol=1e-12, atol=1e-12)


@every_schedule
def test_at_the_data_it_is_the_identity_to_the_last_bit(schedule):
    model = moved(Consistency((2,), network=mlp, schedule=schedule).double())
    x = 3 * torch.randn(9, 2, dtype=torch.float64)
    assert torch.equal(model.to_data(x, torch.full((9,), schedule.t_min, dtype=torch.float64)), x)
    x = x.float()
    assert torch.equal(model.float().to_data(x, torch.full((9,), schedule.t_min, dtype=torch.float64)), x)


def test_it_is_the_parameterization_of_the_paper_up_to_the_smallest_noise():
    """c_skip = s^2/((sigma - eps)^2 + s^2), c_out = s (sigma - eps)/sqrt(s^2 + sigma^2) (Song et al. 2023, appendix C)."""
    eps, s = 0.002, 0.5
    for output in (0.0, 1.0):
        model = Consistency((1,), network=network(lambda x, t, y, output=output: torch.full_like(x, output))).double()
        t = model.path.schedule.time_of(torch.logspace(-2, 1.9, 30, dtype=torch.float64))
        sigma, x_t = model.path.schedule.ratio(t)[:, None], torch.randn(30, 1, dtype=torch.float64)
        c_skip, c_out = s**2 / ((sigma - eps) ** 2 + s**2), s * (sigma - eps) / (s**2 + sigma**2).sqrt()
        torch.testing.assert_close(model.to_data(x_t, t), c_skip * x_t + output * c_out, rtol=0, atol=3 * eps / s)


# Consistency training


def test_the_loss_and_its_gradient_are_those_of_a_fixed_target():
    """Pseudo-Huber distance over the step of noise, the earlier point as a constant."""
    model = moved(Consistency((2,), network=mlp, schedule=NARROW, noise_levels=UniformTime()).double())
    x = torch.randn(20, 2, dtype=torch.float64)
    loss = model.loss(x, rng=generator("loss"))
    loss.total.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    rng = generator("loss")
    u = UniformTime().sample(20, NARROW, rng, x.device)
    eps = randn(x.shape, rng=rng, dtype=x.dtype)
    grid = torch.linspace(NARROW.t_min, 1, 11, dtype=torch.float64)
    above = torch.searchsorted(grid, u)
    t, s = grid[above], grid[above - 1]
    sigma_t, sigma_s = 10 * t**7, 10 * s**7
    student = model.to_data(x + sigma_t[:, None] * eps, t)
    target = model.to_data(x + sigma_s[:, None] * eps, s).detach()
    squared, c = (student - target).square().sum(1), HUBER * math.sqrt(2)
    expected = (((squared + c**2).sqrt() - c) / (sigma_t - sigma_s)).mean()
    expected.backward()
    assert float(loss.total) == pytest.approx(float(expected), rel=1e-8)
    for own, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-7, atol=1e-9)


def test_the_gradient_vanishes_at_the_exact_function_as_times_approach():
    """Given x_t, the difference to the target is then normal with mean zero. Without the stop-gradient it would not vanish:
    the gradient in the gain would be the loss itself. Its bias is linear in the step, and extrapolated to none."""
    gain, means, errors, losses = nn.Parameter(torch.ones((), dtype=torch.float64)), [], [], []
    for steps in (30, 60):
        model, denoiser = exact_model(
            NARROW, gain, time_pairs=GridPairs(steps, steps), noise_levels=LogNormalRatio(0.0, 0.2)
        )
        slopes = []
        for i in range(80):
            x = denoiser.sample(4000, rng=generator("data", i)).x
            total = model.loss(x, rng=generator("noise", i)).total
            slopes.append(torch.autograd.grad(total, gain)[0])
            losses.append(float(total.detach()))
        g = torch.stack(slopes)
        means.append(float(g.mean()))
        errors.append(float(g.std()) / math.sqrt(len(g)))
    error = 4.5 * math.hypot(errors[0], 2 * errors[1])
    assert abs(2 * means[1] - means[0]) < error < min(losses) / 1.5, (means, error, min(losses))


class Masked(nn.Module):
    """A network that returns its dropout mask."""

    def __init__(self, *shapes: Any):
        super().__init__()
        self.dropout, self.weight, self.seen = Dropout(0.5), nn.Parameter(torch.ones(())), []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        mask = self.dropout(torch.ones_like(x))
        self.seen.append(mask)
        return self.weight * mask


def test_student_and_target_share_dropout():
    model = Consistency((4,), network=Masked).train()
    x = torch.randn(16, 4)
    torch.manual_seed(3)
    model.loss(x, rng=generator(0))
    state = torch.get_rng_state()
    first, second = model.network.seen
    assert torch.equal(first, second) and not torch.equal(first, torch.ones_like(first))
    model.loss(x, rng=generator(0))
    assert not torch.equal(model.network.seen[2], first), "each step draws another mask"
    torch.manual_seed(3)
    model.network(x, x[:, 0])
    assert torch.equal(torch.get_rng_state(), state), "as much randomness as one evaluation"
    model.eval().loss(x, rng=generator(0))
    assert torch.equal(model.network.seen[-1], torch.ones(16, 4))


# Teachers


TEACHERS = {
    "ddpm": functools.partial(DDPM, schedule=CosineSchedule(50), prediction="v"),
    "score_sde": functools.partial(ScoreSDE, schedule=EDMSchedule()),
    "flow_matching": FlowMatching,
}


def finished(name: str, condition: ClassLabels | None = None) -> Any:
    return moved(TEACHERS[name]((2,), condition, network=mlp).double())


@pytest.mark.parametrize("name", TEACHERS)
def test_a_student_begins_as_a_step_of_its_teacher_and_leaves_it_alone(name):
    teacher = finished(name)
    model = Consistency((2,), teacher=teacher, time_pairs=RatioPairs(100)).double()
    before, schedule = copy.deepcopy(teacher.state_dict()), teacher.path.schedule
    t = torch.linspace(0.2, 0.9, 8, dtype=torch.float64)
    x_t = torch.randn(8, 2, dtype=torch.float64)
    first = torch.tensor(schedule.t_min, dtype=torch.float64)
    kept, end = expand(schedule.ratio(first) / schedule.ratio(t), x_t), schedule.at(first)
    step = end.alpha * (kept * x_t / expand(schedule.at(t).alpha, x_t) + (1 - kept) * teacher.denoise(x_t, t))
    torch.testing.assert_close(model.to_data(x_t, t), step, rtol=1e-10, atol=1e-10)
    at_data = torch.full((8,), schedule.t_min, dtype=torch.float64)
    assert torch.equal(model.to_data(x_t, at_data), x_t) or name == "ddpm"
    torch.testing.assert_close(model.to_data(x_t, at_data), x_t, rtol=0, atol=1e-14)

    assert {key.split(".")[0] for key in model.state_dict()} <= {"network", "conditioner", "time_pairs"}
    assert all(p.requires_grad for p in model.parameters())
    twin = copy.deepcopy(model)
    assert twin.teacher is model.teacher
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.loss(torch.randn(10, 2, dtype=torch.float64), rng=generator(0)).total.backward()
    adam.step()
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not torch.equal(model.to_data(x_t, t), twin.to_data(x_t, t))
    torch.testing.assert_close(twin.to_data(x_t, t), step, rtol=1e-10, atol=1e-10)


def exact_teacher(schedule: Schedule) -> tuple[ScoreSDE, GaussianDenoiser]:
    denoiser = GaussianDenoiser(schedule, MU, SIGMA, "eps")
    built = network(lambda x_t, t, y: denoiser.exact("eps", x_t, t))
    return ScoreSDE((3,), network=built, schedule=schedule, sigma_data=None).double(), denoiser


@every_schedule
def test_the_step_of_a_teacher_is_of_second_order(schedule):
    teacher, denoiser = exact_teacher(schedule)
    model = Consistency((3,), teacher=teacher, objective="distillation").double()
    r = torch.tensor(1.5, dtype=torch.float64)
    x_t, errors = torch.randn(6, 3, dtype=torch.float64), []
    t = schedule.time_of(r)
    for step in (0.4, 0.2, 0.1):
        s = schedule.time_of(r - step)
        error = model._taught(x_t, t.expand(6), s.expand(6), None) - denoiser.carry(x_t, float(t), float(s))
        errors.append(float(error.abs().max()))
    assert 6 < errors[0] / errors[1] < 11 and 6 < errors[1] / errors[2] < 10, errors


def test_distillation_of_the_exact_teacher_has_the_exact_function_as_its_minimum():
    teacher, denoiser = exact_teacher(NARROW)
    losses = []
    for gain in (1.0, 1.1):
        model = Consistency(
            (3,), teacher=teacher, objective="distillation", time_pairs=GridPairs(60, 60), noise_levels=UniformTime()
        ).double()

        def estimate(x_t: Tensor, t: Tensor, y: Tensor | None, gain: float = gain) -> Tensor:
            kept = expand(NARROW.ratio(torch.tensor(NARROW.t_min, dtype=torch.float64)) / NARROW.ratio(t), x_t)
            return (gain * exact_function(denoiser, x_t, t) - kept * x_t) / (1 - kept).clamp(min=1e-12)

        model._x0 = estimate  # type: ignore[method-assign]
        losses.append(float(model.loss(denoiser.sample(2000).x, rng=generator(0)).terms["mse"]))
    assert losses[0] < 1e-4 and losses[1] > 5 * losses[0], losses


def test_a_guided_teacher_moves_its_student_away_from_the_null_condition():
    teacher = finished("score_sde", ClassLabels(3))
    x_t, t, y = torch.randn(6, 2, dtype=torch.float64), torch.full((6,), 0.6, dtype=torch.float64), torch.arange(6) % 4
    model = Consistency((2,), ClassLabels(3), teacher=teacher, objective="distillation", guidance=2.5).double()
    c, u = teacher.eps(x_t, t, y), teacher.eps(x_t, t, None)
    torch.testing.assert_close(model._slope(x_t, t, y), u + 2.5 * (c - u), rtol=1e-10, atol=1e-10)
    assert torch.equal(model._slope(x_t, t, y)[3], model._slope(x_t, t, None)[3])  # class 3 is the null value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Consistency((2,), objective="adversarial"), "objective must be"),
        (lambda: Consistency((2,), objective="distillation"), "teacher=run"),
        (lambda: Consistency((2,), guidance=2.0), "objective=distillation"),
        (lambda: Consistency((2,), teacher=finished("ddpm"), objective="distillation", guidance=2.0), "conditional"),
        (lambda: Consistency((2,), sigma_data=0.0), "sigma_data"),
        (lambda: Consistency((3,), teacher=finished("ddpm")), "teacher: models"),
        (lambda: Consistency((2,), ClassLabels(3), teacher=finished("ddpm")), "teacher: models"),
        (lambda: Consistency((2,), teacher=FlowMatching((2,), pairing="optimal_transport")), "coupled"),
        (lambda: Consistency((2,), teacher=Consistency((2,))), "no denoiser"),
    ],
)
def test_what_does_not_fit_together_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_noise_levels_are_log_normal_about_the_published_mean():
    model = Consistency((2,))
    r = model.path.schedule.ratio(
        model.noise_levels.sample(20_000, model.path.schedule, generator("levels"), torch.device("cpu"))
    )
    assert float(r.log().median()) == pytest.approx(-1.1, abs=0.08)


def test_it_takes_no_sampler_of_denoisers():
    with pytest.raises(ValueError, match="choose sampler=jump"):
        Consistency((2,), sampler=Heun(3)).sample(2)


def test_training_finds_the_map_of_a_normal_distribution():
    torch.manual_seed(0)
    model = Consistency(
        (1,),
        network=lambda *shapes: TimeMLP(*shapes, width=32, depth=1),
        schedule=NARROW,
        time_pairs=GridPairs(8, 64, 30_000),
    )
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for i in range(600):
        for group in adam.param_groups:
            group["lr"] = 3e-3 * (1 - i / 600)
        x = 0.8 + 0.4 * torch.randn(256, 1, generator=generator("data", i))
        adam.zero_grad()
        model.loss(x, rng=generator("noise", i)).total.backward()
        adam.step()
        model.after_step({}, 256)
    z = torch.linspace(-1.5, 1.5, 7)[:, None]
    torch.testing.assert_close(model.eval().decode(z), 0.8 + 0.4 * z, rtol=0, atol=0.1)
