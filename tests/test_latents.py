"""Latents: closed forms of the ODE and of flows, great circles, single latents, and directions on a linear decoder."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import genzoo
from genzoo import latents
from genzoo.conditions import ClassLabels
from genzoo.diffusion.denoiser import DenoiserWrapper
from genzoo.diffusion.path import Prediction
from genzoo.diffusion.probability_flow import ode_decode, ode_encode
from genzoo.diffusion.schedules import EDMSchedule, Schedule
from genzoo.errors import UsageError
from genzoo.event import EventSpec
from genzoo.families.vae import VAE
from genzoo.model import AbilityError, Bijective, Codec, Continuous, GenerativeModel, Loss, Samples
from genzoo.numerics.random import generator
from tests.exact import MU, SIGMA, GaussianDenoiser, every_schedule
from tests.test_interface import batch, every


def normal(*shape: int, name: str = "latents") -> Tensor:
    return torch.randn(*shape, generator=generator(name), dtype=torch.float64)


class Linear(Codec):
    """``x = A z + b``, and its inverse: every latent and direction is known in closed form."""

    def __init__(self, D: int = 3):
        super().__init__(EventSpec((D,)))
        self.latent = Continuous((D,))
        self.A = nn.Parameter(torch.eye(D).double() + 0.3 * normal(D, D, name="A"))
        self.b = nn.Parameter(normal(D, name="b"))
        self.double()

    def _loss(self, x, y, rng) -> Loss:
        return Loss((self._decode(self._encode(x, y), y) - x).square().mean(), {})

    def _sample(self, n, y, rng) -> Samples:
        return Samples(self._decode(torch.randn(n, *self.shape, dtype=torch.float64), y), 1)

    def _encode(self, x, y) -> Tensor:
        return torch.linalg.solve(self.A, (x - self.b).T).T

    def _decode(self, z, y) -> Tensor:
        return z @ self.A.T + self.b


# Encoding and decoding


@every_schedule
def test_the_noise_of_gaussian_data_is_the_affine_map_of_the_closed_form(schedule: Schedule):
    denoiser = GaussianDenoiser(schedule, MU, SIGMA)
    x = denoiser.sample(6, rng=generator("x")).x
    first, last = (0.0, 1.0) if schedule.coordinates == "time" else (schedule.t_min, schedule.t_max)
    exact = denoiser.carry(x, first, last) / schedule.prior_std
    z = latents.encode(denoiser, x)
    torch.testing.assert_close(z, exact, rtol=0, atol=5e-4)
    torch.testing.assert_close(latents.decode(denoiser, z), x, rtol=0, atol=1e-3)
    fine = ode_encode(denoiser, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fine, exact, rtol=0, atol=1e-7)
    torch.testing.assert_close(ode_decode(denoiser, fine, rtol=1e-9, atol=1e-9), x, rtol=0, atol=1e-6)


@every_schedule
def test_the_noise_of_data_is_standard_normal(schedule: Schedule):
    denoiser = GaussianDenoiser(schedule, MU, SIGMA)
    z = latents.encode(denoiser, denoiser.sample(20_000, rng=generator("x")).x)
    # A schedule that ends early leaves some signal of the data, alpha(t_max) mu, in the noise.
    t = torch.tensor(schedule.t_max, dtype=torch.float64)
    signal = float(schedule.at(t).alpha) / schedule.prior_std * max(map(abs, MU))
    assert float(z.mean(0).abs().max()) < 4 / 20_000**0.5 + signal
    torch.testing.assert_close(torch.cov(z.T), torch.eye(3).double(), rtol=0, atol=0.06)


class Shrunk(DenoiserWrapper):
    """A denoiser around another one, as guidance is."""

    def predict(self, x_t, t, y=None) -> Prediction:
        return Prediction("x0", 0.9 * self.denoiser.denoise(x_t, t, y))


def test_a_denoiser_around_another_one_has_the_latents_of_its_own_ode():
    denoiser = GaussianDenoiser(EDMSchedule(), MU, SIGMA)
    x = denoiser.sample(4, rng=generator("x")).x
    z = latents.encode(Shrunk(denoiser), x)
    assert float((z - latents.encode(denoiser, x)).abs().max()) > 1e-2
    torch.testing.assert_close(latents.decode(Shrunk(denoiser), z), x, rtol=0, atol=5e-3)


@every(Bijective)
def test_the_latent_of_a_flow_is_its_map(case):
    model = case.model().double()
    x, y = batch(model, 4)
    z = model.forward_and_log_det(x, y)[0]
    atol = 1e-3 + 10 * getattr(model, "rtol", 0.0)  # of the ODE, which is solved coarsely for images here
    torch.testing.assert_close(latents.encode(model, x, y), z, rtol=0, atol=atol)
    torch.testing.assert_close(latents.decode(model, latents.encode(model, x, y), y), x, rtol=0, atol=atol)


@every(GenerativeModel)
def test_a_latent_belongs_to_its_event_and_condition(case):
    model = case.model().double()
    x, y = batch(model, 3)
    if not latents.can_encode(model):
        with pytest.raises(AbilityError, match=r"^\w+ has no (latents|encoder): choose [^\n]+$"):
            latents.encode(model, x, y)
        return
    z = latents.encode(model, x, y)
    assert z.shape == (3, *latents.latent_space(model).shape)
    alone = torch.cat([latents.encode(model, x[i : i + 1], None if y is None else y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, z, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="y must"):
        latents.encode(model, x, None if model.condition else torch.zeros(3, dtype=torch.int64))
    assert type(model).__name__ in latents.meaning(model) and "\n" not in latents.meaning(model)


# Interpolation


def test_a_great_circle_starts_and_ends_exactly_at_its_ends():
    a, b = normal(50, 7), normal(50, 7, name="b")
    assert torch.equal(latents.spherical(a, b, 0), a) and torch.equal(latents.spherical(a, b, 1), b)
    for w in (1e-9, 1 - 1e-9):
        torch.testing.assert_close(latents.spherical(a, b, w), b if w > 0.5 else a, rtol=0, atol=1e-7)


@pytest.mark.parametrize("D", [64, 1024])
def test_points_between_normal_draws_have_the_norm_of_normal_draws(D):
    a, b = normal(4000, D), normal(4000, D, name="b")
    for w in (0.25, 0.5, 0.8):
        norms = latents.spherical(a, b, w).norm(dim=1)
        assert abs(float(norms.mean()) / math.sqrt(D - 0.5) - 1) < 0.005  # the mean of the chi distribution
        assert 0.4 < float(norms.std()) < 0.8  # that of chi is 0.707
        assert float(torch.lerp(a, b, w).norm(dim=1).mean()) < 0.9 * math.sqrt(D)  # which a line loses


def test_a_great_circle_has_a_constant_speed_and_a_linear_norm():
    a, b = torch.tensor([[2.0, 0, 0]]).double(), torch.tensor([[0, 0, 3.0]]).double()
    for i in range(7):
        w = i / 6
        angle = torch.tensor(w * math.pi / 2, dtype=torch.float64)
        expected = (2 + w) * torch.stack([angle.cos(), torch.zeros(()).double(), angle.sin()])
        torch.testing.assert_close(latents.spherical(a, b, w)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-8, 1e-5, 1e-3])
def test_ends_that_are_parallel_opposite_or_zero_stay_finite_and_between(eps):
    a = torch.tensor([[1.0, 0], [1.0, 0], [0, 0]]).double()
    b = torch.tensor([[2.0, eps], [-3.0, eps], [1.0, 0]]).double()
    for i in range(11):
        z = latents.spherical(a, b, i / 10)
        assert bool(z.isfinite().all()) and float(z.norm(dim=1).max()) <= 3 + 1e-6
    torch.testing.assert_close(
        latents.spherical(a, b, 0.5)[0], torch.tensor([1.5, eps / 2]).double(), rtol=0, atol=1e-3
    )


@every(GenerativeModel)
def test_the_path_is_a_circle_under_a_normal_prior_and_a_line_under_a_learned_one(case):
    model = case.model().double()
    try:
        space = latents.latent_space(model)
    except AbilityError:
        return
    if not isinstance(space, Continuous):
        with pytest.raises(AbilityError, match="codes"):
            latents.interpolation(model, torch.zeros(1), torch.zeros(1), 3)
        return
    a, b = normal(2, *space.shape), normal(2, *space.shape, name="b")
    middle = latents.interpolation(model, a, b, 3)[1]
    line = torch.allclose(middle, (a + b) / 2)
    assert line == (case.family in ("latent", "rae")) == (not latents.has_normal_prior(model))
    with pytest.raises(ValueError, match="at least 2"):
        latents.interpolation(model, a, b, 1)


# Traversals and directions


@every(GenerativeModel)
def test_a_traversal_changes_one_latent_alone(case):
    model = case.model().double()
    try:
        space = latents.latent_space(model)
    except AbilityError:
        return
    if not isinstance(space, Continuous):
        return
    z, y = normal(2, *space.shape), batch(model, 2)[1]
    D, values = z[0].numel(), torch.tensor([-1.0, 0.5, 2.0]).double()
    points = latents.traversal(z, D - 1, values)
    assert points.shape == (3, *z.shape)
    flat = points.flatten(2)
    assert torch.equal(flat[..., : D - 1], z.flatten(1)[None, :, : D - 1].expand(3, -1, -1))
    assert torch.equal(flat[..., D - 1], values[:, None].expand(3, 2))
    x = latents.traverse(model, z, D - 1, values, y)
    torch.testing.assert_close(x[1], latents.decode(model, points[1], y), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"0..{D - 1}"):
        latents.traversal(z, D, values)


def test_a_direction_on_a_linear_decoder_is_the_difference_of_the_classes():
    model = Linear()
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    x = normal(40, 3)
    without, having = (latents.encode(model, part) for part in (x, x + shift))
    direction = latents.attribute_direction(without, having)
    torch.testing.assert_close(direction, torch.linalg.solve(model.A, shift), rtol=1e-9, atol=1e-9)
    strengths = torch.tensor([0.0, 0.5, 1.0, -2.0]).double()
    moved = latents.decode_points(model, latents.along(without[:5], direction, strengths))
    expected = x[:5] + strengths.view(4, 1, 1) * shift
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)
    same = genzoo.add_direction(model, without[:5], direction, strengths, batch_size=3)
    torch.testing.assert_close(same, expected, rtol=1e-9, atol=1e-9)


def test_a_direction_needs_examples_and_real_latents():
    with pytest.raises(ValueError, match="examples of both classes, not 0 and 2"):
        latents.attribute_direction(torch.zeros(0, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="integers"):
        latents.attribute_direction(torch.zeros(2, 3).long(), torch.zeros(2, 3).long())


# Divergences of latents


@every(GenerativeModel)
def test_the_divergences_of_all_latents_sum_to_the_rate(case):
    model = case.model().double()
    x, y = batch(model, 5)
    with torch.no_grad():
        kl = latents.mean_divergences(model, x, y, rng=generator("rate"))
    assert (kl is not None) == (case.family in ("vae", "hvae"))
    if kl is not None:
        assert kl.shape == (math.prod(latents.latent_space(model).shape),) and float(kl.min()) >= -1e-12
        rate = model.loss(x, y, rng=generator("rate")).terms["rate"]
        torch.testing.assert_close(kl.sum(), rate, rtol=1e-9, atol=1e-9)


def test_a_collapsed_latent_carries_no_information():
    model = VAE((4,), latent_dim=3).double()
    last = [module for module in model.encoder.modules() if isinstance(module, nn.Linear)][-1]
    last.weight.data.normal_(generator=generator("weights"))
    for row in (1, 4):  # mean and log variance of the second latent
        last.weight.data[row], last.bias.data[row] = 0, 0
    kl = latents.mean_divergences(model, normal(20, 4))
    assert kl is not None and float(kl[1]) == 0 and float(kl[[0, 2]].min()) > 1e-3


# The interface for runs and models


def test_batches_do_not_change_the_result():
    model = genzoo.RealNVP((2,)).double()
    x = normal(7, 2)
    for batch_size in (1, 3, 7, 100):
        z = genzoo.encode(model, x, batch_size=batch_size)
        torch.testing.assert_close(z, model.encode(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(genzoo.reconstruct(model, x, batch_size=batch_size), x, rtol=1e-6, atol=1e-6)
        paths = genzoo.interpolate(model, z[:3], z[3:6], 5, batch_size=batch_size)
        expected = latents.interpolate(model, z[:3], z[3:6], 5)
        torch.testing.assert_close(paths, expected, rtol=1e-9, atol=1e-9)
        moved = genzoo.traverse(model, z, [1, 0], [0.5, -1.0], batch_size=batch_size)
        for i, dimension in enumerate((1, 0)):
            expected = latents.traverse(model, z, dimension, torch.tensor([0.5, -1.0]))
            torch.testing.assert_close(moved[i], expected, rtol=1e-9, atol=1e-9)


def test_conditions_follow_their_examples_through_batches_and_points():
    model = genzoo.VAE((1, 8, 8), ClassLabels(3), levels=17).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    x, y = torch.rand(5, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, 1, 0])
    z = genzoo.encode(model, x, y.numpy(), batch_size=2)
    torch.testing.assert_close(z, model.encode(x, y), rtol=1e-5, atol=1e-5)
    assert float((z - model.encode(x, y.flip(0).roll(1))).abs().max()) > 1e-3
    path = genzoo.interpolate(model, z, z.roll(1, 0), 3, y, batch_size=4)
    torch.testing.assert_close(path[0], model.decode(z, y), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(path[-1], model.decode(z.roll(1, 0), y), rtol=1e-5, atol=1e-5)


def test_arguments_that_do_not_fit_are_refused_in_one_line():
    model = genzoo.VAE((1, 8, 8), levels=17)
    x, z = torch.zeros(2, 1, 8, 8), torch.zeros(2, 16)
    bytes_, small = np.zeros((2, 1, 8, 8), np.uint8), torch.zeros(2, 1, 4, 4)
    wrong = [
        (lambda: genzoo.encode(model, bytes_), r"uint8 values, not floats.*\(k \+ 1/2\)/17"),
        (lambda: genzoo.encode(model, small), r"\(2, 1, 4, 4\), the model has \(N, 1, 8, 8\)"),
        (lambda: genzoo.encode(model, x[:0]), "no examples"),
        (lambda: genzoo.encode(model, x, batch_size=0), "batch_size=0"),
        (lambda: genzoo.decode(model, z[:, :3]), r"the model has \(N, 16\)"),
        (lambda: genzoo.decode(model, z.long()), "not floats"),
        (lambda: genzoo.interpolate(model, z, z[:1]), "2 and 1 latents"),
        (lambda: genzoo.interpolate(model, z, z, 1), "steps=1"),
        (lambda: genzoo.traverse(model, z, [16], [0.0]), r"0\.\.15"),
        (lambda: genzoo.traverse(model, z, [], [0.0]), r"0\.\.15"),
        (lambda: genzoo.encode(genzoo.GAN((2,)), torch.zeros(1, 2)), "GAN has no encoder"),
        (lambda: genzoo.encode(genzoo.Autoregressive((1, 4, 4), levels=4), torch.zeros(1, 1, 4, 4)), "has no latents"),
        (lambda: genzoo.decode(genzoo.VQVAE((1, 8, 8), levels=17), torch.full((1, 1, 2, 2), 512)), r"0\.\.511"),
        (lambda: genzoo.interpolate(genzoo.VQVAE((1, 8, 8), levels=17), z, z), "are codes"),
        (lambda: genzoo.encode(genzoo.VAE((2,), ClassLabels(2)), torch.zeros(2, 2), [0]), "1 conditions for 2"),
    ]  # fmt: skip
    for call, message in wrong:
        with pytest.raises((UsageError, AbilityError), match=rf"^[^\n]*{message}[^\n]*$"):
            call()
