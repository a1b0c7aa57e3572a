"""Cascades against closed forms of Gaussian images, and against enumeration of binary ones."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from genzoo.conditions import ClassLabels, Condition, Joint
from genzoo.distributions.discretization import bin_center, dequantize, quantize
from genzoo.event import EventSpec
from genzoo.families.autoregressive import Autoregressive
from genzoo.families.cascade import CascadeDensity, CascadeModel, cascade, downsample
from genzoo.families.ddpm import DDPM
from genzoo.families.gan import GAN
from genzoo.loading import with_augmentation
from genzoo.model import GenerativeModel, Loss, Samples
from genzoo.nn.transformer import Transformer
from genzoo.nn.unet import UNet
from genzoo.numerics.random import SampleStreams, generator, randn

SHAPE, D, N = (1, 2, 2), 4, 60_000
P = torch.full((1, 4), 0.25, dtype=torch.float64)  # the average of a 2x2 block


def covariance() -> Tensor:
    """Covariance of four pixels, the nearest with the largest correlation."""
    place = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    return torch.exp(-torch.cdist(place, place)) + 0.1 * torch.eye(4, dtype=torch.float64)


class Gaussian(GenerativeModel):
    """Exact samples of a Gaussian image, or given a small one z = sqrt(1 - a^2) P x + a eps."""

    def __init__(self, event: EventSpec, condition: Condition | None = None, scale: float = 1.0):
        super().__init__(event, condition)
        self.scale = scale
        self.weight = nn.Parameter(torch.zeros(()))

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        return Loss((x - self.weight).square().mean(), {})

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        S = covariance()
        if self.dim == 1:
            S = P @ S @ P.T
        mean, cov = torch.zeros(n, self.dim, dtype=torch.float64), S.expand(n, -1, -1)
        if isinstance(self.condition, Joint):
            z, a = self.condition.split(y)[0].flatten(1).double().unbind(1)  # type: ignore[arg-type]
            signal = torch.sqrt(1 - a**2)
            gain = signal[:, None] * (S @ P.T)[:, 0] / (signal**2 * (P @ S @ P.T).item() + a**2)[:, None]
            mean = gain * z[:, None]
            cov = S - signal[:, None, None] * gain[:, :, None] * (P @ S)
        eps = randn((n, self.dim), rng=rng, dtype=torch.float64)
        root = torch.linalg.eigh(cov)
        x = (root.eigenvectors * root.eigenvalues.clamp(min=0).sqrt()[:, None]) @ eps[..., None]
        return Samples((mean + self.scale * x[..., 0]).view(n, *self.shape), 1)


def gaussian(a: float, scale: float = 1.0) -> CascadeModel:
    model = cascade(
        EventSpec(SHAPE),
        base=lambda event, condition: Gaussian(event, condition, scale),
        upsampler=Gaussian,
        augmentation=a,
        max_augmentation=1.0,
    ).double()
    assert isinstance(model, CascadeModel)
    return model


@pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 1.0])
def test_small_images_of_data_leave_the_distribution_unchanged_at_any_noise_level(a):
    x = gaussian(a).sample(N, rng=generator("cascade", a)).x.flatten(1)
    torch.testing.assert_close(x.T.cov(), covariance(), rtol=0, atol=0.03)


def test_noise_of_level_zero_keeps_the_small_image_and_of_level_one_ignores_it():
    model = gaussian(0.0)
    small = torch.linspace(-2, 2, 50, dtype=torch.float64).view(-1, 1, 1, 1)
    exact = model.enlarge(small, None, generator("enlarge"))
    torch.testing.assert_close(downsample(exact.x, 2, None), small, rtol=0, atol=1e-6)
    ignored = with_augmentation(model, 1.0)
    assert isinstance(ignored, CascadeModel) and model.augmentation == 0
    x = ignored.enlarge(torch.full((N, 1, 1, 1), 3.0, dtype=torch.float64), None, generator("ignored")).x
    assert x.mean().abs() < 0.02
    torch.testing.assert_close(x.flatten(1).T.cov(), covariance(), rtol=0, atol=0.03)


@pytest.mark.parametrize("a", [0.0, 0.5, 0.9])
def test_the_noise_hides_errors_of_the_base_model(a):
    """A base model of twice the standard deviation: the variance of P x is that of a chain of affine maps."""
    v = (P @ covariance() @ P.T).item()
    signal, gain = math.sqrt(1 - a**2), math.sqrt(1 - a**2) * v / ((1 - a**2) * v + a**2)
    expected = gain**2 * (signal**2 * 4 * v + a**2) + v - signal * gain * v
    x = gaussian(a, scale=2.0).sample(N, rng=generator("wide", a)).x
    assert downsample(x, 2, None).var().item() == pytest.approx(expected, rel=0.03)


def test_levels_are_averaged_exactly():
    k = torch.tensor([[0, 1], [1, 0]]).view(1, 1, 2, 2)
    for dtype in (torch.float32, torch.float64):
        assert quantize(downsample(bin_center(k, 17, dtype), 2, 17), 17).item() == 1  # one half is rounded up
        assert quantize(downsample(bin_center(k * 16, 17, dtype), 2, 17), 17).item() == 8
    large = torch.randint(256, (5, 3, 12, 12), generator=generator("levels"))
    expected = torch.floor(large.double().unfold(2, 3, 3).unfold(3, 3, 3).sum((-2, -1)) / 9 + 4 / 9 + 1e-9).long()
    assert torch.equal(quantize(downsample(bin_center(large, 256), 3, 256), 256), expected)


def tiny(condition: Condition | None = None, a: float = 0.0) -> CascadeDensity:
    """A cascade of autoregressive models of binary images, from 1x1 to 2x2 pixels, with weights away from zero."""

    def part(event: EventSpec, condition: Condition | None) -> Autoregressive:
        def network(in_shape, out_shape, condition):
            return Transformer(in_shape, out_shape, condition, width=16, layers=1, heads=1)

        return Autoregressive(event, condition, network=network)

    torch.manual_seed(3)
    event = EventSpec((1, 2, 2), 2)
    model = cascade(event, condition, base=part, upsampler=part, augmentation=a).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    assert isinstance(model, CascadeDensity)
    return model


def binary() -> Tensor:
    """All images of 2x2 pixels of two levels, on the scale of the data."""
    k = torch.tensor(list(itertools.product([0, 1], repeat=4))).view(-1, 1, 2, 2)
    return bin_center(k, 2, torch.float64)


@pytest.mark.parametrize("condition", [None, ClassLabels(3)])
def test_the_density_is_that_of_the_small_image_times_that_of_the_large_one(condition):
    """At a = 0 the bound leaves out the small images that are not P x alone: compared with the sum over all of them."""
    model, x = tiny(condition), binary()
    y = None if condition is None else torch.full((len(x),), 1)
    bound = model.log_prob(x, y, rng=generator("bound")).value - 4 * math.log(2 / 2)
    mass = torch.zeros(len(x), dtype=torch.float64)
    for level in (0, 1):
        small = bin_center(torch.full((len(x), 1, 1, 1), level), 2, torch.float64)
        log_small = model.prior.log_prob(small, y).value  # type: ignore[operator]
        stage = model.super_resolution(0)
        c = stage.conditions(small, torch.zeros(len(x), dtype=torch.float64), y, None)
        log_large = stage.model.log_prob(x, c).value  # type: ignore[operator]
        joint = (log_small + log_large).exp()
        mass += joint
        own = downsample(x, 2, 2).flatten() == small.flatten()
        torch.testing.assert_close(bound[own], joint[own].log())
    assert mass.sum().item() == pytest.approx(1)
    assert bool((bound.exp() <= mass).all()) and bound.exp().sum() < 1


def test_samples_have_the_enumerated_probabilities():
    model, x, n = tiny(), binary(), 40_000
    mass = torch.zeros(len(x), dtype=torch.float64)
    for level in (0, 1):
        small = bin_center(torch.full((len(x), 1, 1, 1), level), 2, torch.float64)
        stage = model.super_resolution(0)
        c = stage.conditions(small, torch.zeros(len(x), dtype=torch.float64), None, None)
        mass += (model.prior.log_prob(small).value + stage.model.log_prob(x, c).value).exp()  # type: ignore[operator]
    drawn = quantize(model.sample(n, rng=generator("frequencies")).x, 2).flatten(1)
    found = torch.bincount((drawn * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16)
    assert ((found - n * mass) ** 2 / (n * mass)).sum() < 37.7  # chi-square of 15 degrees of freedom at 0.1 %


def test_a_noisy_bound_is_below_the_exact_density():
    """At a > 0 the bound is the mean over noise of a logarithm, below the logarithm of the mean."""
    model, x, draws = tiny(a=0.4), binary(), 400
    bounds = torch.stack([model.log_prob(x, rng=generator("noise", i)).value for i in range(draws)])
    mass = torch.zeros(len(x), dtype=torch.float64)
    stage, a = model.super_resolution(0), torch.full((len(x),), 0.4, dtype=torch.float64)
    for level in (0, 1):
        small = bin_center(torch.full((len(x), 1, 1, 1), level), 2, torch.float64)
        log_small = model.prior.log_prob(small).value  # type: ignore[operator]
        each = [stage.conditions(small, a, None, generator("exact", level, i)) for i in range(draws)]
        large = torch.stack([stage.model.log_prob(x, c).value for c in each]).exp().mean(0)  # type: ignore[operator]
        mass += log_small.exp() * large
    assert bool((bounds.mean(0) <= mass.log() + 0.02).all()) and bounds.exp().mean(0).sum() < 1


def unet(event: EventSpec, condition: Condition | None) -> DDPM:
    def network(in_shape, out_shape, condition):
        return UNet(in_shape, out_shape, condition, channels=8, multipliers=(1,), concat=True)

    return DDPM(event, condition, network=network)


def test_stages_train_their_own_weights_alone_and_all_together():
    model = cascade(EventSpec((3, 8, 8), 256), ClassLabels(2), base=unet, upsampler=unet, factors=(2, 2))
    assert [stage.name for stage in model.stages()] == ["base", "4 pixels", "8 pixels"]
    assert [tuple(part.shape) for part in model.parts()] == [(3, 2, 2), (3, 4, 4), (3, 8, 8)]
    assert sum(stage.fraction for stage in model.stages()) == pytest.approx(1)
    own = [{id(p) for p in stage.module.parameters()} for stage in model.stages()]
    assert not own[0] & own[1] and not own[1] & own[2] and not own[0] & own[2]
    assert set.union(*own) == {id(p) for p in model.parameters()}
    x = dequantize(torch.randint(256, (4, 3, 8, 8)), 256)
    stage = model.stages()[1]
    stage.module.loss(x, torch.tensor([0, 1, 0, 1]), rng=generator("loss")).total.backward()
    assert all((p.grad is not None) == (id(p) in own[1]) for p in model.parameters())


def test_the_null_value_of_a_stage_keeps_the_small_image():
    model = cascade(EventSpec((3, 8, 8), 256), ClassLabels(2), base=unet, upsampler=unet)
    stage = model.super_resolution(0)
    c = stage.conditions(torch.rand(5, 3, 4, 4), torch.full((5,), 0.2), torch.zeros(5, dtype=torch.int64), None)
    image, y = stage.condition.split(stage.condition.null(c))
    assert torch.equal(image, stage.condition.split(c)[0]) and bool((y == 2).all())


def test_sample_i_depends_on_seed_and_i_alone():
    model = cascade(EventSpec((1, 8, 8), 17), base=unet, upsampler=unet).double().eval()
    whole = model.sample(5, rng=SampleStreams(1, range(5))).x
    parts = [model.sample(len(rows), rng=SampleStreams(1, rows)).x for rows in (range(2), range(2, 5))]
    torch.testing.assert_close(whole, torch.cat(parts))


@pytest.mark.parametrize(
    ("event", "words", "message"),
    [
        (EventSpec((2,)), {}, "enlarges images, not vectors"),
        (EventSpec((1, 8, 8), 17), {"factors": (3,)}, "do not divide the 8x8 image"),
        (EventSpec((1, 8, 8), 17), {"factors": ()}, "at least one factor"),
        (EventSpec((1, 8, 8), 17), {"factors": (1,)}, "each at least 2"),
        (EventSpec((1, 8, 8), 17), {"augmentation": 0.6}, "must be in .0, 0.5., the noise levels of training"),
        (EventSpec((1, 8, 8), 17), {"max_augmentation": 0.0}, "must be in .0, 1."),
        (EventSpec((1, 8, 8), 17), {"base_fraction": 1.0}, "between 0 and 1"),
        (EventSpec((1, 8, 8), 17), {"upsampler": GAN}, "no single training loss"),
    ],
)
def test_bad_arguments_are_refused(event, words, message):
    with pytest.raises(ValueError, match=message):
        cascade(event, **{"base": unet, "upsampler": unet, **words})


def test_other_models_have_no_augmentation():
    with pytest.raises(ValueError, match="has no super-resolution models; omit it"):
        with_augmentation(unet(EventSpec((1, 8, 8), 17), None), 0.1)
