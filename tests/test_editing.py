"""Posteriors by ability: raster continuations by enumeration, Langevin on a linear decoder, and what coverage must be."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn

from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.inverse import DPS, Downsampling, Identity, Inpainting, MomentMatching, Observation
from genzoo.diffusion.samplers import DDIM, AdaptiveODE
from genzoo.distributions.discretization import bin_center, quantize
from genzoo.editing.langevin import Langevin
from genzoo.editing.posterior import Posterior, choose, degrade, draw_posterior
from genzoo.errors import UsageError
from genzoo.evaluation.calibration import central_coverage
from genzoo.evaluation.restoration import restoration_scores
from genzoo.event import EventSpec
from genzoo.families.autoregressive import Autoregressive
from genzoo.families.ddpm import DDPM
from genzoo.families.flow_matching import FlowMatching
from genzoo.families.gan import GAN
from genzoo.families.vae import VAE
from genzoo.families.vqvae import VQVAE
from genzoo.model import Causal, Composite, Continuous, Decoder, GenerativeModel, Loss, Samples
from genzoo.numerics.random import SampleStreams, generator, randn
from tests.inverse_laws import Dense, Problem
from tests.test_interface import every


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator("normal", *shape), dtype=torch.float64)


# Coverage


@pytest.mark.parametrize("K", [1, 2, 5, 16])
def test_the_coverage_of_exact_draws_is_nominal_whatever_their_number(K):
    """Draws of a Gaussian posterior: truth and draws from one law given the observation."""
    n, levels = 200_000, (0.1, 0.5, 0.8, 0.9, 0.99)
    mean = normal(n)
    truth, draws = mean + normal(n, 1)[:, 0], mean + normal(K, n)
    found = central_coverage(truth, draws, levels).mean(1)
    torch.testing.assert_close(found, torch.tensor(levels).double(), atol=4e-3, rtol=0)


def test_coverage_is_the_average_over_ranks_in_closed_form():
    K = 4
    draws = torch.arange(K).double()[:, None].expand(K, K + 1)
    truth = torch.arange(K + 1).double() - 0.5  # one truth of each rank
    for p in (0.2, 0.5, 0.9):
        found = central_coverage(truth, draws, [p])[0]
        edges = [(r / 5, (r + 1) / 5) for r in range(5)]
        expected = [max(0.0, min(high, (1 + p) / 2) - max(low, (1 - p) / 2)) * 5 for low, high in edges]
        assert found.tolist() == pytest.approx(expected) and float(found.mean()) == pytest.approx(p)


def test_ties_of_integer_levels_leave_the_coverage_nominal():
    rng = generator("levels")
    rate = torch.rand(100_000, generator=rng) * 2
    truth, *draws = (torch.poisson(rate, generator=rng) for _ in range(7))
    found = central_coverage(truth, torch.stack(draws)).mean(1)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.8, 0.9]).double(), atol=4e-3, rtol=0)
    unequal = (torch.stack(draws) != truth).any(0)  # a symmetric condition keeps it
    assert 0.05 < float((~unequal).double().mean()) < 0.5
    found = central_coverage(truth, torch.stack(draws))[:, unequal].mean(1)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.8, 0.9]).double(), atol=5e-3, rtol=0)


def test_overconfident_and_timid_draws_are_told_by_their_coverage():
    truth = normal(50_000, 1)[:, 0]
    narrow, wide = (scale * normal(15, 50_000) for scale in (0.5, 2.0))
    assert (
        float(central_coverage(truth, narrow)[2].mean()) < 0.7 < 0.97 < float(central_coverage(truth, wide)[2].mean())
    )


def test_scores_of_images_are_of_bytes_and_of_unknown_pixels():
    levels, B, K = 17, 40, 6
    rng = generator("images")
    p = 0.2 + 0.6 * torch.rand(B, 1, 8, 8, generator=rng)
    truth, *draws = (torch.bernoulli(p, generator=rng).long() * 16 for _ in range(K + 1))
    x = bin_center(torch.stack(draws, 1), levels)
    unknown = (torch.arange(64) < 32).view(1, 8, 8)
    scores = restoration_scores(truth, x, levels, unknown)
    truth[:, :, 5] = 0  # known pixels do not count in the coverage
    again = restoration_scores(truth, x, levels, unknown)
    assert scores["coverage_80"] == again["coverage_80"] and scores["psnr_draw"] != again["psnr_draw"]
    white = torch.full((2, 1, 1, 1), 16)
    draw = bin_center(torch.full((2, 3, 1, 1, 1), 8), levels)
    assert restoration_scores(white, draw, levels, None)["psnr_mean"].value == pytest.approx(
        20 * torch.log10(torch.tensor(255 / 127)).item(), abs=1e-3
    )
    assert "ssim_mean" not in scores  # whose window does not fit


def test_ssim_is_that_of_torchmetrics_where_its_window_fits():
    from torchmetrics.functional.image import structural_similarity_index_measure

    rng = generator("ssim")
    truth = torch.randint(256, (2, 3, 12, 12), generator=rng)
    draws = bin_center((truth[:, None] + torch.randint(-40, 41, (2, 4, 3, 12, 12), generator=rng)).clamp(0, 255), 256)
    scores = restoration_scores(truth, draws, 256, None)
    for name, x in (("mean", draws.mean(1)), ("draw", draws[:, 0])):
        shown = quantize(x, 256).double() / 255
        expected = structural_similarity_index_measure(shown, truth.double() / 255, data_range=1.0)
        assert scores[f"ssim_{name}"].value == pytest.approx(float(expected))
    assert scores["ssim_mean"].value > scores["ssim_draw"].value


def test_scores_of_vectors_are_distances():
    truth = torch.zeros(3, 2)
    draws = torch.tensor([3.0, 5.0]).view(1, 2, 1).expand(3, 2, 2)
    scores = restoration_scores(truth, draws, None, None)
    assert (scores["rmse_mean"].value, scores["rmse_draw"].value) == (4.0, 3.0)


# Autoregressive models


def tiny_ar(**more) -> Autoregressive:
    torch.manual_seed(3)
    model = Autoregressive(EventSpec((1, 2, 2), 2), **more).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
    return model


def test_a_continuation_is_a_draw_of_the_conditional_distribution():
    """All sixteen images of 2x2 pixels and 2 levels are enumerated."""
    model, n = tiny_ar(), 4000
    images = torch.tensor(list(itertools.product([0, 1], repeat=4))).view(16, 1, 2, 2)
    log_p = model.log_prob(bin_center(images, 2).double()).value
    unknown = torch.tensor([[[False, False], [True, True]]])
    operator = Inpainting((1, 2, 2), unknown)
    for first in (0, 1):
        known = torch.tensor([first, 1 - first])
        value = bin_center(known, 2).double().expand(n, 2)
        build = choose(model, operator, 0.0, None, None)
        x = build(Observation(operator, value))(model, n, None, generator("continuation", first)).x
        assert torch.equal(operator(x), value)
        bits = quantize(x, 2).flatten(1)
        share = torch.bincount(2 * bits[:, 2] + bits[:, 3], minlength=4) / n
        alike = (images.flatten(1)[:, :2] == known).all(1)
        torch.testing.assert_close(share.double(), log_p[alike].softmax(0), atol=0.025, rtol=0)


def test_nothing_known_is_a_sample_and_everything_known_is_kept():
    model = tiny_ar()
    x = bin_center(torch.randint(2, (5, 1, 2, 2), generator=generator("x")), 2).double() + 0.1
    streams = lambda: SampleStreams(0, range(5))  # noqa: E731
    assert torch.equal(model.complete(x, 0, rng=streams()).x, model.sample(5, rng=streams()).x)
    assert torch.equal(model.complete(x, 4, rng=streams()).x, x)


@pytest.mark.parametrize("patch", [1, 2])
def test_the_order_is_that_in_which_pixels_depend_on_each_other(patch):
    torch.manual_seed(0)
    model = Autoregressive(EventSpec((3, 4, 4), 4), patch=patch).eval()
    order = model.order()
    assert sorted(set(order.flatten().tolist())) == list(range((4 // patch) ** 2)) and order.shape == (3, 4, 4)
    k = torch.randint(4, (1, 3, 4, 4), generator=generator("k"))
    for known in (1, (4 // patch) ** 2 - 1):
        changed = torch.where(order < known, k, (k + 1) % 4)
        streams = lambda: SampleStreams(0, [0])  # noqa: E731
        a, b = (model.complete(bin_center(v, 4), known, rng=streams()).x for v in (k, changed))
        assert torch.equal(a, b)  # unknown pixels are ignored


@every(Causal)
def test_every_causal_model_keeps_what_is_known(case):
    model = case.model()
    y = None if model.condition is None else torch.arange(4) % model.condition.n
    x = model.sample(4, y, rng=SampleStreams(1, range(4))).x
    order = model.order()
    known = int(order.max()) // 2 + 1
    found = model.complete(x, known, y, rng=SampleStreams(0, range(4))).x
    kept = order < known
    assert torch.equal(found[:, kept], x[:, kept]) and not torch.equal(found[:, ~kept], x[:, ~kept])


# Latents


class Linear(Decoder):
    """x = W z + b."""

    def __init__(self, W: Tensor, b: Tensor):
        super().__init__(EventSpec((len(b),)))
        self.latent = Continuous((W.shape[1],))
        self.W, self.b = W, b
        self.double()

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        return z @ self.W.T + self.b

    def _loss(self, x, y, rng) -> Loss:
        raise AssertionError("nothing is trained")

    def _sample(self, n, y, rng) -> Samples:
        return Samples(self._decode(randn((n, *self.latent.shape), rng=rng, dtype=torch.float64), y), 1)


def linear_problem(s: float) -> tuple[Linear, Problem]:
    W = torch.tensor([[1.0, 0.3], [-0.5, 0.8], [0.2, 1.2]], dtype=torch.float64)
    b = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64)
    A = torch.tensor([[1.0, -1.0, 0.5]], dtype=torch.float64)
    return Linear(W, b), Problem(b, W @ W.T, A, torch.tensor([1.0], dtype=torch.float64), s)


@pytest.mark.parametrize("s", [0.3, 0.05])
def test_langevin_draws_the_posterior_of_a_linear_decoder(s):
    model, p = linear_problem(s)
    n = 8000
    observation = Observation(Dense(p.A), p.value.expand(n, 1), s)
    samples = Langevin(observation, steps=400, min_sigma=0.01)(model, n, None, generator("langevin"))
    posterior = p.posterior
    error = posterior.covariance.diagonal().sqrt()
    assert float(((samples.x.mean(0) - posterior.mean) / error).abs().max()) < 0.06
    assert float((samples.x.T.cov() - posterior.covariance).abs().max() / error.max() ** 2) < 0.07
    assert samples.nfe == 2 * 401 + 1


def test_a_proposal_is_accepted_by_the_ratio_of_metropolis_and_hastings():
    """log p(z') q(z | z') - log p(z) q(z' | z), with normal densities written out."""
    model, p = linear_problem(0.3)
    langevin = Langevin(Observation(Dense(p.A), p.value.expand(5, 1), 0.3), steps=4)
    z, z_new, h = normal(5, 2), 0.5 * normal(5, 2) + 0.2, 0.1
    start, proposed = (langevin.at(model, point, None) for point in (z, z_new))

    def log_p(z: Tensor) -> Tensor:
        residual = p.value - model.decode(z) @ p.A.T
        return -0.5 * z.square().sum(1) - 0.5 * residual.square().sum(1) / 0.09

    def log_q(to: Tensor, start: Tensor) -> Tensor:
        start = start.clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_p(start).sum(), start)
        return torch.distributions.Normal(start + h * slope, (2 * h) ** 0.5).log_prob(to).sum(1)

    expected = log_p(z_new) + log_q(z, z_new) - log_p(z) - log_q(z_new, z)
    found = langevin.log_ratio(start, proposed, torch.full((5, 1), h).double(), 0.3)
    torch.testing.assert_close(found, expected.detach())


@every(Decoder)
def test_every_decoder_with_continuous_latents_is_edited_and_keeps_what_is_known(case):
    model = case.model()
    if isinstance(model, Composite | Denoiser) or not isinstance(model.latent, Continuous):
        return  # refused, or with solvers of their own
    y = None if model.condition is None else torch.arange(3) % model.condition.n
    unknown = (torch.arange(model.dim) % 2 == 0).view(model.shape)
    operator = Inpainting(model.shape, unknown)
    value = operator(model.sample(3, y, rng=SampleStreams(1, range(3))).x)
    build = choose(model, operator, 0.0, functools.partial(Langevin, steps=6), None)
    x = build(Observation(operator, value))(model, 3, y, SampleStreams(0, range(3))).x
    assert torch.equal(operator(x), value) and bool(x.isfinite().all())
    z = torch.zeros(3, *model.latent.shape)
    with torch.no_grad():
        smooth, decoded = model.decode_smooth(z, y), model.decode(z, y)
    # Rounded to the centre of a bin, at most half of its width away.
    within = 0.0 if model.levels is None else 1 / model.levels + 1e-5
    assert float((smooth.clamp(-1, 1) - decoded.clamp(-1, 1)).abs().max()) <= within


# Choices


def test_draws_depend_on_seed_and_index_alone_and_keep_their_observations():
    model = DDPM((2,)).eval()
    operator = Inpainting((2,), torch.tensor([False, True]))
    value = torch.tensor([[0.1], [0.2], [0.3]])
    build = choose(model, operator, 0.0, None, DDIM(5, eta=1.0))
    draw = functools.partial(draw_posterior, model, build, operator, value, 0.0, 4, seed=2)
    whole, parts = draw(batch_size=64), draw(batch_size=5)
    torch.testing.assert_close(whole.draws, parts.draws)
    assert whole.draws.shape == (3, 4, 2) and torch.equal(whole.draws[..., 0], value.expand(3, 4))
    assert whole.draws[..., 1].std(1).min() > 0 and whole.nfe == parts.nfe > 5
    torch.testing.assert_close(whole.mean, whole.draws.sum(1) / 4)
    assert torch.equal(Posterior(whole.draws[:, :1], 1).std, torch.zeros(3, 2))


def test_observations_have_noise_of_their_own_level():
    x = torch.zeros(400, 1, 8, 8)
    value = degrade(x, Downsampling((1, 8, 8), 2), 0.3, 0)
    assert float(value.std()) == pytest.approx(0.3, rel=0.05) and float(value.mean()) == pytest.approx(0, abs=0.02)
    assert torch.equal(degrade(x[:3], Downsampling((1, 8, 8), 2), 0.3, 0), value[:3])
    draw = randn((3, 1, 4, 4), rng=SampleStreams(0, range(3)))
    assert not torch.allclose(value[:3], 0.3 * draw)  # not the noise of the samples


def test_what_a_family_cannot_do_is_refused():
    bottom, top = (torch.arange(16).view(1, 4, 4) >= 8, torch.arange(16).view(1, 4, 4) < 8)
    shape, levels = (1, 4, 4), 4
    fill, denoise = Inpainting(shape, bottom), Identity(shape)
    images = EventSpec(shape, levels)
    ddpm, ar, vqvae = DDPM(images), Autoregressive(images), VQVAE(images)
    vae, gan = VAE(images), GAN(images)
    for model, operator, sigma, method, sampler, message in (
        (vqvae, fill, 0.0, None, None, "neither a denoiser"),
        (ar, Inpainting(shape, top), 0.0, None, None, "raster order"),
        (ar, denoise, 0.3, None, None, "without noise"),
        (ar, fill, 0.1, None, None, "without noise"),
        (ar, fill, 0.0, Langevin, None, "omit it"),
        (vae, fill, 0.0, MomentMatching, None, "choose langevin"),
        (gan, fill, 0.0, functools.partial(DPS, zeta=1.0), None, "choose langevin"),
        (ddpm, fill, 0.0, Langevin, None, "is a denoiser"),
        (ddpm, fill, 0.0, None, AdaptiveODE(), "fixed steps"),
        (FlowMatching((2,), pairing="optimal_transport"), Inpainting((2,), torch.tensor([True, False])), 0.0, None, None,
         "coupled pairs"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            choose(model, operator, sigma, method, sampler)
    with pytest.raises(ValueError, match="continuous latents"):
        Langevin(Observation(fill, torch.zeros(1, 8)))(vqvae, 1)
    with pytest.raises(ValueError, match="not of 2 events"):
        Langevin(Observation(fill, torch.zeros(1, 8)))(vae, 2)
    for arguments in ({"steps": 1}, {"min_sigma": 0.0}):
        with pytest.raises(ValueError, match="steps must be at least 2"):
            Langevin(Observation(fill, torch.zeros(1, 8)), **arguments)
    assert isinstance(ar, GenerativeModel) and isinstance(vae, nn.Module)
