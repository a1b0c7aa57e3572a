"""Guidance by a classifier of noisy data: on a mixture of Gaussians, where every score is a closed form, and as a family."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Vector
from genzoo.diffusion.guidance import ClassifierGuidance, NoisyClassifier, NoisyCritic
from genzoo.diffusion.path import PARAMETERIZATIONS, Prediction, expand
from genzoo.diffusion.samplers import DDIM, Heun
from genzoo.diffusion.schedules import CondOT, VPSchedule
from genzoo.event import EventSpec
from genzoo.families.ddpm import DDPM
from genzoo.families.noisy_classifier import NoiseConditionalClassifier
from genzoo.numerics.random import SampleStreams
from tests.exact import ExactDenoiser, GaussianDenoiser, every_schedule

MEANS, VARIANCES, SHARES = ([-1.0, 0.5], [1.0, -0.5]), ([0.3, 0.2], [0.5, 0.1]), (0.3, 0.7)


class ExactClassifier(NoisyClassifier):
    """p(y | x_t) of two Gaussian classes in closed form."""

    event, condition = EventSpec((2,)), ClassLabels(2)

    def log_probs(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        joint = []
        for mean, variance, share in zip(MEANS, VARIANCES, SHARES, strict=True):
            c = alpha[:, None] ** 2 * x_t.new_tensor(variance) + sigma[:, None] ** 2
            z = x_t - alpha[:, None] * x_t.new_tensor(mean)
            joint.append(math.log(share) - 0.5 * (z.square() / c + c.log()).sum(1))
        return torch.stack(joint, dim=1).log_softmax(1)


class MixtureDenoiser(ExactDenoiser):
    """The exact unconditional denoiser of the mixture, and the one of a class where a class is given."""

    def __init__(self, schedule, kind):
        super().__init__()
        pairs = zip(MEANS, VARIANCES, strict=True)
        self.classes = nn.ModuleList(GaussianDenoiser(schedule, mean, variance, kind) for mean, variance in pairs)
        self.event, self.path, self.kind = self.classes[0].event, self.classes[0].path, kind

    def of_class(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        means = torch.stack([part.predict(x_t, t).mean for part in self.classes])
        return means[y, torch.arange(len(y))]

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        assert y is None, "the denoiser is unconditional"
        c = self.path.schedule.at(t)
        weights = ExactClassifier().log_probs(x_t, c.alpha, c.sigma).exp()
        means = torch.stack([part.predict(x_t, t).mean for part in self.classes], dim=1)
        return Prediction(self.kind, (weights[:, :, None] * means).sum(1))


def states(path, t: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    c = path.schedule.at(t)
    x, eps = torch.randn(2, len(t), 2, generator=rng, dtype=torch.float64)
    return expand(c.alpha, x) * x + expand(c.sigma, x) * eps


@every_schedule
@pytest.mark.parametrize("kind", PARAMETERIZATIONS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_by_bayes_rule_scale_one_is_the_conditional_prediction(schedule, kind, scale):
    denoiser = MixtureDenoiser(schedule, kind)
    t = torch.linspace(0.02, 0.98, 12, dtype=torch.float64)
    x_t, y = states(denoiser.path, t), torch.arange(12) % 2
    found = ClassifierGuidance(denoiser, ExactClassifier(), scale).predict(x_t, t, y)
    u, c = denoiser.predict(x_t, t).mean, denoiser.of_class(x_t, t, y)
    assert found.kind == kind
    torch.testing.assert_close(found.mean, u + scale * (c - u), rtol=1e-8, atol=1e-10)


def test_at_pure_noise_the_prediction_is_still_that_of_the_class():
    """Where alpha vanishes the score has no class, and the data estimate has: the limit of a quotient."""
    denoiser = MixtureDenoiser(CondOT(), "velocity")
    t, y = torch.ones(6, dtype=torch.float64), torch.arange(6) % 2
    x_t = states(denoiser.path, t)
    found = ClassifierGuidance(denoiser, ExactClassifier(), 1.0).predict(x_t, t, y).mean
    torch.testing.assert_close(found, denoiser.of_class(x_t, t, y), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", [Heun(60), DDIM(400)])
def test_guided_samples_are_those_of_the_class(sampler):
    guided = ClassifierGuidance(MixtureDenoiser(CondOT(), "x0"), ExactClassifier(), 1.0)
    sampler.clip = False
    y = torch.tensor([0, 1]).repeat_interleave(3000)
    drawn = sampler(guided, 6000, y, torch.Generator().manual_seed(0))
    assert drawn.nfe == 2 * sampler(guided.denoiser, 2).nfe
    for k in (0, 1):
        x = drawn.x[y == k]
        torch.testing.assert_close(x.mean(0), torch.tensor(MEANS[k]).double(), atol=0.04, rtol=0)
        torch.testing.assert_close(x.var(0), torch.tensor(VARIANCES[k]).double(), atol=0.02, rtol=0.06)


def test_null_values_and_levels_beyond_an_interval_are_not_guided():
    denoiser = MixtureDenoiser(CondOT(), "x0")
    t = torch.tensor([0.2, 0.5, 0.5, 0.9], dtype=torch.float64)  # sigma/alpha 0.25, 1, 1, 9
    x_t, y = states(denoiser.path, t), torch.tensor([0, 2, 1, 1])  # 2 is the null value
    u, c = denoiser.predict(x_t, t).mean, denoiser.of_class(x_t, t, y.clamp(max=1))
    found = ClassifierGuidance(denoiser, ExactClassifier(), 4.0).predict(x_t, t, y).mean
    scale = torch.tensor([4.0, 0.0, 4.0, 4.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(found, u + scale * (c - u))
    on_interval = ClassifierGuidance(denoiser, ExactClassifier(), 4.0, (0.5, 2.0)).predict(x_t, t, y).mean
    scale = torch.tensor([1.0, 0.0, 4.0, 1.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(on_interval, u + scale * (c - u))
    without = ClassifierGuidance(denoiser, ExactClassifier(), 4.0)
    torch.testing.assert_close(without.predict(x_t, t, None).mean, u)
    assert without.evaluations == 1


class ExactCritic(NoisyCritic):
    """log p(y | x_t) up to a function of y, of data N(0, 1) and y = x + s eta: a condition that is no class."""

    event, condition, s = EventSpec((2,)), Vector(2), 0.5

    def log_likelihood(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        total = (alpha.square() + sigma.square())[:, None]
        gain, left = alpha[:, None] / total, sigma.square()[:, None] / total  # of E[x | x_t] and its variance
        return -0.5 * ((y - gain * x_t).square() / (left + self.s**2)).sum(1)


def test_a_critic_of_any_condition_guides_by_bayes_rule_and_null_values_are_not_guided():
    denoiser = GaussianDenoiser(VPSchedule(), [0.0, 0.0], [1.0, 1.0], "x0")
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    x_t, y = states(denoiser.path, t), torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).double()
    y[2] = torch.nan
    found = ClassifierGuidance(denoiser, ExactCritic(), 1.0).predict(x_t, t, y).mean
    alpha, sigma, *_ = (v[:, None] for v in denoiser.path.schedule.at(t))
    precision = 1 + (alpha / sigma) ** 2 + 1 / ExactCritic.s**2
    posterior = (alpha / sigma**2 * x_t + y / ExactCritic.s**2) / precision
    posterior[2] = denoiser.predict(x_t, t).mean[2]
    torch.testing.assert_close(found, posterior, rtol=1e-8, atol=1e-10)


def test_what_a_classifier_cannot_guide_is_refused():
    with pytest.raises(ValueError, match="EventSpec"):
        ClassifierGuidance(DDPM((3,)), ExactClassifier(), 1.0)
    with pytest.raises(ValueError, match="coupled"):
        ClassifierGuidance(
            GaussianDenoiser(CondOT(), [0.0, 0.0], [1.0, 1.0], independent=False), ExactClassifier(), 1.0
        )
    with pytest.raises(ValueError, match="condition_dropout=0"):
        ClassifierGuidance(DDPM((2,), ClassLabels(2), condition_dropout=0.0), ExactClassifier(), 1.0)


# The family


def classifier(shape=(2,), levels=None, scale: float = 0.2) -> NoiseConditionalClassifier:
    torch.manual_seed(0)
    model = NoiseConditionalClassifier(EventSpec(shape, levels), ClassLabels(3)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(("shape", "levels"), [((2,), None), ((1, 8, 8), 17), ((3, 5, 7), 256)])
def test_a_classifier_depends_on_the_ratio_of_noise_and_signal_alone(shape, levels):
    model = classifier(shape, levels)
    x = torch.randn(4, *shape, dtype=torch.float64)
    alpha, sigma = torch.tensor([1.0, 0.5, 0.1, 0.0]).double(), torch.tensor([0.0, 0.5, 2.0, 1.0]).double()
    found = model.log_probs(x, alpha, sigma)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(4).double())
    torch.testing.assert_close(model.log_probs(3 * x, 3 * alpha, 3 * sigma), found)
    assert not torch.allclose(model.log_probs(x, alpha, 2 * sigma)[1:3], found[1:3])


def test_the_gradient_of_guidance_is_that_of_the_log_probability():
    model, denoiser = classifier(), MixtureDenoiser(CondOT(), "score")
    t, y = torch.full((3,), 0.4, dtype=torch.float64), torch.tensor([0, 1, 2])
    x_t = states(denoiser.path, t)
    c = denoiser.path.schedule.at(t)
    moved = ClassifierGuidance(denoiser, model, 2.0).predict(x_t, t, y).mean - denoiser.predict(x_t, t).mean
    for i in range(2):
        step = 1e-5 * torch.eye(2, dtype=torch.float64)[i]
        up, down = (model.log_probs(x_t + s * step, c.alpha, c.sigma)[torch.arange(3), y] for s in (1, -1))
        torch.testing.assert_close(moved[:, i], 2 * (up - down) / 2e-5, rtol=1e-5, atol=1e-7)


def test_the_loss_is_the_cross_entropy_at_uniform_angles():
    model = classifier(scale=0.05)
    x = torch.randn(4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long()
    found = model.loss(x, y, rng=SampleStreams(0, range(4000))).total.item()
    by_hand = []
    for i in range(40):  # the midpoint rule over the angle
        angle = torch.full((4000,), math.pi / 2 * (i + 0.5) / 40, dtype=torch.float64)
        eps = torch.randn(4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        x_t = angle.cos()[:, None] * x + angle.sin()[:, None] * eps
        by_hand.append(-model.log_probs(x_t, angle.cos(), angle.sin())[torch.arange(4000), y].mean().item())
    assert found == pytest.approx(sum(by_hand) / 40, rel=0.02)


@pytest.mark.parametrize("condition", [None, Vector(3)])
def test_a_classifier_needs_classes(condition):
    with pytest.raises(ValueError, match="needs data with classes"):
        NoiseConditionalClassifier((2,), condition)


def test_training_data_are_noisy_at_uniform_angles():
    x = torch.full((20_000, 2), 3.0, dtype=torch.float64)
    x_t, alpha, sigma = classifier().noisy(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(20_000).double())
    angles = torch.atan2(sigma, alpha).sort().values * 2 / math.pi
    assert float((angles - torch.linspace(0, 1, 20_000).double()).abs().max()) < 0.015  # Kolmogorov and Smirnov
    eps = (x_t - alpha[:, None] * x) / sigma[:, None]
    assert float(eps.mean()) == pytest.approx(0, abs=0.02) and float(eps.std()) == pytest.approx(1, abs=0.02)
    assert float((eps[:, 0] * eps[:, 1]).mean()) == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("schedule", [CondOT(), VPSchedule()], ids=["cond_ot", "vp"])
def test_an_imperfect_classifier_moves_no_prediction_without_bound(schedule):
    """The factor of the score in a velocity grows as one over the signal, whose share in the gradient falls with it."""
    denoiser, model = MixtureDenoiser(schedule, "velocity"), classifier()
    y, sizes = torch.arange(64) % 3, []
    for t in (0.9, 0.99, 0.999, 1.0):
        times = torch.full((64,), t, dtype=torch.float64)
        x_t = states(denoiser.path, times)
        moved = ClassifierGuidance(denoiser, model, 1.0).predict(x_t, times, y).mean - denoiser.predict(x_t, times).mean
        sizes.append(float(moved.square().mean().sqrt()))
    assert max(sizes) < 3 * min(sizes) and min(sizes) > 0


def test_beyond_an_interval_the_scale_is_one_also_of_a_classifier_without_weight():
    denoiser = MixtureDenoiser(CondOT(), "x0")
    t = torch.tensor([0.2, 0.5], dtype=torch.float64)  # sigma/alpha 0.25 and 1
    x_t, y = states(denoiser.path, t), torch.tensor([0, 1])
    u, c = denoiser.predict(x_t, t).mean, denoiser.of_class(x_t, t, y)
    found = ClassifierGuidance(denoiser, ExactClassifier(), 0.0, (0.5, 2.0)).predict(x_t, t, y).mean
    torch.testing.assert_close(found, torch.stack([c[0], u[1]]))
