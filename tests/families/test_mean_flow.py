r"""MeanFlow with the exact average velocity.

On N(mu, Sigma) the flow map is ``X(x_t, t, r) = m_r + (C_r C_t^-1)^(1/2) (x_t - m_t)``, so that
``u(x_t, r, t) = (x_t - X(x_t, t, r))/(t - r)``, one step is ``mu + Sigma^(1/2) eps``, and the MeanFlow identity holds.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Joint, Vector
from genzoo.diffusion.guidance import ClassifierFreeGuidance, guide
from genzoo.diffusion.samplers import Heun, Jump
from genzoo.diffusion.schedules import CondOT
from genzoo.families.flow_matching import FlowMatching
from genzoo.families.mean_flow import TIME_SCALE, MeanFlow
from genzoo.nn.mlp import TimeMLP
from genzoo.numerics.random import generator, randn
from tests.exact import MU, SIGMA, GaussianDenoiser, network


class GaussianAverage:
    """The exact average velocity of N(mu, Sigma), of any pair of times r <= t, differentiable in all of them."""

    def __init__(self, mean=MU, covariance=SIGMA):
        self.denoiser = GaussianDenoiser(CondOT(), mean, covariance)

    def map(self, x_t: Tensor, r: Tensor, t: Tensor) -> Tensor:
        d = self.denoiser
        alpha_r, alpha_t, sigma_r, sigma_t = (1 - r)[:, None], (1 - t)[:, None], r[:, None], t[:, None]
        gain = ((alpha_r**2 * d.lam + sigma_r**2) / (alpha_t**2 * d.lam + sigma_t**2)).sqrt()
        return alpha_r * d.mu + (((x_t - alpha_t * d.mu) @ d.axes) * gain) @ d.axes.T

    def __call__(self, x_t: Tensor, r: Tensor, t: Tensor) -> Tensor:
        apart = (t - r).abs() > 1e-9
        if not bool(apart.any()):
            return self.denoiser.exact("velocity", x_t, t)
        average = (x_t - self.map(x_t, r, t)) / torch.where(apart, t - r, 1.0)[:, None]
        return torch.where(apart[:, None], average, self.denoiser.exact("velocity", x_t, t))

    def network(self, gain=1.0):
        """Build the network of a perfectly trained model, or ``gain`` times it."""

        def answer(x_t: Tensor, scaled: Tensor, duration: Tensor) -> Tensor:
            t = scaled / TIME_SCALE
            return gain * self(x_t, t - duration[:, 0].double(), t)

        return network(answer)


def exact_model(gain=1.0, **kwargs) -> MeanFlow:
    return MeanFlow((3,), network=GaussianAverage().network(gain), tolerance=1e-7, **kwargs).double()


def random_times(n: int, count: int, name: str = "times") -> Tensor:
    return torch.rand(n, count, generator=generator(name), dtype=torch.float64).sort(1).values.unbind(1)


def mlp(**kwargs) -> MeanFlow:
    """A model with a small random network, of which no weight is zero."""
    model = MeanFlow((2,), network=lambda *shapes: TimeMLP(*shapes, width=8, depth=1), **kwargs).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator("weights"), dtype=torch.float64)
    return model


# The map


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_steps_of_the_exact_field_are_the_mean_and_a_root_of_the_covariance(steps):
    model, average = exact_model(sampler=Jump(steps)), GaussianAverage()
    drawn = model.sample(50, rng=generator("noise"))
    eps = randn((50, 3), rng=generator("noise"), dtype=torch.float64)
    d = average.denoiser
    expected = d.mu + ((eps @ d.axes) * d.lam.sqrt()) @ d.axes.T
    torch.testing.assert_close(drawn.x, expected, rtol=0, atol=1e-10)
    assert drawn.nfe == steps


def test_velocities_average_along_a_trajectory():
    """(t - r) u(x_t, r, t) = (t - s) u(x_t, s, t) + (s - r) u(x_s, r, s)."""
    model = exact_model()
    r, s, t = random_times(40, 3)
    x_t = torch.randn(40, 3, dtype=torch.float64)
    x_s = model.jump(x_t, t, s)
    torch.testing.assert_close(model.jump(x_s, s, r), model.jump(x_t, t, r), rtol=0, atol=1e-10)
    whole, late, early = (
        model.average_velocity(x, a, b) * (b - a)[:, None] for x, a, b in ((x_t, r, t), (x_t, s, t), (x_s, r, s))
    )
    torch.testing.assert_close(whole, late + early, rtol=0, atol=1e-10)


def test_over_no_interval_it_is_the_velocity_of_flow_matching():
    model, denoiser = exact_model(), GaussianAverage().denoiser
    x_t, t = torch.randn(20, 3, dtype=torch.float64), torch.linspace(0, 1, 20, dtype=torch.float64)
    torch.testing.assert_close(model.velocity(x_t, t), denoiser.exact("velocity", x_t, t), rtol=0, atol=1e-9)
    drawn = Heun(steps=400)(model, 4, rng=generator("noise")).x
    torch.testing.assert_close(drawn, model.sample(4, rng=generator("noise")).x, rtol=0, atol=1e-4)


def test_the_density_is_that_of_the_ode():
    model, denoiser = exact_model(), GaussianAverage().denoiser
    x = denoiser.sample(6).x
    normal = torch.distributions.MultivariateNormal(denoiser.mu, denoiser.covariance)
    torch.testing.assert_close(model.log_prob(x, num_samples=3).value, normal.log_prob(x), rtol=0, atol=1e-4)


# The loss


def test_the_exact_field_satisfies_the_identity():
    model, average = exact_model(), GaussianAverage()
    r, t = random_times(60, 2)
    x_t = 2 * torch.randn(60, 3, dtype=torch.float64)
    v = average.denoiser.exact("velocity", x_t, t)
    u, du_dt = model._along_trajectory(x_t, r, t, None, v)
    torch.testing.assert_close(u, v - (t - r)[:, None] * du_dt, rtol=0, atol=1e-8)


def finite_difference(model: MeanFlow, x_t: Tensor, r: Tensor, t: Tensor, y, v: Tensor, h: float = 1e-5) -> Tensor:
    ahead, behind = (model.average_velocity(x_t + k * h * v, r, t + k * h, y) for k in (1, -1))
    return ((ahead - behind) / (2 * h)).detach()


@pytest.mark.parametrize("condition", [None, ClassLabels(3), Vector(2)])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_gradient_is_that_of_a_weighted_regression_on_a_fixed_target(condition, power):
    """With the derivative by central differences, and the weight (e + c)^-p as a constant (Geng et al. 2025, eq. 22)."""
    model = mlp(condition=condition, power=power, ratio=0.7, condition_dropout=0.0)
    x = torch.randn(30, 2, dtype=torch.float64)
    y = None if condition is None else torch.arange(30) % 3
    y = torch.randn(30, 2, dtype=torch.float64) if isinstance(condition, Vector) else y
    model.loss(x, y, rng=generator("loss")).total.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    rng = generator("loss")
    y = model.conditioner.drop(y, rng)
    r, t = model._times(30, rng, x.device)
    eps = randn(x.shape, rng=rng, dtype=x.dtype)
    x_t, v = model.path.sample(x, eps, t), eps - x
    target = v - (t - r)[:, None] * finite_difference(model, x_t, r, t, y, v)
    error = (model.average_velocity(x_t, r, t, y) - target).square().sum(1)
    ((error.detach() + model.offset) ** -power * error).mean().backward()
    for own, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-5, atol=1e-8)


def test_the_gradient_vanishes_at_the_exact_field():
    """The identity is linear in the velocity, so that its conditional samples have the marginal field as their mean."""
    gain = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model = MeanFlow((3,), network=GaussianAverage().network(gain), power=0.0, ratio=1.0).double()
    n = 2000
    gradients = []
    for i in range(60):
        x = model_data(n, i)
        (gradient,) = torch.autograd.grad(model.loss(x, rng=generator("batch", i)).total, gain)
        gradients.append(gradient)
    g = torch.stack(gradients)
    assert bool((g.mean(0).abs() < 4.5 * g.std(0) / math.sqrt(len(g))).all()), (g.mean(0), g.std(0))
    with torch.no_grad():
        gain += 0.2  # and leads back from another one
    worse = torch.stack(
        [torch.autograd.grad(model.loss(model_data(n, i), rng=generator(i)).total, gain)[0] for i in range(8)]
    )
    assert bool((worse.mean(0) > 0).all())


def model_data(n: int, i: int) -> Tensor:
    return GaussianAverage().denoiser.sample(n, rng=generator("data", i)).x


def test_the_loss_of_equal_times_is_that_of_flow_matching():
    model = mlp(ratio=0.0, power=0.0, offset=1e-3)
    x = torch.randn(50, 2, dtype=torch.float64)
    loss = model.loss(x, rng=generator("equal"))
    rng = generator("equal")
    _, t = model._times(50, rng, x.device)
    eps = randn(x.shape, rng=rng, dtype=x.dtype)
    flow = FlowMatching((2,), network=network(lambda x_t, t, y: model.predict(x_t, t).mean)).double()
    x_t = flow.path.sample(x, eps, t)
    mse = (flow.velocity(x_t, t) - flow.path.target("velocity", x, eps, t)).square().mean()
    assert float(loss.total) == pytest.approx(2 * float(mse) + 1e-3, rel=1e-10)
    assert float(loss.terms["mse"]) == pytest.approx(float(mse), rel=1e-10)


def test_times_are_ordered_and_apart_as_often_as_asked():
    n = 40_000
    for ratio in (0.0, 0.25, 1.0):
        r, t = MeanFlow((2,), ratio=ratio)._times(n, generator("times"), torch.device("cpu"))
        assert bool((r >= 0).all() and (r <= t).all() and (t <= 1).all())
        share = float((r < t).double().mean())
        assert abs(share - ratio) <= 4 * math.sqrt(ratio * (1 - ratio) / n)


# Guidance


@pytest.mark.parametrize("mixture", [0.0, 0.6])
def test_guidance_in_training_has_the_guided_velocity_as_its_fixed_point(mixture):
    """Where u_c is the guided field of s = 2.5 and u_0 that of all data, the target with the exact v_c is u_c."""
    of_class, of_all = GaussianAverage([1.0, -1.0], [0.3, 0.3]), GaussianAverage([0.0, 0.0], [1.5, 1.5])
    s = 2.5

    def answer(x_t: Tensor, scaled: Tensor, packed: Tensor) -> Tensor:
        t = scaled / TIME_SCALE
        c, u = (one.denoiser.exact("velocity", x_t, t) for one in (of_class, of_all))
        return torch.where(packed[:, 1:] < 2, u + s * (c - u), u)

    model = MeanFlow((2,), ClassLabels(2), network=network(answer), guidance=s, mixture=mixture).double()
    x_t, t, y = (
        torch.randn(12, 2, dtype=torch.float64),
        torch.linspace(0.05, 0.95, 12, dtype=torch.float64),
        torch.arange(12) % 3,
    )
    v = torch.where(
        (y < 2)[:, None], of_class.denoiser.exact("velocity", x_t, t), of_all.denoiser.exact("velocity", x_t, t)
    )
    torch.testing.assert_close(model._guided(v, x_t, t, y), model.average_velocity(x_t, t, t, y), rtol=0, atol=1e-12)


def test_guidance_changes_the_loss_of_known_conditions_alone():
    plain, guided = (mlp(condition=ClassLabels(3), guidance=g, condition_dropout=0.5) for g in (1.0, 3.0))
    guided.load_state_dict(plain.state_dict())
    x, y = torch.randn(8, 2, dtype=torch.float64), torch.arange(8) % 3
    t = torch.full((8,), 0.5, dtype=torch.float64)
    assert torch.equal(guided._guided(x, x, t, torch.full((8,), 3)), x)
    assert float((guided._guided(x, x, t, y) - x).abs().min()) > 1e-6
    assert torch.equal(plain._guided(x, x, t, y), x)
    assert float(guided.loss(x, y, rng=generator(0)).total) != float(plain.loss(x, y, rng=generator(0)).total)


def test_guidance_of_samples_is_refused_in_few_steps_and_exact_along_the_ode():
    model = mlp(condition=ClassLabels(3))

    def scale(denoiser):
        return ClassifierFreeGuidance(denoiser, 2.0)

    with pytest.raises(ValueError, match=r"sampler=heun.*model\.guidance"):
        guide(model, scale)
    model.sampler = Heun(steps=3)
    y = torch.arange(6) % 3
    guided = guide(model, scale).sample(6, y, rng=generator(0))
    assert guided.nfe == 12 and bool(guided.x.isfinite().all())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"guidance": 2.0}, "conditional"),
        ({"guidance": 2.0, "condition": ClassLabels(3), "condition_dropout": 0.0}, "dropped"),
        ({"ratio": 1.5}, "ratio"),
        ({"mixture": 1.0}, "mixture"),
        ({"power": -1.0}, "power"),
        ({"offset": 0.0}, "offset"),
    ],
)
def test_values_outside_their_domain_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MeanFlow((2,), **kwargs)


def test_the_network_is_given_the_duration_and_the_condition():
    seen = []

    def watch(x_t: Tensor, t: Tensor, packed: Tensor) -> Tensor:
        seen.append((t, packed))
        return torch.zeros_like(x_t)

    model = MeanFlow((2,), ClassLabels(3), network=network(watch)).double()
    assert model.conditions == Joint((Vector(1), ClassLabels(3)), fixed=1)
    r, t = torch.tensor([0.1, 0.5], dtype=torch.float64), torch.tensor([0.7, 0.5], dtype=torch.float64)
    model.average_velocity(torch.zeros(2, 2).double(), r, t, torch.tensor([2, 0]))
    model.average_velocity(torch.zeros(2, 2).double(), r, t)
    torch.testing.assert_close(seen[0][0] / TIME_SCALE, t)
    torch.testing.assert_close(seen[0][1], torch.tensor([[0.6, 2.0], [0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(seen[1][1], torch.tensor([[0.6, 3.0], [0.0, 3.0]], dtype=torch.float64))


def test_training_finds_the_map_of_a_normal_distribution():
    torch.manual_seed(0)
    model = MeanFlow((1,), network=lambda *shapes: TimeMLP(*shapes, width=32, depth=1), ratio=0.75, power=0.5)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for i in range(400):
        for group in adam.param_groups:
            group["lr"] = 1e-2 * (1 - i / 400)
        x = 0.8 + 0.4 * torch.randn(256, 1, generator=generator("data", i))
        adam.zero_grad()
        model.loss(x, rng=generator("noise", i)).total.backward()
        adam.step()
    eps = torch.linspace(-1.5, 1.5, 7)[:, None]
    one = model.eval().to_data(eps, torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(one, 0.8 + 0.4 * eps, rtol=0, atol=0.25)  # 1.7 before
