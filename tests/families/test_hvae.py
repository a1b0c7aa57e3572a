r"""The hierarchy on a linear-Gaussian chain, where every law is known, and the order of its layers in a real network.

    z_1 ~ N(m, s_1^2),    z_2 | z_1 ~ N(a z_1 + b, s_2^2),    x | z ~ N(c z_2 + d z_1 + e, v I)

All conditionals of a joint normal law are normal, q(z_1 | x) and q(z_2 | z_1, x) among them, so that a hierarchy whose
posteriors are these reaches log p(x). Every term of its bound is a quadratic function of the noise, whose expectation a
Gauss-Hermite rule of three nodes gives exactly: nothing here is an average over random draws unless it says so.
"""

from __future__ import annotations

import functools
import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.distributions import Normal as TorchNormal

from genzoo.conditions import ClassLabels
from genzoo.distributions.discretization import bin_center
from genzoo.distributions.likelihoods import DiscretizedLogistic, Gaussian, LogisticMixture
from genzoo.families import hvae
from genzoo.families.hvae import HVAE
from genzoo.model import reconstruct
from genzoo.nn.ladder import Ladder
from genzoo.numerics.random import SampleStreams, generator

M, S1, A, B, S2, V = 0.4, 1.3, 0.7, -0.2, 0.6, 0.25
C, D, E = (torch.tensor(v).double() for v in ([1.0, -0.5, 0.2], [0.3, 0.8, -1.0], [0.1, 0.0, 2.0]))


def joint() -> tuple[Tensor, Tensor]:
    """Mean and covariance of (z_1, z_2, x), from each as a sum of independent noises."""
    rows = torch.zeros(5, 5).double()  # of (eps_1, eps_2, three noises of x)
    rows[0, 0] = S1
    rows[1, 0], rows[1, 1] = A * S1, S2
    rows[2:, 0], rows[2:, 1] = (C * A + D) * S1, C * S2
    rows[2:, 2:] = math.sqrt(V) * torch.eye(3)
    mean_2 = A * M + B
    mean = torch.cat([torch.tensor([M, mean_2], dtype=torch.float64), C * mean_2 + D * M + E])
    return mean, rows @ rows.T


def conditional(index: int, given: list[int]) -> tuple[Tensor, float, float]:
    """Return the weights, offset and standard deviation of one coordinate of the joint law given others."""
    mean, cov = joint()
    weights = torch.linalg.solve(cov[given][:, given], cov[given, index])
    return (
        weights,
        float(mean[index] - weights @ mean[given]),
        math.sqrt(cov[index, index] - weights @ cov[given, index]),
    )


LAW = MultivariateNormal(joint()[0][2:], joint()[1][2:, 2:])
Q1, Q2 = conditional(0, [2, 3, 4]), conditional(1, [0, 2, 3, 4])  # of z_1 given x, of z_2 given z_1 and x


class Link(nn.Module):
    """A rung of the chain; the stream holds the latents so far."""

    def __init__(self, prior, posterior, shift: float, spread: float):
        super().__init__()
        self.of_prior, self.of_posterior, self.shift, self.spread = prior, posterior, shift, spread

    def enter(self, h: Tensor, y: Tensor | None) -> Tensor:
        return h

    def prior(self, h: Tensor) -> tuple[Tensor, Tensor]:
        weights, offset, std = self.of_prior
        mean = (h[:, : len(weights)] * weights.view(-1, 1, 1)).sum(1, keepdim=True) + offset
        return torch.cat([mean, torch.full_like(mean, math.log(std))], 1), torch.zeros_like(h)

    def posterior(self, h: Tensor, x: Tensor) -> Tensor:
        weights, offset, std = self.of_posterior
        known = torch.cat([h[:, : len(weights) - 3], x[:, :, None, None]], 1)
        mean = (known * weights.view(-1, 1, 1)).sum(1, keepdim=True) + offset + self.shift
        return torch.cat([mean, torch.full_like(mean, math.log(std) + 0.5 * math.log(self.spread))], 1)

    def merge(self, h: Tensor, z: Tensor) -> Tensor:
        return torch.cat([h, z], 1)


class Chain(nn.Module):
    """The network of the hierarchy at the optimum, its posteriors then moved by ``shift`` and widened by ``spread``."""

    latents = [(1, 1, 1), (1, 1, 1)]

    def __init__(self, shift: float = 0.0, spread: float = 1.0):
        super().__init__()
        first = torch.zeros(0).double(), M, S1
        second = torch.tensor([A], dtype=torch.float64), B, S2
        self.rungs = nn.ModuleList([Link(first, Q1, shift, spread), Link(second, Q2, shift, spread)])

    def bottom_up(self, x: Tensor) -> list[Tensor]:
        return [x, x]

    def top(self, n: int) -> Tensor:
        return torch.zeros(n, 0, 1, 1).double()

    def output(self, h: Tensor) -> Tensor:
        return h[:, :1, 0, 0] * D + h[:, 1:, 0, 0] * C + E


def chain(shift: float = 0.0, spread: float = 1.0, **settings) -> HVAE:
    model = HVAE((3,), network=lambda *shapes: Chain(shift, spread), likelihood=Gaussian(), **settings).double()
    nn.init.constant_(model.likelihood.log_var, math.log(V))
    return model.requires_grad_(False)


def data(n: int) -> Tensor:
    return LAW.sample((n,))


def expected(monkeypatch: pytest.MonkeyPatch, x: Tensor, function) -> Tensor:
    """Expect a quadratic function of the noise of both layers: nine evaluations, weighed by Gauss and Hermite."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    weights = weights / math.sqrt(2 * math.pi)
    total = torch.zeros(()).double()
    for i, j in itertools.product(range(3), repeat=2):
        eps = torch.tensor([nodes[i], nodes[j]]).expand(len(x), 2)
        with monkeypatch.context() as patch:
            patch.setattr(hvae, "randn", lambda shape, eps=eps, **_: eps)
            total = total + weights[i] * weights[j] * function(x)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The bound.


@pytest.mark.parametrize("num_samples", [2, 7])
def test_with_the_exact_posteriors_the_bound_is_the_likelihood_at_every_draw(num_samples):
    """p(x, z)/q(z | x) = p(x) whatever z: not one draw may deviate."""
    x = data(50)
    value, stderr = chain().log_prob(x, num_samples=num_samples)
    torch.testing.assert_close(value, LAW.log_prob(x), atol=1e-9, rtol=0)
    assert stderr.max() < 1e-9


def test_with_the_exact_posteriors_the_elbo_is_the_likelihood(monkeypatch):
    x, model = data(50), chain()
    elbo = expected(monkeypatch, x, lambda x: model.log_prob(x).value)
    torch.testing.assert_close(elbo, LAW.log_prob(x), atol=1e-9, rtol=0)
    loss = expected(monkeypatch, x, lambda x: model.loss(x).total)
    torch.testing.assert_close(loss, -LAW.log_prob(x).mean() / 3, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("shift", "spread"), [(0.2, 1.0), (0.0, 2.0), (-0.1, 0.5)])
def test_wrong_posteriors_cost_the_sum_of_their_divergences_from_the_exact_ones(monkeypatch, shift, spread):
    x, model = data(20), chain(shift, spread)
    elbo = expected(monkeypatch, x, lambda x: model.log_prob(x).value)
    # A shift of q(z_1) moves the mean of q(z_2 | z_1) as it moves that of the exact one: only its own shift counts.
    cost = sum(0.5 * (spread - 1 - math.log(spread) + (shift / std) ** 2) for _, _, std in (Q1, Q2))
    torch.testing.assert_close(elbo, LAW.log_prob(x) - cost, atol=1e-9, rtol=0)


def test_the_rate_of_each_layer_is_its_closed_form(monkeypatch):
    """KL against the prior of that layer, which is neither N(0, 1) nor the same for all z_1."""
    x, model = data(20), chain()
    mean_1 = x @ Q1[0] + Q1[1]
    prior = TorchNormal(torch.full_like(mean_1, M), S1)
    first = kl_divergence(TorchNormal(mean_1, Q1[2]), prior).mean()
    # Over z_1 ~ q the gap of the means of q(z_2 | z_1, x) and p(z_2 | z_1) is normal: its square is mean^2 + variance.
    slope = Q2[0][0] - A
    gap = slope * mean_1 + x @ Q2[0][1:] + Q2[1] - B
    square = gap**2 + (slope * Q1[2]) ** 2
    second = (math.log(S2 / Q2[2]) + (Q2[2] ** 2 + square) / (2 * S2**2) - 0.5).mean()
    terms = expected(monkeypatch, x, lambda x: torch.stack(list(model.loss(x).terms.values())))
    names = list(model.loss(x).terms)
    assert names == ["distortion", "rate", "rate_0", "rate_1"]
    torch.testing.assert_close(terms[1:], torch.stack([first + second, first, second]), atol=1e-9, rtol=0)


def test_importance_weighted_bounds_rise_with_the_number_of_draws_towards_the_likelihood():
    x = data(4000)
    model, truth = chain(0.15, 1.5), float(LAW.log_prob(x).mean())
    gaps = [truth - float(model.log_prob(x, num_samples=k).value.mean()) for k in (1, 2, 5, 20, 100)]
    assert all(fewer > 1.5 * more > 0 for fewer, more in pairwise(gaps)), gaps
    assert gaps[-1] < 0.02


def test_what_the_loss_charges_never_touches_the_bound():
    x, plain = data(20), chain(0.3)
    charged = chain(0.3, beta=4.0, warmup=1000, free_bits=2.0)
    terms = plain.loss(x, rng=generator(0)).terms
    for k in (1, 3):
        for _ in range(2):  # before and after the warm-up has moved
            values = [model.log_prob(x, num_samples=k, rng=generator(k)).value for model in (plain, charged)]
            assert torch.equal(*values)
            charged.train().after_step(charged.loss(x).aux, len(x))
    assert charged.cost.seen == 2 * 2 * len(x)
    charged.cost.seen.fill_(500)
    total, said, _ = charged.loss(x, rng=generator(0))
    rate = sum(max(2.0, float(terms[f"rate_{i}"])) for i in range(2))
    assert float(total) == pytest.approx((float(terms["distortion"]) + 4 * 0.5 * rate) / 3, rel=1e-12)
    assert all(torch.equal(said[name], terms[name]) for name in terms), "what is logged is what the bound is made of"


# ---------------------------------------------------------------------------------------------------------------------
# Latents and samples.


def test_the_latent_of_an_event_is_the_noise_of_the_priors():
    x, model = data(30), chain()
    z_1 = x @ Q1[0] + Q1[1]
    z_2 = torch.cat([z_1[:, None], x], 1) @ Q2[0] + Q2[1]
    eps = torch.stack([(z_1 - M) / S1, (z_2 - A * z_1 - B) / S2], 1)
    assert model.latent.shape == (2,)
    torch.testing.assert_close(model.encode(x), eps, atol=1e-12, rtol=0)
    torch.testing.assert_close(reconstruct(model, x), z_2[:, None] * C + z_1[:, None] * D + E, atol=1e-12, rtol=0)


def test_to_decode_noise_is_to_sample():
    model = chain()
    eps = SampleStreams(3, range(5)).draw("normal", (5, 2)).double()
    assert torch.equal(model.decode(eps), model.sample(5, rng=SampleStreams(3, range(5))).x)
    z_1 = M + S1 * eps[:, :1]
    torch.testing.assert_close(model.decode(eps), (A * z_1 + B + S2 * eps[:, 1:]) * C + z_1 * D + E, atol=1e-12, rtol=0)


@pytest.mark.parametrize("spread", [1.0, 2.0])
def test_inferred_noise_has_the_density_that_it_claims(spread):
    """Two draws of the noise weigh the event as the two of the importance-weighted bound do."""
    x, model, rng = data(40), chain(0.5 * (spread - 1), spread), generator(1)
    bound = model.log_prob(x, num_samples=2, rng=generator(1)).value
    weights = []
    for _ in range(2):
        eps, log_q = model.infer(x, rng=rng)
        weights.append(model.log_likelihood(x, eps) + TorchNormal(0, 1).log_prob(eps).sum(1) - log_q)
    torch.testing.assert_close(torch.logaddexp(*weights) - math.log(2), bound, atol=1e-9, rtol=0)
    if spread == 1.0:  # with the exact posteriors whatever the draw
        torch.testing.assert_close(weights[0], LAW.log_prob(x), atol=1e-9, rtol=0)


def test_samples_follow_the_law_of_the_model():
    n = 200_000
    x = chain(sample_likelihood=True).sample(n).x
    error = LAW.variance.sqrt() / math.sqrt(n)
    assert ((x.mean(0) - LAW.mean).abs() < 4 * error).all()
    torch.testing.assert_close(torch.cov(x.T), LAW.covariance_matrix, atol=0.03, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# With the network.

SMALL = functools.partial(Ladder, width=8, latent_channels=2, up=2, down=[2, 1, 2], bottleneck=1.0)


def moved(likelihood, levels: int | None = 17, condition: ClassLabels | None = None, **settings) -> HVAE:
    """A model of 8x8 images with random weights: fresh ones hide much, their priors being N(0, 1)."""
    model = HVAE(
        (1, 8, 8),
        condition,
        network=SMALL,
        likelihood=likelihood,
        levels=levels,
        **settings,
    ).double()
    rng = generator("moved")
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
    return model.requires_grad_(False).eval()


def descended(model: HVAE, x: Tensor, eps: Tensor) -> list[hvae.Layer]:
    return model._top_down(eps, None, model.network.bottom_up(model.likelihood.encoder_input(x)))[1]


def test_each_layer_depends_on_the_noise_above_it_and_on_no_other():
    """Nor may the order of layers and of parts of the latent differ: top first, 1x1, 1x1, 4x4, 8x8, 8x8."""
    model = moved(LogisticMixture(17, components=2))
    x, eps = torch.rand(3, 1, 8, 8).double() * 2 - 1, torch.randn(3, *model.latent.shape).double()
    sizes = [2, 2, 2 * 16, 2 * 64, 2 * 64]
    assert model.sizes == sizes and model.latent.shape == (sum(sizes),)
    before, start = descended(model, x, eps), 0
    for depth, size in enumerate(sizes):
        other = eps.clone()
        other[:, start : start + size] += 1.0
        start += size
        for k, (was, now) in enumerate(zip(before, descended(model, x, other), strict=True)):
            laws = zip((*was.prior, *was.posterior), (*now.prior, *now.posterior), strict=True)
            same = all(torch.equal(*pair) for pair in laws)
            assert same == (k <= depth), (k, depth)
            assert torch.equal(was.z, now.z) == (k < depth)


def test_to_decode_is_to_walk_down_the_network_by_hand():
    model = moved(DiscretizedLogistic(17))
    eps, start = torch.randn(3, *model.latent.shape).double(), 0
    h = model.network.top(3)
    for rung, (Z, *size) in zip(model.network.rungs, model.network.latents, strict=True):
        h = rung.enter(h, None)
        moments, features = rung.prior(h)
        stop = start + Z * math.prod(size)
        z = moments[:, :Z] + moments[:, Z:].exp() * eps[:, start:stop].reshape(3, Z, *size)
        h = rung.merge(h + features, z)
        start = stop
    assert torch.equal(model.decode(eps), model.likelihood.mean(model.network.output(h)))
    assert features.any()


def test_the_bound_is_made_of_the_laws_that_torch_knows():
    model = moved(LogisticMixture(17, components=2))
    x = torch.rand(4, 1, 8, 8).double() * 2 - 1
    eps = torch.randn(4, *model.latent.shape, generator=generator(5), dtype=torch.float64)
    layers = descended(model, x, eps)
    laws = [[TorchNormal(law.mean, law.log_std.exp()) for law in (layer.posterior, layer.prior)] for layer in layers]
    params = model._top_down(eps, None, model.network.bottom_up(model.likelihood.encoder_input(x)))[0]
    rate = sum(kl_divergence(q, p).flatten(1).sum(1) for q, p in laws)
    elbo = model.likelihood.log_prob(params, x) - rate
    torch.testing.assert_close(model.log_prob(x, rng=generator(5)).value, elbo, atol=1e-9, rtol=0)

    rng, weights = generator(6), []
    for _ in range(3):
        eps = torch.randn(4, *model.latent.shape, generator=rng, dtype=torch.float64)
        params, layers = model._top_down(eps, None, model.network.bottom_up(model.likelihood.encoder_input(x)))
        weight = model.likelihood.log_prob(params, x)
        for q, p, z in [
            (*(TorchNormal(law.mean, law.log_std.exp()) for law in (layer.posterior, layer.prior)), layer.z)
            for layer in layers
        ]:
            weight = weight + (p.log_prob(z) - q.log_prob(z)).flatten(1).sum(1)
        weights.append(weight)
    expected = torch.stack(weights).logsumexp(0) - math.log(3)
    torch.testing.assert_close(model.log_prob(x, num_samples=3, rng=generator(6)).value, expected, atol=1e-9, rtol=0)


def test_a_fresh_hierarchy_starts_at_standard_normal_priors():
    model = HVAE((1, 8, 8), network=SMALL, likelihood=DiscretizedLogistic(17), levels=17)
    for layer in model._top_down(torch.randn(2, *model.latent.shape), None)[1]:
        assert not layer.prior.mean.any() and not layer.prior.log_std.any()
    assert 0 < float(model.loss(torch.rand(4, 1, 8, 8)).terms["rate"]) < 50


def test_images_are_snapped_to_their_levels_before_they_are_seen():
    """The posterior of a discrete event may not depend on the noise of its dequantisation: the bound would be none."""
    model = moved(DiscretizedLogistic(17))
    centre = bin_center(torch.randint(17, (4, 1, 8, 8)), 17, torch.float64)
    for shift in (-0.9 / 17, 0.9 / 17):
        for k in (1, 3):
            values = [model.log_prob(x, num_samples=k, rng=generator(0)).value for x in (centre + shift, centre)]
            assert torch.equal(*values)
        assert torch.equal(
            model.loss(centre + shift, rng=generator(0)).total, model.loss(centre, rng=generator(0)).total
        )
        assert torch.equal(model.encode(centre + shift), model.encode(centre))


def test_a_density_of_images_sees_and_scores_their_values_as_they_are():
    """A Gaussian likelihood knows no levels: the bound is that of the density of the dequantised values."""
    model = moved(Gaussian())
    x = torch.rand(3, 1, 8, 8).double() * 2 - 1
    eps = torch.randn(3, *model.latent.shape, generator=generator(0), dtype=torch.float64)
    mean, layers = model._top_down(eps, None, model.network.bottom_up(x))
    log_likelihood = TorchNormal(mean, (0.5 * model.likelihood.log_var).exp()).log_prob(x).flatten(1).sum(1)
    elbo = log_likelihood - sum(layer.divergence().flatten(1).sum(1) for layer in layers)
    torch.testing.assert_close(model.log_prob(x, rng=generator(0)).value, elbo, atol=1e-9, rtol=0)


def test_classes_reach_prior_posterior_and_output():
    model = moved(DiscretizedLogistic(17), condition=ClassLabels(3))
    eps, x = torch.randn(1, *model.latent.shape).double(), torch.rand(1, 1, 8, 8).double()
    one, two = (model._top_down(eps, torch.tensor([y]), model.network.bottom_up(x))[1] for y in (0, 2))
    assert not torch.equal(one[0].prior.mean, two[0].prior.mean)
    assert not torch.equal(one[0].posterior.mean, two[0].posterior.mean)
    assert not torch.equal(model.decode(eps, torch.tensor([0])), model.decode(eps, torch.tensor([2])))


def test_bfloat16_networks_leave_the_bound_in_float32():
    model = moved(LogisticMixture(17, components=2)).float()
    x = torch.rand(6, 1, 8, 8) * 2 - 1
    exact = model.loss(x, rng=generator(2))
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.loss(x, rng=generator(2))
        value = model.log_prob(x, num_samples=2, rng=generator(2)).value
    assert value.dtype == rough.total.dtype == torch.float32
    assert float(rough.total) == pytest.approx(float(exact.total), rel=0.03)


def test_refusals():
    with pytest.raises(ValueError, match="has 17 levels, the data levels=256"):
        HVAE((1, 8, 8), network=SMALL, likelihood=DiscretizedLogistic(17), levels=256)
    with pytest.raises(ValueError, match="num_samples must be at least 1, not 0"):
        chain().log_prob(data(2), num_samples=0)
    with pytest.raises(ValueError, match="free_bits must not be negative"):
        chain(free_bits=-1.0)
