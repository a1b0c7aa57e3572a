r"""Score-based models with the exact network: the loss has a closed floor, and the density, the latents and the scores too.

On N(mu, Sigma) with eigenvalues lambda, ``c = alpha^2 lambda + sigma^2`` and ``q^2 = alpha^2 s^2 + sigma^2``, the least mean
squared error is, per dimension and averaged over the law of training times,

    plain              alpha^2 lambda/c                  (of the noise)
    preconditioned     lambda q^2/(s^2 c)                (that of the data, sigma^2 lambda/c, over c_out^2)
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.diffusion.noise_levels import LogNormalRatio, UniformTime
from genzoo.diffusion.path import PARAMETERIZATIONS, expand
from genzoo.diffusion.samplers import EulerMaruyama, Heun
from genzoo.diffusion.schedules import EDMSchedule, Schedule, VPSchedule
from genzoo.families.score_sde import ScoreSDE
from genzoo.numerics.random import generator
from tests.exact import MU, SCHEDULES, SIGMA, GaussianDenoiser, every_schedule, network

LAM = [1.0, 0.25, 4.0]
S = 0.7
either = pytest.mark.parametrize("sigma_data", [None, S], ids=["plain", "preconditioned"])


def exact_model(schedule: Schedule, covariance=SIGMA, sigma_data: float | None = None, gain: float = 1.0, **kwargs):
    """A model whose network is the best there is, or ``gain`` times it."""
    denoiser = GaussianDenoiser(schedule, MU, covariance)

    def answer(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if sigma_data is None:
            return gain * denoiser.exact("eps", x, t)
        c = schedule.at(t)
        alpha, sigma, s = expand(c.alpha, x), expand(c.sigma, x), sigma_data
        q = torch.sqrt(alpha**2 * s**2 + sigma**2)
        x_t = q * x
        return gain * (denoiser.exact("x0", x_t, t) - alpha * s**2 / q**2 * x_t) * q / (sigma * s)

    kwargs.setdefault("tolerance", 1e-6)
    model = ScoreSDE((3,), network=network(answer), schedule=schedule, sigma_data=sigma_data, **kwargs)
    return model.double(), denoiser


def over_times(law, schedule: Schedule, function) -> float:
    """Average a function of alpha^2 and sigma^2 over a law of training times, by their quantiles."""
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    if isinstance(law, UniformTime):
        t = schedule.t_min + (schedule.t_max - schedule.t_min) * u
    else:
        t = schedule.time_of(torch.exp(law.mean + law.std * torch.special.ndtri(u)))
        t = t.clamp(schedule.t_min, schedule.t_max)
    c = schedule.at(t)
    return float(function(c.alpha[:, None] ** 2, c.sigma[:, None] ** 2, torch.tensor(LAM).double()).mean())


@every_schedule
@pytest.mark.parametrize("law", [UniformTime(), LogNormalRatio(-0.5, 0.9)], ids=["uniform", "log_normal"])
@either
def test_the_least_loss_is_the_closed_form(schedule, law, sigma_data):
    model, denoiser = exact_model(schedule, LAM, sigma_data, noise_levels=law)
    x = denoiser.sample(100_000).x
    floor = over_times(
        law,
        schedule,
        (lambda a2, s2, lam: a2 * lam / (a2 * lam + s2))
        if sigma_data is None
        else (lambda a2, s2, lam: lam * (a2 * S**2 + s2) / (S**2 * (a2 * lam + s2))),
    )
    assert float(model.loss(x, rng=generator(0)).total) == pytest.approx(floor, rel=0.02)


def test_the_loss_is_denoising_score_matching_with_the_weight_sigma_squared():
    """With k times the exact score the loss exceeds its floor by (k - 1)^2 E_t sigma^2 E|score|^2, E|score|^2 = tr C^-1:
    that is explicit score matching, which denoising equals but for a constant (Vincent 2011)."""
    law, schedule, k = UniformTime(), VPSchedule(), 1.5
    x = exact_model(schedule, LAM)[1].sample(100_000).x
    best, worse = (float(exact_model(schedule, LAM, gain=g)[0].loss(x, rng=generator(0)).total) for g in (1.0, k))
    excess = (k - 1) ** 2 * over_times(law, schedule, lambda a2, s2, lam: s2 / (a2 * lam + s2))
    assert worse - best == pytest.approx(excess, rel=0.03)


@every_schedule
def test_preconditioning_hands_the_network_inputs_and_targets_of_unit_variance(schedule):
    """Data of the variance that it was told: at every time the best output for the worst guess, 0, costs 1."""
    seen = []

    def watch(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.append((x, t))
        return torch.zeros_like(x)

    model = ScoreSDE((1,), network=network(watch), schedule=schedule, sigma_data=S).double()
    x = S * torch.randn(100_000, 1, dtype=torch.float64)
    loss = float(model.loss(x, rng=generator(0)).total)
    assert loss == pytest.approx(1.0, abs=0.02)
    inputs, t = seen[0]
    for part in inputs[t.argsort()].chunk(5):
        assert float(part.var()) == pytest.approx(1.0, abs=0.05)


def test_on_karras_noise_the_coefficients_are_those_of_karras():
    """Table 1: c_skip = s^2/(sigma^2 + s^2), c_out = sigma s/sqrt(sigma^2 + s^2), c_in = 1/sqrt(sigma^2 + s^2)."""
    schedule, s = EDMSchedule(), 0.5
    model = ScoreSDE((2,), network=network(lambda x, t, y: torch.sin(3 * x)), schedule=schedule, sigma_data=s).double()
    x_t, t = 3 * torch.randn(7, 2, dtype=torch.float64), torch.linspace(0.3, 1, 7).double()
    sigma = 80 * t[:, None] ** 7
    root = (sigma**2 + s**2).sqrt()
    expected = s**2 / root**2 * x_t + sigma * s / root * torch.sin(3 * x_t / root)
    prediction = model.predict(x_t, t)
    assert prediction.kind == "x0"
    torch.testing.assert_close(prediction.mean, expected, atol=1e-12, rtol=1e-12)


@every_schedule
@either
@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_whatever_is_asked_is_answered_by_its_closed_form(schedule, sigma_data, kind):
    model, denoiser = exact_model(schedule, SIGMA, sigma_data)
    t = torch.linspace(max(0.05, schedule.t_min), 0.98, 40).double()
    x_t = 2 * torch.randn(40, 3, dtype=torch.float64)
    got, expected = model.predict_as(kind, x_t, t)[0], denoiser.exact(kind, x_t, t)
    torch.testing.assert_close(got, expected, atol=1e-9 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve", "edm", "cond_ot"])
@either
def test_density_and_latents_are_the_closed_forms(name, sigma_data):
    schedule = SCHEDULES[name]
    model, denoiser = exact_model(schedule, SIGMA, sigma_data)
    x = denoiser.sample(5).x
    start, stop = (0.0, 1.0) if schedule.coordinates == "time" else (schedule.t_min, schedule.t_max)
    noise, prior = denoiser.carry(x, start, stop), schedule.prior_std
    volume = 0.5 * float((denoiser.spread(stop) / denoiser.spread(start)).log().sum())
    expected = -0.5 * ((noise / prior) ** 2 + math.log(2 * math.pi * prior**2)).sum(1) + volume
    torch.testing.assert_close(model.log_prob(x, num_samples=3).value, expected, atol=1e-4, rtol=0)
    z = model.encode(x)
    torch.testing.assert_close(z, noise / prior, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(z), x, atol=1e-4, rtol=0)


def watched(seen: list, **kwargs) -> ScoreSDE:
    def watch(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.append(y)
        return torch.zeros_like(x_t)

    return ScoreSDE((2,), ClassLabels(4), network=network(watch), **kwargs)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_classes_become_the_null_label_as_often_as_asked(dropout):
    seen, y = [], torch.arange(4).repeat(10_000)
    watched(seen, condition_dropout=dropout).loss(torch.zeros(40_000, 2), y)
    dropped = seen[0] != y
    assert (seen[0][dropped] == 4).all()
    assert float(dropped.double().mean()) == pytest.approx(dropout, abs=5 * math.sqrt(dropout * (1 - dropout) / 40_000))


def test_samples_densities_and_latents_get_their_classes_as_they_are():
    seen, y = [], torch.tensor([3, 0, 2])
    model = watched(seen, condition_dropout=1.0, sampler=Heun(3))
    model.sample(3, y)
    assert len(seen) == 5
    model.log_prob(torch.zeros(3, 2), y)
    model.decode(torch.zeros(3, 2), y)
    assert all(set(labels.tolist()) <= {0, 2, 3} for labels in seen)


def test_a_model_samples_with_the_sampler_that_it_was_given_and_by_default_as_its_paper_did():
    model, _ = exact_model(VPSchedule())
    assert isinstance(model.sampler, EulerMaruyama)
    model.sampler = Heun(5)
    x, nfe, _ = model.sample(4, rng=generator(1))
    assert nfe == 9
    assert torch.equal(x, Heun(5)(model, 4, rng=generator(1)).x)


@pytest.mark.parametrize(
    ("setting", "what"),
    [({"sigma_data": 0.0}, "not 0.0"), ({"condition_dropout": 1.2}, "not 1.2"), ({"tolerance": -1.0}, "not -1.0")],
)
def test_settings_that_make_no_sense_are_refused(setting, what):
    with pytest.raises(ValueError, match=what):
        ScoreSDE((2,), network=network(lambda x, t, y: x), **setting)
