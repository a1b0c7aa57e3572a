"""The five kinds of prediction: each is every other, on the open interval exactly and at its ends in the limit.

On Gaussian data the exact prediction of every kind is a closed form (``tests/exact.py``), so that a conversion is right
or wrong and nothing is trained.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from genzoo.diffusion.path import PARAMETERIZATIONS, GaussianPath, Prediction, expand
from genzoo.diffusion.schedules import CondOT, CosineSchedule, LinearSchedule, Schedule
from genzoo.families.ddpm import DDPM
from tests.exact import MU, SIGMA, GaussianDenoiser, exact_network
from tests.exact import every_schedule as every_path

every_pair = pytest.mark.parametrize(
    ("kind", "to"), list(itertools.product(PARAMETERIZATIONS, PARAMETERIZATIONS)), ids=lambda kind: kind
)


def inside(schedule: Schedule) -> tuple[float, float]:
    """Times well inside the open interval."""
    return max(0.02, schedule.t_min), 0.98


def pairs(n: int, schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """Data, noise and times."""
    x, eps = torch.randn(2, n, 3, 4, dtype=torch.float64)
    low, high = inside(schedule)
    return x, eps, low + (high - low) * torch.rand(n, dtype=torch.float64)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance * max(1.0, float(expected.abs().max())), rtol=0)


@every_path
def test_a_point_of_the_path_is_data_and_noise_in_the_shares_of_its_own_time(schedule):
    x, eps, t = pairs(20, schedule)
    x_t = GaussianPath(schedule).sample(x, eps, t)
    for i in range(20):
        c = schedule.at(t[i])
        close(x_t[i], c.alpha * x[i] + c.sigma * eps[i], 1e-14)


@every_path
def test_targets_are_the_textbook_combinations(schedule):
    x, eps, t = pairs(20, schedule)
    path = GaussianPath(schedule)
    c = schedule.at(t)
    alpha, sigma = c.alpha.view(-1, 1, 1), c.sigma.view(-1, 1, 1)
    close(path.target("x0", x, eps, t), x, 1e-14)
    close(path.target("eps", x, eps, t), eps, 1e-14)
    close(path.target("v", x, eps, t), alpha * eps - sigma * x, 1e-14)
    # The gradient of log N(x_t; alpha x, sigma^2 I).
    close(path.target("score", x, eps, t), -(path.sample(x, eps, t) - alpha * x) / sigma**2, 1e-9)
    h = 1e-7
    close(path.target("velocity", x, eps, t), (path.sample(x, eps, t + h) - path.sample(x, eps, t - h)) / (2 * h), 1e-4)


@every_path
@every_pair
def test_every_kind_becomes_every_other_and_comes_back(schedule, kind, to):
    x, eps, t = pairs(200, schedule)
    path = GaussianPath(schedule)
    x_t, there = path.sample(x, eps, t), path.target(kind, x, eps, t)
    converted = path.convert(Prediction(kind, there), x_t, t, to)
    close(converted, path.target(to, x, eps, t), 1e-10)
    close(path.convert(Prediction(to, converted), x_t, t, kind), there, 1e-10)


@every_path
@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_on_gaussian_data_a_denoiser_gives_the_closed_forms_whatever_it_predicts(schedule, kind):
    denoiser = GaussianDenoiser(schedule, MU, SIGMA, kind)
    t = torch.linspace(*inside(schedule), 50).double()
    x_t = 3 * torch.randn(50, 3, dtype=torch.float64)
    close(denoiser.denoise(x_t, t), denoiser.exact("x0", x_t, t), 1e-10)
    close(denoiser.eps(x_t, t), denoiser.exact("eps", x_t, t), 1e-10)
    close(denoiser.velocity(x_t, t), denoiser.exact("velocity", x_t, t), 1e-10)
    close(denoiser.score(x_t, t), denoiser.exact("score", x_t, t), 1e-10)


@every_path
def test_the_score_is_the_gradient_of_the_log_density(schedule):
    """Autograd through torch's own multivariate normal distribution."""
    denoiser = GaussianDenoiser(schedule, MU, SIGMA, "x0")
    t = torch.tensor(0.4).double()
    x_t = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    c = schedule.at(t)
    covariance = c.alpha**2 * denoiser.covariance + c.sigma**2 * torch.eye(3).double()
    normal = torch.distributions.MultivariateNormal(c.alpha * denoiser.mu, covariance)
    (expected,) = torch.autograd.grad(normal.log_prob(x_t).sum(), x_t)
    close(denoiser.score(x_t.detach(), t.expand(7)), expected, 1e-11)


@every_path
def test_the_velocity_transports_the_marginals(schedule):
    """The flow's map from t to s is m_s + sqrt(c_s/c_t) z: its speed at t is the velocity, by finite differences."""
    denoiser = GaussianDenoiser(schedule, [1.0, -1.0], [0.25, 4.0], "eps")
    x_t, h = torch.randn(9, 2, dtype=torch.float64), 1e-6
    t = torch.tensor(0.4005).double()
    now, before, after = (schedule.at(s) for s in (t, t - h, t + h))

    def carried(c) -> Tensor:
        spread = (c.alpha**2 * denoiser.lam + c.sigma**2) / (now.alpha**2 * denoiser.lam + now.sigma**2)
        return c.alpha * denoiser.mu + spread.sqrt() * (x_t - now.alpha * denoiser.mu)

    close(denoiser.velocity(x_t, t.expand(9)), (carried(after) - carried(before)) / (2 * h), 1e-6)


@every_path
@every_pair
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_ends_are_finite_for_any_prediction(schedule, kind, to, end):
    path = GaussianPath(schedule)
    x_t, mean = torch.randn(2, 5, 3, dtype=torch.float64)
    assert path.convert(Prediction(kind, mean), x_t, torch.full((5,), end), to).isfinite().all()
    assert path.convert(Prediction(kind, mean), x_t, torch.tensor(end), to).isfinite().all()


@every_path
@every_pair
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_at_the_ends_a_denoiser_gives_the_limits_of_the_closed_forms(schedule, kind, to, end):
    """Among them score = -Sigma^-1 (x - mu) and eps = 0 at the data, and E[x] = mu where only noise is left."""
    denoiser = GaussianDenoiser(schedule, MU, SIGMA, kind)
    x_t = torch.randn(6, 3, dtype=torch.float64)
    ends = torch.full((6,), end, dtype=torch.float64)
    limit = denoiser.exact(to, x_t, (ends - 1e-9).abs())
    # The answer at the data is that of the nearest time with noise in it, where eps is sigma times the score.
    precision = torch.linalg.inv(denoiser.covariance)
    least = schedule.at(torch.tensor(schedule.t_min))
    least_eps = float(least.sigma * ((x_t - denoiser.mu) @ precision).abs().max())
    # Of a velocity, by what sigma' makes of that, and by what alpha' changes until then.
    change = float((least.d_alpha - schedule.at(torch.tensor(0.0)).d_alpha).abs() * x_t.abs().max())
    at_data = 2 * (least_eps * float(least.d_sigma) + change) if to == "velocity" else 2 * least_eps
    atol = at_data if end == 0 else 1e-3
    torch.testing.assert_close(denoiser.predict_as(to, x_t, ends)[0], limit, atol=atol, rtol=0)
    if end == 0 and to == "score":
        close(limit, -(x_t - denoiser.mu) @ precision, 1e-4)


@pytest.mark.parametrize("other", ["x0", "eps", "v", "velocity"])
def test_paired_noise_has_no_score_but_all_the_rest(other):
    path = GaussianPath(CondOT(), independent=False)
    x, eps, t = pairs(4, CondOT())
    x_t = path.sample(x, eps, t)
    with pytest.raises(ValueError, match="no score"):
        path.convert(Prediction(other, path.target(other, x, eps, t)), x_t, t, "score")
    with pytest.raises(ValueError, match="no score"):
        path.convert(Prediction("score", x), x_t, t, other)
    close(path.convert(Prediction(other, path.target(other, x, eps, t)), x_t, t, "velocity"), eps - x, 1e-12)


def test_a_network_in_float32_is_converted_in_its_own_type():
    path = GaussianPath(LinearSchedule())
    x_t = torch.randn(3, 2)
    assert path.convert(Prediction("eps", x_t), x_t, torch.rand(3).double(), "x0").dtype == torch.float32


def test_a_value_per_sample_spreads_over_the_event():
    assert expand(torch.arange(3).double(), torch.zeros(3, 2, 4, 4)).shape == (3, 1, 1, 1)
    assert expand(torch.tensor(2.0), torch.zeros(3, 2)).shape == ()


@pytest.mark.parametrize("schedule", [LinearSchedule(20), CosineSchedule(100)], ids=["linear", "cosine"])
@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_the_least_loss_of_ddpm_is_the_closed_form(schedule, kind):
    """With the exact network the mean squared error is, per dimension and averaged over the chain's times,
    alpha^2 lambda/c for the noise, sigma^2 lambda/c for the data and lambda/c for v."""
    lam = torch.tensor([1.0, 0.25, 4.0]).double()
    denoiser = GaussianDenoiser(schedule, MU, lam, kind)
    model = DDPM((3,), network=exact_network(denoiser), schedule=schedule, prediction=kind).double()
    x = denoiser.sample(200_000).x
    t = (torch.arange(schedule.num_steps) + 1).double() / schedule.num_steps
    alpha2, sigma2 = (schedule.at(t).alpha ** 2)[:, None], (schedule.at(t).sigma ** 2)[:, None]
    weight = {"eps": alpha2, "x0": sigma2, "v": torch.ones_like(alpha2)}[kind]
    floor = float((weight * lam / (alpha2 * lam + sigma2)).mean())
    assert float(model.loss(x).total) == pytest.approx(floor, rel=0.01)
