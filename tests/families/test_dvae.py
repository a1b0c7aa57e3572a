"""The discrete VAE by enumeration of all of its codes, where its posterior is exact and where it is not."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from genzoo.conditions import ClassLabels
from genzoo.distributions import likelihoods
from genzoo.distributions.discretization import bin_center
from genzoo.distributions.likelihoods import DiscretizedLogistic, Gaussian
from genzoo.event import EventSpec
from genzoo.families.autoregressive import Autoregressive
from genzoo.families.dvae import DVAE
from genzoo.families.latent import latent
from genzoo.model import Bound, Discrete
from genzoo.nn.mlp import MLP
from genzoo.nn.transformer import Transformer
from genzoo.numerics.random import generator
from tests.exact import network

K, N = 3, 2
LOG_VAR = -1.0
VALUES = torch.tensor([[-1.0, 0.3, 1.5], [0.8, -0.2, -1.1]], dtype=torch.float64)  # of each coordinate, by code
small = functools.partial(MLP, width=16, depth=1)


def plane(**settings) -> DVAE:
    """Build a model of points in float64, whose posterior is far from exact."""
    torch.manual_seed(0)
    settings = {"codebook_size": K, "embedding_dim": 4, "tokens": N, "likelihood": Gaussian(log_var=LOG_VAR)} | settings
    model = DVAE((2,), encoder=small, decoder=small, **settings).double()
    with torch.no_grad():
        for parameter in [*model.encoder.parameters(), *model.decoder.parameters()]:
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def exact() -> DVAE:
    """Build a model whose code n decides coordinate n alone, so that the posterior is independent, with the exact one."""

    def encoder(x: Tensor, y: Tensor | None) -> Tensor:
        log_p = -0.5 * (x[:, None, :, None] - VALUES.T[None, :, :, None]) ** 2 / math.exp(LOG_VAR)
        return log_p + 7.0  # (B, K, N, 1); a constant changes nothing

    def decoder(e: Tensor, y: Tensor | None) -> Tensor:
        return torch.einsum("bkn,nk->bn", e[..., 0], VALUES)

    model = DVAE(
        (2,), encoder=network(encoder), decoder=network(decoder), likelihood=Gaussian(log_var=LOG_VAR),
        codebook_size=K, embedding_dim=K, tokens=N,
    ).double()  # fmt: skip
    with torch.no_grad():
        model.codes.copy_(torch.eye(K))
    return model


def points(n: int) -> Tensor:
    return torch.randn(n, 2, generator=generator("points"), dtype=torch.float64)


def all_codes() -> Tensor:
    return torch.tensor(list(itertools.product(range(K), repeat=N))).view(-1, 1, N, 1)


@torch.no_grad()
def enumerated(model: DVAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p(x) and the evidence lower bound of each point, by sums over all codes."""
    z = all_codes()
    log_p = torch.stack([model.log_likelihood(x, code.expand(len(x), -1, -1, -1)) for code in z], dim=1)
    log_joint = log_p - N * math.log(K)
    log_q_n = model.posterior(x)[..., 0]  # (B, K, N)
    log_q = torch.stack([sum(log_q_n[:, int(code[0, n, 0]), n] for n in range(N)) for code in z], dim=1)
    torch.testing.assert_close(log_q.exp().sum(1), torch.ones(len(x)).double())
    return log_joint.logsumexp(1), (log_q.exp() * (log_joint - log_q)).sum(1)


# The bound


@pytest.mark.parametrize("num_samples", [2, 5])
def test_with_the_exact_posterior_the_bound_is_the_likelihood_at_every_draw(num_samples):
    x, model = points(40), exact()
    assert model.bound is Bound.LOWER
    value, stderr = model.log_prob(x, num_samples=num_samples, rng=generator(0))
    truth, elbo = enumerated(model, x)
    torch.testing.assert_close(elbo, truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(value.detach(), truth, rtol=0, atol=1e-10)
    assert float(stderr.max()) < 1e-10


def test_the_bound_is_that_of_all_codes_in_the_mean_and_below_the_likelihood():
    model, n = plane(), 40_000
    x = points(3)
    truth, elbo = enumerated(model, x)
    assert bool((elbo < truth - 0.01).all()), "an exact posterior would hide a fault"
    for samples in (1, 4):
        value = model.log_prob(x.repeat_interleave(n, 0), num_samples=samples, rng=generator(samples)).value
        value = value.detach().view(3, n)
        error = value.std(1) / math.sqrt(n)
        if samples == 1:
            assert bool(((value.mean(1) - elbo).abs() < 4 * error).all())
        assert bool((value.mean(1) < truth + 4 * error).all())


def test_more_draws_raise_the_bound_towards_the_likelihood():
    model, x = plane(), points(2000)
    truth = float(enumerated(model, x)[0].mean())
    gaps = [
        truth - float(model.log_prob(x, num_samples=s, rng=generator(s)).value.detach().mean()) for s in (1, 3, 12, 60)
    ]
    assert all(fewer > 1.4 * more > 0 for fewer, more in pairwise(gaps)), gaps
    assert gaps[-1] < 0.04


def test_the_rate_is_log_k_minus_the_entropy_of_the_posterior():
    model, x = plane(), points(30)
    log_q = model.posterior(x)
    each = kl_divergence(Categorical(logits=log_q.movedim(1, -1)), Categorical(logits=torch.zeros(K).double()))
    torch.testing.assert_close(model._divergence(log_q)[:, 0], each)
    terms = model.loss(x, rng=generator(0)).terms
    assert float(terms["rate"]) == pytest.approx(float(each.flatten(1).sum(1).mean().detach()), rel=1e-12)


def test_draws_of_the_posterior_come_with_their_log_probability():
    model, n = plane(), 20_000
    x = points(1)
    z, log_q = model.infer(x.expand(n, -1), rng=generator("draws"))
    assert z.shape == (n, 1, N, 1) and z.dtype == torch.int64
    q = model.posterior(x)[0, ..., 0].detach()
    torch.testing.assert_close(log_q.detach(), sum(q[z[:, 0, i, 0], i] for i in range(N)))
    joint = (z[:, 0, 0, 0] * K + z[:, 0, 1, 0]).bincount(minlength=K**N)
    expected = n * (q[:, 0, None] + q[None, :, 1]).exp().flatten()
    often = expected > 5
    assert float(((joint - expected).square() / expected)[often].sum()) < int(often.sum()) + 5 * math.sqrt(2 * K**N)
    assert torch.equal(model.encode(x), model.posterior(x).argmax(1, keepdim=True))


def test_a_learned_prior_over_the_codes_has_a_bound_by_draws_of_the_posterior():
    """In the mean E_q[log p(x | z) + log P(z) - log q(z | x)], by a sum over all codes, of which the mode is but one."""
    prior = functools.partial(
        Autoregressive,
        network=functools.partial(Transformer, width=8, layers=1, heads=2),
        likelihood=likelihoods.Categorical,
        inputs="classes",
    )
    model = latent(EventSpec((2,)), codec=plane(), prior=prior).double().eval()
    with torch.no_grad():
        for parameter in model.prior.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    x, n, z = points(3), 40_000, all_codes()
    with torch.no_grad():
        log_P = model.prior.log_prob(bin_center(z, K, torch.float64)).value - N * math.log(K / 2)
        log_p = torch.stack([model.codec.log_likelihood(x, code.expand(3, -1, -1, -1)) for code in z], dim=1)
        log_q_n = model.codec.posterior(x)[..., 0]
        log_q = torch.stack([sum(log_q_n[:, int(code[0, i, 0]), i] for i in range(N)) for code in z], dim=1)
        assert float(log_P.exp().sum()) == pytest.approx(1)
        expected = (log_q.exp() * (log_p + log_P - log_q)).sum(1)
        value = model.log_prob(x.repeat_interleave(n, 0), rng=generator("bound")).value.view(3, n)
    assert bool((expected < (log_p + log_P).logsumexp(1)).all())
    error = value.std(1) / math.sqrt(n)
    assert bool(((value.mean(1) - expected).abs() < 4 * error).all())


def test_the_posterior_does_not_depend_on_the_noise_of_dequantisation():
    model = DVAE((1, 4, 4), levels=4, likelihood=DiscretizedLogistic(4), codebook_size=5, downsampling=2).double()
    centre = bin_center(torch.randint(4, (3, 1, 4, 4)), 4, torch.float64)
    assert torch.equal(model.posterior(centre + 0.2), model.posterior(centre))


# The loss


def test_the_loss_is_the_distortion_of_relaxed_codes_and_the_weighted_rate():
    x, model = points(20), plane(beta=3.0, warmup=100, annealing=100, temperature=1.0, final_temperature=0.5).train()
    plain = plane(beta=0.0, annealing=0, final_temperature=0.5).train()
    temperatures = []
    for seen in (0, 25, 100, 200):
        model.cost.seen.fill_(seen)
        model.temperature.seen.fill_(seen)
        plain.temperature.end = float(model.temperature())
        (total, terms, _), (rest, *_) = (m.loss(x, rng=generator(1)) for m in (model, plain))
        weight = 3.0 * min(seen / 100, 1)
        assert float((total - rest).detach()) == pytest.approx(weight * float(terms["rate"]) / 2, rel=1e-7)
        assert float(terms["distortion"]) / 2 == pytest.approx(float(rest.detach()), rel=1e-9)
        temperatures.append(float(terms["temperature"]))
    assert temperatures[0] == 1.0 and temperatures[2:] == [0.5, 0.5]


def test_the_distortion_of_a_cold_relaxation_is_that_of_one_hot_draws(monkeypatch):
    x, model = points(50), plane(annealing=0, final_temperature=1e-5)
    u = torch.rand(50, K, N, 1, generator=generator("u"), dtype=torch.float64)
    monkeypatch.setattr("genzoo.distributions.gumbel.rand", lambda shape, **_: u.clone())
    distortion = model.loss(x).terms["distortion"]
    z = (model.posterior(x) - torch.log(-torch.log(u))).argmax(1, keepdim=True)
    assert float(distortion) == pytest.approx(-float(model.log_likelihood(x, z).detach().mean()), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_gradient_of_the_relaxed_objective_is_that_of_finite_differences(temperature):
    x, model = points(12), plane(beta=2.0, annealing=0, final_temperature=temperature)

    def loss() -> Tensor:
        return model.loss(x, rng=generator("noise")).total

    gradients = torch.autograd.grad(loss(), list(model.parameters()))
    h = 1e-5
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        i = int(gradient.flatten().abs().argmax())
        flat = parameter.data.view(-1)
        flat[i] += h
        above = float(loss().detach())
        flat[i] -= 2 * h
        below = float(loss().detach())
        flat[i] += h
        assert float(gradient.flatten()[i]) == pytest.approx((above - below) / (2 * h), rel=1e-5, abs=1e-8)


def test_training_reaches_the_likelihood_of_a_mixture():
    """Data of the model itself, with independent codes: the entropy of the data is the least negative bound."""
    truth = exact()
    x = truth.sample(4096, rng=generator("mixture")).x
    x = x + math.exp(LOG_VAR / 2) * torch.randn(4096, 2, generator=generator("noise"), dtype=torch.float64)
    best = float(enumerated(truth, x)[0].mean())
    model = plane(annealing=150 * 256, likelihood=Gaussian(log_var=0.0)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for step in range(300):
        optimizer.zero_grad()
        rows = torch.arange(256) + 256 * (step % 16)
        model.loss(x[rows], rng=generator("training", step)).total.backward()
        optimizer.step()
        decay.step()
        model.after_step({}, 256)
    reached = float(enumerated(model.eval(), x)[1].mean())
    assert reached == pytest.approx(best, abs=0.06)


# State and samples


def test_the_temperature_is_part_of_the_state_and_moves_after_a_step_alone():
    model, x = plane(annealing=1000), points(8)
    for look in (model.loss, model.log_prob, model.infer, model.encode):
        look(x)
    assert float(model.temperature()) == 1.0
    model.after_step({}, 300)
    other = plane(annealing=1000)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert 0.0625 < float(other.temperature()) == float(model.temperature()) < 1
    for one in (model, other):
        one.after_step({}, 300)
    assert torch.equal(model.loss(x, rng=generator(0)).total, other.loss(x, rng=generator(0)).total)


def test_the_stage_of_a_prior_leaves_the_codec_its_weights_and_its_temperature():
    prior = functools.partial(Autoregressive, network=functools.partial(Transformer, width=8, layers=1, heads=2))
    model = latent(EventSpec((2,)), codec=plane(annealing=1000), prior=prior).double().train()
    before, x = copy.deepcopy(model.codec.state_dict()), points(8)
    stage = model.stages()[-1].module
    loss = stage.loss(x, rng=generator(0))
    loss.total.backward()
    stage.after_step(loss.aux, 8)
    assert all(torch.equal(value, before[name]) for name, value in model.codec.state_dict().items())
    assert all(parameter.grad is None for parameter in model.codec.parameters())


def test_samples_decode_independent_uniform_codes():
    model, n = exact(), 30_000
    assert model.latent == Discrete((1, N, 1), K)
    x = model.sample(n, rng=generator("uniform")).x
    k = (x[:, :, None] - VALUES).abs().argmin(2)
    torch.testing.assert_close(x, torch.stack([VALUES[i][k[:, i]] for i in range(N)], 1), rtol=0, atol=1e-12)
    joint = (k[:, 0] * K + k[:, 1]).bincount(minlength=K**N)
    expected = n / K**N
    assert float(((joint - expected).square() / expected).sum()) < K**N + 5 * math.sqrt(2 * K**N)


def test_classes_reach_encoder_and_decoder():
    torch.manual_seed(0)
    model = DVAE((2,), ClassLabels(3), encoder=small, decoder=small, likelihood=Gaussian(), codebook_size=K).double()
    x, y = points(6), torch.arange(6) % 3
    assert not torch.equal(model.posterior(x, y), model.posterior(x, (y + 1) % 3))
    z = model.encode(x, y)
    assert not torch.equal(model.decode(z, y), model.decode(z, (y + 1) % 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codebook_size": 1}, "at least 2 codes of at least 1 dimension, not 1 of 64"),
        ({"downsampling": 3}, "downsampling=3 does not divide the sides of 4x4 pixels"),
        ({"likelihood": DiscretizedLogistic(7)}, "7 levels, the data levels=4"),
        ({"beta": -1.0}, "beta must not be negative"),
        ({"final_temperature": 0.0}, "final_temperature must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DVAE((1, 4, 4), levels=4, **settings)
