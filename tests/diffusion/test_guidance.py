"""Guided Gaussians, whose samples have variances in closed form for every sampler, and the costs and refusals of guidance."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.diffusion.denoiser import Denoiser, DenoiserWrapper
from genzoo.diffusion.guidance import AutoGuidance, ClassifierFreeGuidance
from genzoo.diffusion.inverse import DPS, Inpainting, Observation, PiGDM, RePaint
from genzoo.diffusion.path import PARAMETERIZATIONS, Parameterization, Prediction
from genzoo.diffusion.samplers import DDIM, AdaptiveODE, Ancestral, EulerMaruyama, Heun
from genzoo.diffusion.schedules import EDMSchedule, VPSchedule
from genzoo.editing.posterior import choose
from genzoo.families.ddpm import DDPM
from genzoo.families.flow_matching import FlowMatching
from genzoo.model import Samples
from tests.exact import ExactDenoiser, GaussianDenoiser, moments
from tests.test_interface import conditions, every

EDM = EDMSchedule()
T = float(EDM.at(torch.ones(())).sigma) ** 2  # variance of the noise at the end of the path
C, U = 1.0, 2.0  # variances of the class and of all data


class OfAClass(ExactDenoiser):
    """The exact denoiser of one class N(mean, c), and of all data N(0, u) without a condition."""

    condition = ClassLabels(1)

    def __init__(self, c: Denoiser, u: Denoiser):
        super().__init__()
        self.c, self.u, self.event, self.path = c, u, c.event, c.path

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        return (self.u if y is None else self.c).predict(x_t, t)


class Given(DenoiserWrapper):
    """A denoiser that is always given class 0."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.event.shape

    @property
    def dim(self) -> int:
        return self.event.dim

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        return self.denoiser.predict(x_t, t, torch.zeros(len(x_t), dtype=torch.long))


def gaussian(variance: float, kind: Parameterization = "eps", mean: float = 0.0, schedule=EDM) -> GaussianDenoiser:
    return GaussianDenoiser(schedule, [mean], [variance], kind)


def shrinking(start: float, stop: float, scale: float) -> float:
    """The factor by which the guided ODE multiplies a variance from noise of variance ``start`` to ``stop``."""
    return ((C + stop) / (C + start)) ** scale * ((U + stop) / (U + start)) ** (1 - scale)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
def test_the_guided_ode_draws_the_geometric_mean_of_the_variances(scale, kind, monkeypatch):
    guided = Given(ClassifierFreeGuidance(OfAClass(gaussian(C, kind), gaussian(U, kind)), scale))
    mean, covariance = moments(Heun(400), guided, monkeypatch)
    assert float(covariance) == pytest.approx(T * shrinking(T, 0.0, scale), rel=1e-3)
    assert float(covariance) == pytest.approx(C**scale * U ** (1 - scale), rel=2e-3)  # as sigma_max goes to infinity
    assert float(mean) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1.5, 3.0])
def test_the_guided_sde_draws_another_variance(scale, monkeypatch):
    guided = Given(ClassifierFreeGuidance(OfAClass(gaussian(C), gaussian(U)), scale))
    coarse, fine = (float(moments(Ancestral(steps=n), guided, monkeypatch)[1]) for n in (500, 1000))
    expected = (2 - 2 ** (2 - 2 * scale)) / (2 * scale - 1)
    assert 2 * fine - coarse == pytest.approx(expected, rel=1e-3)  # the error of a chain falls as one over its steps


@pytest.mark.parametrize("interval", [(0.5, 2.0), (0.0, 1.0), (3.0, 1000.0)])
def test_on_an_interval_of_noise_levels_its_segments_multiply(interval, monkeypatch):
    scale = 3.0
    guided = Given(ClassifierFreeGuidance(OfAClass(gaussian(C), gaussian(U)), scale, interval))
    _, covariance = moments(Heun(8000), guided, monkeypatch)
    low, high = interval[0] ** 2, min(interval[1] ** 2, T)
    factor = shrinking(T, high, 1.0) * shrinking(high, low, scale) * shrinking(low, 0.0, 1.0)
    assert float(covariance) == pytest.approx(T * factor, rel=1e-3)


@pytest.mark.parametrize("kind", ["eps", "x0", "velocity"])
def test_autoguidance_moves_away_from_the_worse_model_whatever_it_predicts(kind, monkeypatch):
    guided = Given(AutoGuidance(gaussian(C, "eps"), gaussian(U, kind), 2.0))
    _, covariance = moments(Heun(400), guided, monkeypatch)
    assert float(covariance) == pytest.approx(T * shrinking(T, 0.0, 2.0), rel=1e-3)


@pytest.mark.parametrize("sampler", [DDIM(200), Heun(100)])
@pytest.mark.parametrize("schedule", [VPSchedule(), EDM], ids=["vp", "edm"])
def test_between_equal_variances_guidance_moves_the_mean_in_proportion(sampler, schedule, monkeypatch):
    both = OfAClass(gaussian(1.0, mean=0.5, schedule=schedule), gaussian(1.0, schedule=schedule))
    means = []
    for scale in (0.0, 1.0, 3.0):
        mean, _ = moments(sampler, Given(ClassifierFreeGuidance(both, scale)), monkeypatch)
        means.append(float(mean))
    assert means == pytest.approx([0.0, 0.5, 1.5], abs=0.02)


def test_evaluations_are_counted_and_a_scale_of_one_costs_no_more():
    both = OfAClass(gaussian(C), gaussian(U))
    y = torch.zeros(3, dtype=torch.long)
    for sampler, plain in ((DDIM(10), 10), (Heun(10), 19), (EulerMaruyama(10), 10)):
        rng = torch.Generator().manual_seed(0)
        once = sampler(ClassifierFreeGuidance(both, 1.0), 3, y, rng)
        assert once.nfe == plain == sampler(both, 3, y, rng.manual_seed(0)).nfe
        assert torch.equal(once.x, sampler(both, 3, y, rng.manual_seed(0)).x)
        assert sampler(ClassifierFreeGuidance(both, 2.0), 3, y, rng).nfe == 2 * plain
        assert plain < sampler(ClassifierFreeGuidance(both, 2.0, (0.5, 2.0)), 3, y, rng).nfe < 2 * plain
    adaptive = [AdaptiveODE(1e-5)(ClassifierFreeGuidance(both, s), 3, y, rng).nfe for s in (1.0, 2.0)]
    assert adaptive[1] % 2 == 0 and adaptive[1] > 1.5 * adaptive[0]


def test_guidance_of_images_moves_every_channel_and_keeps_a_learned_variance():
    class Constant(ExactDenoiser):
        condition = ClassLabels(1)

        def __init__(self):
            super().__init__()
            self.event, self.path = gaussian(1.0).event, gaussian(1.0).path

        def predict(self, x_t, t, y=None):
            mean = torch.ones_like(x_t) * torch.arange(1, 4).view(1, 3, 1, 1) * (1.0 if y is None else 2.0)
            return Prediction("eps", mean, mean + 5)

    found = ClassifierFreeGuidance(Constant(), 3.0).predict(
        torch.zeros(2, 3, 4, 4), torch.ones(2), torch.zeros(2).long()
    )
    assert torch.equal(found.mean[0, :, 0, 0], torch.tensor([4.0, 8.0, 12.0]))
    assert found.variance_weight is not None and torch.equal(
        found.variance_weight[0, :, 0, 0], torch.tensor([7.0, 9.0, 11.0])
    )


def test_what_cannot_be_guided_is_refused():
    both, plain = OfAClass(gaussian(C), gaussian(U)), gaussian(C)
    for scale in (-0.5, math.nan):
        with pytest.raises(ValueError, match="scale must be at least 0"):
            ClassifierFreeGuidance(both, scale)
    for interval in ((2.0, 1.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="interval must be two noise levels"):
            ClassifierFreeGuidance(both, 2.0, interval)
    with pytest.raises(ValueError, match="unconditional"):
        ClassifierFreeGuidance(plain, 2.0)
    for family in (DDPM, FlowMatching):
        with pytest.raises(ValueError, match="condition_dropout=0"):
            ClassifierFreeGuidance(family((2,), ClassLabels(3), condition_dropout=0.0), 2.0)
        assert ClassifierFreeGuidance(family((2,), ClassLabels(3), condition_dropout=0.1), 2.0).evaluations == 1
    with pytest.raises(ValueError, match="differ"):
        AutoGuidance(both, plain, 2.0)


@every(Denoiser, conditional=True)
def test_every_conditional_denoiser_is_guided_on_points_and_images(case):
    model = case.model()
    y, rng = conditions(model, 4), torch.Generator()
    sampler = Heun(steps=3)
    plain = sampler(model, 4, y, rng.manual_seed(0))
    same = sampler(ClassifierFreeGuidance(model, 1.0), 4, y, rng.manual_seed(0))
    assert torch.equal(plain.x, same.x) and plain.nfe == same.nfe
    guided = sampler(ClassifierFreeGuidance(model, 3.0), 4, y, rng.manual_seed(0))
    assert guided.nfe == 2 * plain.nfe and bool(guided.x.isfinite().all()) and not torch.equal(plain.x, guided.x)
    t = torch.full((4,), 0.5)
    c, u = (model.predict(plain.x, t, condition).mean for condition in (y, None))
    torch.testing.assert_close(ClassifierFreeGuidance(model, 3.0).predict(plain.x, t, y).mean, 3 * c - 2 * u)


# Posteriors


def filled(method, sampler, scale: float):
    """Draw the second of two independent coordinates of class 0, given the first one, with guidance."""
    operator = Inpainting((2,), torch.tensor([False, True]))
    guidance = functools.partial(ClassifierFreeGuidance, scale=scale)

    def draw(denoiser: Denoiser, n: int) -> Samples:
        build = choose(denoiser, operator, 0.0, method, sampler, guidance)
        observation = Observation(operator, torch.full((n, 1), 0.7, dtype=torch.float64))
        return build(observation)(denoiser, n, torch.zeros(n, dtype=torch.long))

    return draw


def two(variance: float, mean: float = 0.0, schedule=EDM) -> GaussianDenoiser:
    return GaussianDenoiser(schedule, [mean, mean], [variance, variance])


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("method", [None, PiGDM])
def test_an_independent_coordinate_is_filled_from_its_guided_distribution(method, scale, monkeypatch):
    mean, covariance = moments(filled(method, Heun(400), scale), OfAClass(two(C), two(U)), monkeypatch)
    expected = torch.tensor([[0, 0], [0, C**scale * U ** (1 - scale)]], dtype=torch.float64)
    torch.testing.assert_close(covariance, expected, rtol=2e-3, atol=1e-9)
    torch.testing.assert_close(mean, torch.tensor([0.7, 0.0], dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", [functools.partial(RePaint, resamplings=2), functools.partial(DPS, normalize=False)])
def test_chains_fill_about_the_guided_mean(method, monkeypatch):
    both = OfAClass(two(1.0, 0.5, VPSchedule()), two(1.0, 0.0, VPSchedule()))
    means = [moments(filled(method, DDIM(200), scale), both, monkeypatch)[0].tolist() for scale in (0.0, 1.0, 3.0)]
    assert [first for first, _ in means] == pytest.approx([0.7, 0.7, 0.7], abs=1e-9)
    assert [second for _, second in means] == pytest.approx([0.0, 0.5, 1.5], abs=0.03)


def test_evaluations_of_guided_posteriors_are_counted():
    denoiser, n = OfAClass(two(C), two(U)), 2
    for method, each in ((PiGDM, 2 * (1 + 1)), (DPS, 2 + 2), (functools.partial(RePaint, resamplings=1), 2)):
        assert filled(method, DDIM(4, eta=1.0), 3.0)(denoiser, n).nfe == 4 * each
