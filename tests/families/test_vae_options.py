r"""Priors, posteriors and objectives of the variational autoencoder, where linear models and few data have closed forms.

A linear autoencoder with q latents of data whose covariance has the eigenvalues l_i, and a likelihood of variance s^2, has by
reverse water-filling at weight beta of the rate

    s_e^2 = beta s^2,    squared error = sum_i min(l_i, s_e^2),    rate = 1/2 sum_{l_i > s_e^2} log(l_i / s_e^2).

Where the posterior N(m, Lambda^-1) of a linear model has correlations, the best independent coordinates have the variances
1/Lambda_ii, at a KL of ``1/2 (sum_i log Lambda_ii - log det Lambda)``; a linear inverse autoregressive flow closes this gap.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from genzoo.conditions import ClassLabels
from genzoo.distributions.divergences import squared_mmd
from genzoo.distributions.likelihoods import DiscretizedLogistic, Gaussian
from genzoo.event import EventSpec
from genzoo.families.autoregressive import Autoregressive
from genzoo.families.gmm import GMM, Mixture
from genzoo.families.maf import MAF
from genzoo.families.realnvp import RealNVP
from genzoo.families.score_sde import ScoreSDE
from genzoo.families.vae import VAE, FlowPosteriorVAE, LearnedPriorVAE, VampPrior, vae
from genzoo.latents import has_normal_prior, meaning
from genzoo.model import Bound, Composite, GaussianPosterior
from genzoo.nn.made import MADE
from genzoo.numerics.random import generator
from tests.exact import network
from tests.families.test_vae import linear

EIGENVALUES = torch.tensor([4.0, 1.5, 0.6, 0.2, 0.1]).double()
NOISE, BETA = 0.2, 2.0  # s^2 and the weight: s_e^2 = 0.4
WATER = NOISE * BETA
SQUARED_ERROR = float(EIGENVALUES.clamp(max=WATER).sum())  # 1.5
RATE = float(0.5 * (EIGENVALUES[EIGENVALUES > WATER] / WATER).log().sum())


def whitened(n: int) -> Tensor:
    """Data whose mean is 0 and whose covariance has exactly the eigenvalues, in rotated axes."""
    x = torch.randn(n, 5, generator=generator("rows")).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / n)).T
    axes = torch.linalg.qr(torch.randn(5, 5, generator=generator("axes")).double()).Q
    return x * EIGENVALUES.sqrt() @ axes.T


def fixed(**settings) -> VAE:
    """A linear VAE with four latents and a likelihood of fixed variance."""
    law = Gaussian(log_var=math.log(NOISE))
    model = vae(EventSpec((5,)), encoder=linear, decoder=linear, likelihood=law, latent_dim=4, **settings).double()
    model.likelihood.log_var.requires_grad_(False)
    return model


def minimise(model, x: Tensor, steps: int, lr: float = 0.03) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss(x)
        loss.total.backward()
        optimizer.step()
        decay.step()
        model.after_step(loss.aux, len(x))


@torch.no_grad()
def exact_terms(model: VAE, x: Tensor) -> tuple[float, float]:
    """The squared error and the rate of a linear VAE, in expectation over its posterior."""
    mean, log_var = model.posterior(x)
    W = model.decoder.weight
    error = (x - model.decoder(mean)).square().sum(1) + (W.square() * log_var.exp()[:, None]).sum((1, 2))
    rate = 0.5 * (log_var.exp() + mean**2 - 1 - log_var).sum(1)
    return float(error.mean()), float(rate.mean())


def test_a_linear_beta_vae_fills_water_in_reverse():
    torch.manual_seed(0)
    x, model = whitened(300), fixed(beta=BETA)
    minimise(model, x, 1200)
    error, rate = exact_terms(model, x)
    assert error == pytest.approx(SQUARED_ERROR, abs=0.02) and rate == pytest.approx(RATE, abs=0.02)
    information = model.divergences(x).mean(0)
    assert int((information > 0.05).sum()) == 3, "the fourth latent lies under water"


def test_a_constraint_finds_the_weight_that_belongs_to_its_distortion():
    """The target is the distortion of beta = 2: the multiplier must end at 1/2, and the rate at the closed form."""
    torch.manual_seed(0)
    x = whitened(300)
    target = 0.5 * (SQUARED_ERROR / NOISE + 5 * math.log(2 * math.pi * NOISE))
    model = fixed(objective="geco", target=target)
    minimise(model, x, 1500)
    error, rate = exact_terms(model, x)
    assert error == pytest.approx(SQUARED_ERROR, abs=0.03) and rate == pytest.approx(RATE, abs=0.03)
    assert float(model.constraint.log_multiplier.exp()) == pytest.approx(1 / BETA, rel=0.05)


def test_the_loss_of_a_constraint_weighs_the_excess_and_moves_its_multiplier_slowly():
    x, model = whitened(20), fixed(objective="geco", target=3.0).train()
    model.constraint.log_multiplier.fill_(math.log(4.0))
    total, terms, aux = model.loss(x, rng=generator(0))
    expected = (4 * (terms["distortion"] - 3.0) + terms["rate"]) / 5
    torch.testing.assert_close(total.detach(), expected, rtol=1e-9, atol=0)
    assert float(terms["multiplier"]) == pytest.approx(4.0)
    model.after_step(aux, len(x))
    average = 0.1 * float(terms["distortion"] - 3.0) / 5
    assert float(model.constraint.excess) == pytest.approx(average, rel=1e-5)
    assert float(model.constraint.log_multiplier) == pytest.approx(math.log(4.0) + 0.02 * average, rel=1e-6)


# The gap of independent coordinates

W = torch.tensor([[2.0, 1.0], [0.5, 1.0], [1.0, -0.5], [0.3, 0.8]]).double()  # columns that are not orthogonal
VARIANCE = 0.3
LAW = MultivariateNormal(torch.zeros(4).double(), W @ W.T + VARIANCE * torch.eye(4).double())
PRECISION = W.T @ W / VARIANCE + torch.eye(2).double()
POSTERIOR = torch.linalg.inv(PRECISION)
GAP = float(0.5 * (PRECISION.diag().log().sum() - torch.logdet(PRECISION)))
FACTOR = torch.linalg.cholesky(POSTERIOR)


class LinearIAF(MADE):
    """Parameters with which a layer maps eps to the posterior's mean, its features, plus the factor times eps."""

    def __init__(self, in_shape, out_shape, condition):
        nn.Module.__init__(self)

    def forward(self, x: Tensor, y: Tensor | None = None, i: int | None = None) -> Tensor:
        assert y is not None and i is None
        second = (y[:, 1] + FACTOR[1, 0] * x[:, 0]) / FACTOR[1, 1]
        location = -torch.stack([y[:, 0] / FACTOR[0, 0], second], dim=1)
        a = -FACTOR.diag().log()
        raw = a / (1 - a.abs() / math.log(1000))  # the log scale of a layer is bounded
        return torch.cat([raw.expand_as(location), location], dim=1)


def ppca(encoder, posterior=None):
    decoder = network(lambda z, y: z @ W.T)
    law = Gaussian(log_var=math.log(VARIANCE))
    model = vae(
        EventSpec((4,)), encoder=network(encoder), decoder=decoder, likelihood=law, latent_dim=2, posterior=posterior
    ).double()
    model.likelihood.log_var.data.fill_(math.log(VARIANCE))
    return model


def mean_of(x: Tensor) -> Tensor:
    return x @ W @ POSTERIOR / VARIANCE


def test_independent_coordinates_cost_the_mean_field_gap():
    model = ppca(lambda x, y: torch.cat([mean_of(x), -PRECISION.diag().log().expand(len(x), 2)], dim=1))
    x = LAW.sample((1,)).repeat(200_000, 1)
    elbo = model.log_prob(x).value.detach()
    error = float(elbo.std()) / math.sqrt(len(x))
    assert GAP > 0.1
    assert float(LAW.log_prob(x[0]) - elbo.mean()) == pytest.approx(GAP, abs=4 * error)


@pytest.mark.parametrize("num_samples", [1, 4])
def test_a_linear_inverse_autoregressive_flow_closes_the_gap_at_every_draw(num_samples):
    flow = functools.partial(MAF, network=LinearIAF, layers=1)
    model = ppca(lambda x, y: torch.cat([torch.zeros(len(x), 4).double(), mean_of(x)], dim=1), flow)
    assert isinstance(model, FlowPosteriorVAE)
    x = LAW.sample((50,))
    torch.testing.assert_close(model.log_prob(x, num_samples=num_samples).value, LAW.log_prob(x), atol=1e-9, rtol=0)
    total = model.loss(x).total
    torch.testing.assert_close(total, -LAW.log_prob(x).mean() / 4, atol=1e-9, rtol=0)
    z, log_q = model.infer(x, rng=generator("q"))
    exact = MultivariateNormal(torch.zeros(2).double(), POSTERIOR).log_prob(z - mean_of(x))
    torch.testing.assert_close(log_q, exact, atol=1e-9, rtol=0)
    torch.testing.assert_close(model.encode(x), mean_of(x), atol=1e-12, rtol=0)


def trainable(posterior=None, prior=None, condition=None, **settings):
    """A model of vectors with small networks, whose flows are not the identity."""
    torch.manual_seed(3)
    model = vae(
        EventSpec((3,)), condition, latent_dim=2, posterior=posterior, prior=prior, likelihood=Gaussian(), **settings
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape).double()
    return model


def test_the_density_of_a_flow_posterior_is_that_of_its_change_of_variables():
    """Invert the flow, and compare with the density of the Gaussian and the Jacobian by automatic differentiation."""
    model = trainable(posterior=functools.partial(MAF, layers=2))
    x = torch.randn(4, 3).double()
    z, log_q = model.infer(x, rng=generator("flow"))
    mean, log_var, features = model._encoder_output(x, None)
    for i in range(4):
        h = features[i : i + 1]
        z0 = model.flow.decode(z[i : i + 1], h)
        jacobian = torch.autograd.functional.jacobian(lambda v, h=h: model.flow.encode(v, h)[0], z0)[:, 0]
        base = torch.distributions.Normal(mean[i], (0.5 * log_var[i]).exp()).log_prob(z0[0]).sum()
        assert float(log_q[i].detach()) == pytest.approx(
            float((base - torch.linalg.slogdet(jacobian)[1]).detach()), abs=1e-9
        )


# Learned priors

PRIORS = {
    "gmm": functools.partial(GMM, components=3),
    "realnvp": functools.partial(RealNVP, couplings=2),
    "maf": functools.partial(MAF, layers=2),
    "autoregressive": Autoregressive,
    "vamp": functools.partial(VampPrior, components=4),
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_learned_prior_takes_the_place_of_the_normal_one_in_every_bound(name):
    """log 1/K sum_k p(x | z_k) p(z_k)/q(z_k | x), with the draws and each factor computed by itself."""
    model = trainable(prior=PRIORS[name])
    assert isinstance(model, LearnedPriorVAE) and not has_normal_prior(model) and "learned" in meaning(model)
    x, K = torch.randn(6, 3).double(), 3
    mean, log_var = model.posterior(x)
    rng, weights = generator("draws"), []
    for _ in range(K):
        z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=rng, dtype=torch.float64)
        log_q = torch.distributions.Normal(mean, (0.5 * log_var).exp()).log_prob(z).sum(1)
        weights.append(model.log_likelihood(x, z) + model.prior.log_prob(z).value - log_q)
    expected = torch.stack(weights)
    got = model.log_prob(x, num_samples=K, rng=generator("draws")).value
    torch.testing.assert_close(got, expected.logsumexp(0) - math.log(K), atol=1e-9, rtol=0)
    torch.testing.assert_close(model.log_prob(x, rng=generator("draws")).value, expected[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(model.loss(x, rng=generator("draws")).total, -expected[0].mean() / 3, atol=1e-9, rtol=0)


def test_a_prior_of_one_standard_component_is_the_normal_one():
    plain, model = trainable(), trainable(prior=functools.partial(GMM, components=1))
    model.load_state_dict(plain.state_dict(), strict=False)
    eye = torch.eye(2).double()[None]
    model.prior.set(Mixture(torch.ones(1).double(), torch.zeros(1, 2).double(), eye))
    x = torch.randn(9, 3).double()
    for K in (2, 5):
        values = [m.log_prob(x, num_samples=K, rng=generator(K)).value for m in (plain, model)]
        torch.testing.assert_close(*values, atol=1e-9, rtol=0)


def test_samples_of_a_learned_prior_follow_the_law_of_the_model():
    """A linear decoder of a mixture: the mean and covariance of events are closed forms."""
    model = ppca(lambda x, y: torch.zeros(len(x), 4).double())
    torch.manual_seed(0)
    learned = vae(
        EventSpec((4,)), encoder=network(lambda x, y: torch.zeros(len(x), 4).double()), likelihood=model.likelihood,
        decoder=network(lambda z, y: z @ W.T), latent_dim=2, prior=functools.partial(GMM, components=2),
        sample_likelihood=True,
    ).double()  # fmt: skip
    weights, means = torch.tensor([0.3, 0.7]).double(), torch.tensor([[2.0, 0.0], [-1.0, 1.0]]).double()
    covariances = torch.tensor([[[0.5, 0.2], [0.2, 0.4]], [[0.3, 0.0], [0.0, 1.0]]]).double()
    learned.prior.set(Mixture(weights, means, covariances))
    mean = weights @ means
    gap = means - mean
    spread = (weights[:, None, None] * (covariances + gap[:, :, None] * gap[:, None])).sum(0)
    x, nfe, _ = learned.sample(200_000, rng=generator("samples"))
    assert nfe == 2
    torch.testing.assert_close(x.mean(0), W @ mean, atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), W @ spread @ W.T + VARIANCE * torch.eye(4).double(), atol=0.1, rtol=0)


# VampPrior


def of_points(x: Tensor, std: float, condition=None) -> LearnedPriorVAE:
    """A model of numbers whose posterior is N(x, std^2), shifted by the class, with all data as pseudo-inputs."""

    def encode(u: Tensor, y: Tensor | None) -> Tensor:
        mean = u if y is None else u + 10 * y[:, None]
        return torch.cat([mean, torch.full_like(u, 2 * math.log(std))], dim=1)

    model = vae(
        EventSpec((1,)), condition, encoder=network(encode), decoder=network(lambda z, y: z), latent_dim=1,
        likelihood=Gaussian(), prior=functools.partial(VampPrior, components=len(x)),
    ).double()  # fmt: skip
    model.prior.inputs.data.copy_(x)
    return model


def test_with_all_data_as_pseudo_inputs_the_rate_is_the_information_of_the_index():
    x = torch.tensor([[-1.0], [0.2], [0.5], [3.0]]).double()
    std, N = 0.4, len(x)
    model = of_points(x, std)
    grid = torch.linspace(-6, 8, 20_001).double()
    q = torch.distributions.Normal(x, std).log_prob(grid).exp()  # (N, grid)
    information = float((q * (q.clamp(min=1e-300) / q.mean(0).clamp(min=1e-300)).log()).sum() * (grid[1] - grid[0]) / N)
    rows = x.repeat(40_000, 1)
    rate = float(model.loss(rows, rng=generator("rate")).terms["rate"])
    assert 0 < information < math.log(N)
    assert rate == pytest.approx(information, abs=0.015)


@pytest.mark.parametrize(
    ("places", "nats"), [([0, 50, 100, 150], math.log(4)), ([0, 0, 50, 50], math.log(2)), ([7] * 4, 0.0)]
)
def test_the_information_is_the_log_of_the_number_of_distinct_data(places, nats):
    x = torch.tensor(places).double()[:, None]
    rate = of_points(x, 0.5).loss(x, rng=generator("rate")).terms["rate"]
    assert float(rate) == pytest.approx(nats, abs=1e-9)


@pytest.mark.parametrize("conditional", [False, True])
def test_a_vamp_prior_draws_from_the_density_that_it_has(conditional):
    x = torch.tensor([[-2.0], [1.0], [1.5]]).double()
    condition = ClassLabels(3) if conditional else None
    prior = of_points(x, 0.3, condition).prior
    y = torch.full((60_000,), 2) if conditional else None
    z = prior.sample(60_000, y, rng=generator("vamp")).x
    shift = 20.0 if conditional else 0.0
    assert float(z.mean()) == pytest.approx(float(x.mean()) + shift, abs=0.03)
    assert float(z.var()) == pytest.approx(float(x.var(correction=0)) + 0.09, abs=0.05)
    grid = torch.linspace(-5, 30, 7001).double()[:, None]
    mass = prior.log_prob(grid, None if y is None else y[: len(grid)]).value.exp().sum() * 0.005
    assert float(mass) == pytest.approx(1, abs=1e-6)
    first = prior.log_prob(x[:1] + shift, None if y is None else y[:1]).value
    each = torch.distributions.Normal(x + shift, 0.3).log_prob(x[:1] + shift).exp().mean()
    assert float(first) == pytest.approx(float(each.log()), abs=1e-9)


def test_pseudo_inputs_start_at_data_and_learn():
    torch.manual_seed(0)
    model = vae(EventSpec((1, 8, 8), 17), prior=functools.partial(VampPrior, components=6)).train()
    x = torch.rand(4, 1, 8, 8) * 1.8 - 0.9
    noise = model.prior.inputs.detach().clone()
    model.initialize(x, rng=generator("first"))
    torch.testing.assert_close(model.prior.inputs, x[[0, 1, 2, 3, 0, 1]] + noise)
    model.loss(x, rng=generator("loss")).total.backward()
    assert bool((model.prior.inputs.grad.flatten(1) != 0).any(1).all()), "levels are rounded: no gradient"


# Objectives


@pytest.mark.parametrize("prior", [None, "realnvp"])
@pytest.mark.parametrize("flow", [False, True])
def test_the_importance_weighted_objective_is_the_bound_that_is_evaluated(prior, flow):
    posterior = functools.partial(MAF, layers=2) if flow else None
    model = trainable(posterior, prior and PRIORS[prior], objective="iwae", samples=4)
    x = torch.randn(8, 3).double()
    total, terms, _ = model.loss(x, rng=generator("iwae"))
    bound = model.log_prob(x, num_samples=4, rng=generator("iwae")).value.mean()
    torch.testing.assert_close(total, -bound / 3, atol=1e-12, rtol=1e-12)
    assert float(3 * total) < float(terms["distortion"] + terms["rate"])


def test_the_importance_weighted_objective_is_warmed_up_too():
    model = trainable(objective="iwae", samples=1, warmup=40)
    model.after_step({}, 10)
    total, terms, _ = model.loss(torch.randn(8, 3).double(), rng=generator("iwae"))
    torch.testing.assert_close(3 * total.detach(), terms["distortion"] + 0.25 * terms["rate"], atol=1e-9, rtol=0)


@pytest.mark.parametrize("prior", [None, "gmm"])
def test_infovae_adds_the_discrepancy_of_latents_and_draws_of_the_prior(prior):
    model = trainable(prior=prior and PRIORS[prior], objective="info", beta=0.25, mmd=7.0)
    x = torch.randn(30, 3).double()
    total, terms, _ = model.loss(x, rng=generator("info"))
    rng = generator("info")
    z = model.infer(x, rng=rng).z
    other = model.prior.sample(30, rng=rng).x if prior else torch.randn(30, 2, generator=rng, dtype=torch.float64)
    discrepancy = squared_mmd(z, other, math.sqrt(2)).detach()
    torch.testing.assert_close(terms["mmd"], discrepancy, atol=1e-12, rtol=0)
    expected = terms["distortion"] + 0.25 * terms["rate"] + 7 * discrepancy
    torch.testing.assert_close(3 * total.detach(), expected, atol=1e-9, rtol=0)


def test_infovae_without_a_rate_still_brings_its_latents_to_the_prior():
    """The aggregate of the posteriors of linear codes, by the discrepancy alone."""
    torch.manual_seed(0)
    x = torch.randn(150, 5).double() * 3 + 1
    model = fixed(objective="info", beta=0.0, mmd=300.0)
    minimise(model, x, 400)
    with torch.no_grad():
        z = model.infer(x.repeat(10, 1), rng=generator("z")).z
    assert float(z.mean(0).abs().max()) < 0.2
    torch.testing.assert_close(torch.cov(z.T), torch.eye(4).double(), atol=0.25, rtol=0)


# Classes and refusals


def test_the_class_follows_from_prior_and_posterior():
    iaf = functools.partial(MAF, layers=1)
    assert type(trainable()) is VAE and isinstance(trainable(), GaussianPosterior)
    of_flow, learned = trainable(iaf), trainable(iaf, PRIORS["gmm"])
    assert not isinstance(of_flow, GaussianPosterior | Composite) and has_normal_prior(of_flow)
    assert isinstance(learned, Composite) and learned.flow is not None
    assert {model.bound for model in (trainable(), of_flow, learned)} == {Bound.LOWER}
    assert "flow" in meaning(of_flow)


def test_settings_that_do_not_fit_are_refused_in_one_line():
    iaf = functools.partial(MAF, layers=1)
    wrong = [
        ({"objective": "elba"}, "objective must be elbo, iwae, info or geco"),
        ({"objective": "geco"}, "needs a target"),
        ({"objective": "iwae", "samples": 0}, "samples must be at least 1"),
        ({"objective": "iwae", "free_bits": 0.5}, "free_bits=0"),
        ({"objective": "iwae", "beta": 3.0}, "set model.beta=1"),
        ({"objective": "info", "mmd": 0.0}, "positive mmd"),
        ({"objective": "info", "beta": 0.0, "prior": PRIORS["gmm"]}, "does not train a learned prior"),
        ({"prior": ScoreSDE}, "no exact density"),
        ({"prior": functools.partial(VampPrior, components=0)}, "components"),
        ({"prior": PRIORS["vamp"], "posterior": iaf}, "omit posterior"),
        ({"posterior": GMM}, "no normalising flow"),
        ({"posterior": ScoreSDE}, "no normalising flow"),
    ]
    for settings, message in wrong:
        with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
            vae(EventSpec((3,)), **settings)
    with pytest.raises(ValueError, match=r"build it by genzoo\.vae"):
        VAE((3,), posterior=iaf)
    with pytest.raises(ValueError, match="whose encoder it uses"):
        VampPrior(EventSpec((2,))).log_prob(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="has 17 levels"):
        vae(EventSpec((1, 4, 4), 2), likelihood=DiscretizedLogistic(17), prior=PRIORS["gmm"])
