r"""The variational autoencoder on linear-Gaussian data: its posterior, likelihood and optimum are closed forms.

Probabilistic PCA, x = W z + mu + s eps, with orthogonal columns of W has a diagonal posterior

    q(z | x) = N(M^-1 W'(x - mu), s^2 M^-1),    M = W'W + s^2 I

so that a linear encoder can be exact, and log N(x; mu, WW' + s^2 I) is what every bound must reach.

References:
    Tipping, Bishop, "Probabilistic principal component analysis", 1999 (eq. 4, 6-8: the likelihood and its maximum).
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from genzoo.conditions import ClassLabels
from genzoo.distributions.discretization import bin_center
from genzoo.distributions.likelihoods import DiscretizedLogistic, Gaussian
from genzoo.families.vae import VAE
from genzoo.numerics.random import generator
from tests.exact import network

W = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, -0.5], [0.0, 0.0]], dtype=torch.float64)
MU = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.3], dtype=torch.float64)
VARIANCE = 0.3
LAW = MultivariateNormal(MU, W @ W.T + VARIANCE * torch.eye(5).double())


def linear(in_shape, out_shape, condition) -> nn.Module:
    class Linear(nn.Linear):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return super().forward(x)

    return Linear(math.prod(in_shape), math.prod(out_shape))


def ppca(shift: float = 0.0, spread: float = 1.0, **kwargs) -> VAE:
    """The VAE at the optimum, its posterior then moved by ``shift`` and widened by ``spread``."""
    model = VAE(
        (5,), encoder=linear, decoder=linear, likelihood=Gaussian(log_var=math.log(VARIANCE)), latent_dim=2, **kwargs
    ).double()
    M = W.T @ W + VARIANCE * torch.eye(2).double()
    encode = torch.linalg.solve(M, W.T)
    with torch.no_grad():
        model.likelihood.log_var.fill_(math.log(VARIANCE))  # in float64
        model.decoder.weight.copy_(W)
        model.decoder.bias.copy_(MU)
        model.encoder.weight.copy_(torch.cat([encode, torch.zeros(2, 5)]))
        log_var = torch.log(VARIANCE * spread / M.diag())
        model.encoder.bias.copy_(torch.cat([shift - encode @ MU, log_var]))
    return model


def data(n: int) -> Tensor:
    return LAW.sample((n,))


@pytest.mark.parametrize("num_samples", [2, 7])
def test_with_the_exact_posterior_the_bound_is_the_likelihood_at_every_draw(num_samples):
    """p(x, z)/q(z | x) = p(x) whatever z: not one draw may deviate."""
    x = data(50)
    value, stderr = ppca().log_prob(x, num_samples=num_samples)
    torch.testing.assert_close(value, LAW.log_prob(x), atol=1e-9, rtol=0)
    assert stderr.max() < 1e-9


def test_with_the_exact_posterior_the_elbo_is_the_likelihood_in_the_mean():
    x = data(3).repeat_interleave(40_000, dim=0)
    elbo = ppca().log_prob(x).value.view(3, -1)
    error = elbo.std(1) / math.sqrt(40_000)
    assert ((elbo.mean(1) - LAW.log_prob(x).view(3, -1)[:, 0]).abs() < 4 * error).all()


def exact_elbo(x: Tensor, shift: float, spread: float) -> Tensor:
    """log p(x) - KL(q || p(z | x)), with the KL of two diagonal normal laws written out."""
    var = VARIANCE / (W.T @ W + VARIANCE * torch.eye(2).double()).diag()
    kl = 0.5 * (spread - 1 - math.log(spread) + shift**2 / var).sum()
    return LAW.log_prob(x) - kl


@pytest.mark.parametrize(("shift", "spread"), [(0.2, 1.0), (0.0, 2.0), (-0.1, 0.5)])
def test_a_wrong_posterior_costs_its_divergence_from_the_exact_one(shift, spread):
    x = data(1).repeat(100_000, 1)
    model = ppca(shift, spread)
    elbo = model.log_prob(x).value.detach()
    expected = float(exact_elbo(x[:1], shift, spread))
    error = float(elbo.std()) / math.sqrt(len(x))
    assert float(elbo.mean()) == pytest.approx(expected, abs=4 * error)
    total, terms, _ = model.loss(x)
    assert float(total.detach()) == pytest.approx(-expected / 5, abs=4 * error / 5)
    assert float(terms["distortion"] + terms["rate"]) == pytest.approx(5 * float(total.detach()), rel=1e-9)


def test_importance_weighted_bounds_rise_with_the_number_of_draws_towards_the_likelihood():
    x = data(4000)
    model, truth = ppca(0.15, 1.5), float(LAW.log_prob(x).mean())
    bounds = [float(model.log_prob(x, num_samples=k).value.detach().mean()) for k in (1, 2, 5, 20, 100)]
    gaps = [truth - bound for bound in bounds]
    assert all(fewer > 1.5 * more > 0 for fewer, more in pairwise(gaps)), gaps
    assert gaps[-1] < 0.01


def test_the_reported_error_is_the_spread_over_repetitions():
    x = data(1).repeat(4000, 1)
    value, stderr = ppca(0.15, 0.8).requires_grad_(False).log_prob(x, num_samples=50)
    assert float(value.std()) == pytest.approx(float(stderr.square().mean().sqrt()), rel=0.1)


def test_training_reaches_the_greatest_likelihood_from_a_random_start():
    """The maximum is -(D log 2 pi + sum log l_i + (D - q) log s^2 + D)/2 an event, l the sample covariance's
    eigenvalues, of which the D - q least have the mean s^2."""
    torch.manual_seed(1)
    x = data(400)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    residual = eigenvalues[2:].mean()
    best = -0.5 * (5 * math.log(2 * math.pi) + eigenvalues[:2].log().sum() + 3 * residual.log() + 5)

    model = VAE((5,), encoder=linear, decoder=linear, likelihood=Gaussian(), latent_dim=2).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        model.loss(x).total.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        reached = float(torch.stack([model.log_prob(x).value.mean() for _ in range(200)]).mean())
    assert reached == pytest.approx(float(best), abs=0.01)


def test_beta_weighs_the_rate_in_the_loss_and_never_touches_the_bound():
    x = data(20)
    plain, heavy = ppca(0.3), ppca(0.3, beta=4.0)
    for k in (1, 3):
        draws = [model.log_prob(x, num_samples=k, rng=generator(k)).value for model in (plain, heavy)]
        assert torch.equal(*draws)
    (one, terms, _), (four, *_) = (model.loss(x, rng=generator(0)) for model in (plain, heavy))
    torch.testing.assert_close(four - one, 3 * terms["rate"] / 5, atol=1e-12, rtol=0)


def test_warm_up_and_free_bits_change_the_loss_and_never_touch_the_bound():
    x, plain, charged = data(20), ppca(0.3), ppca(0.3, warmup=40, free_bits=1.5).train()
    distortion, rate = plain.loss(x, rng=generator(0)).terms.values()
    mean, log_var = plain.posterior(x)
    per_latent = 0.5 * (log_var.exp() + mean**2 - 1 - log_var).mean(0)
    assert float(per_latent.min()) < 1.5 < float(per_latent.max()), "one latent is free, the other one is not"
    for weight in (0.0, 0.5, 1.0, 1.0):
        total, terms, aux = charged.loss(x, rng=generator(0))
        torch.testing.assert_close(total, (distortion + weight * per_latent.clamp(min=1.5).sum()) / 5)
        assert torch.equal(terms["rate"], rate) and torch.equal(terms["distortion"], distortion)
        for k in (1, 3):
            assert torch.equal(*(m.log_prob(x, num_samples=k, rng=generator(k)).value for m in (plain, charged)))
        charged.after_step(aux, len(x))


def test_a_density_of_images_sees_and_scores_their_values_as_they_are():
    """A Gaussian likelihood knows no levels: the bound is that of the density of the dequantised values."""
    plain, x = ppca(), data(30)
    model = VAE((5, 1, 1), encoder=linear, decoder=linear, likelihood=Gaussian(), levels=256, latent_dim=2).double()
    flat = network(lambda x, y: plain.encoder(x.flatten(1)))
    model.encoder, model.decoder = (
        flat((), (), None),
        network(lambda z, y: plain.decoder(z)[:, :, None, None])((), (), None),
    )
    model.likelihood = plain.likelihood
    value = model.log_prob(x[:, :, None, None], num_samples=2).value
    torch.testing.assert_close(value, LAW.log_prob(x), atol=1e-9, rtol=0)


def test_a_likelihood_of_other_data_is_refused():
    for levels in (256, None):
        with pytest.raises(ValueError, match=f"has 17 levels, the data levels={levels}"):
            VAE((1, 4, 4), encoder=linear, decoder=linear, likelihood=DiscretizedLogistic(17), levels=levels)


def test_samples_follow_the_law_of_the_model():
    model = ppca(sample_likelihood=True)
    x = model.sample(200_000).x
    torch.testing.assert_close(x.mean(0), MU, atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), LAW.covariance_matrix, atol=0.06, rtol=0)
    means = ppca().sample(200_000).x
    torch.testing.assert_close(torch.cov(means.T), W @ W.T, atol=0.06, rtol=0)


def test_codes_are_posterior_means_and_decode_to_the_mean_of_the_event():
    x, model = data(30), ppca()
    M = W.T @ W + VARIANCE * torch.eye(2).double()
    z = torch.linalg.solve(M, W.T @ (x - MU).T).T
    torch.testing.assert_close(model.encode(x), z, atol=1e-12, rtol=0)
    torch.testing.assert_close(model.decode(z), z @ W.T + MU, atol=1e-12, rtol=0)


def test_a_grid_of_latents_is_the_vector_of_its_elements():
    """The same model with latents of shape (1, 1, 2), drawn from the same noise."""
    flat, x = ppca(0.2, 1.5), data(20)
    model = VAE((5,), encoder=linear, decoder=linear, likelihood=Gaussian(), latent_dim=[1, 1, 2]).double()
    model.encoder = network(lambda x, y: flat.encoder(x).view(-1, 2, 1, 2))((), (), None)
    model.decoder = network(lambda z, y: flat.decoder(z.flatten(1)))((), (), None)
    model.likelihood = flat.likelihood
    assert model.latent.shape == (1, 1, 2)
    torch.testing.assert_close(model.encode(x).flatten(1), flat.encode(x), atol=1e-12, rtol=0)
    for k in (1, 3):
        values = [m.log_prob(x, num_samples=k, rng=generator(k)).value for m in (model, flat)]
        torch.testing.assert_close(*values, atol=1e-9, rtol=0)
    torch.testing.assert_close(model.loss(x, rng=generator(0)).total, flat.loss(x, rng=generator(0)).total)
    torch.testing.assert_close(model.infer(x, rng=generator(0)).log_q, flat.infer(x, rng=generator(0)).log_q)
    for wrong in ([], [4, 0, 2], 0):
        with pytest.raises(ValueError, match="latent_dim must be at least 1, not"):
            VAE((5,), encoder=linear, decoder=linear, likelihood=Gaussian(), latent_dim=wrong)


def test_images_are_snapped_to_their_levels_before_they_are_encoded():
    """The posterior of a discrete event may not depend on the noise of its dequantisation: the bound would be none."""
    encoder = network(lambda x, y: x.flatten(1)[:, :6])
    decoder = network(lambda z, y: z.mean(1).view(-1, 1, 1, 1).expand(-1, 2, 4, 4))
    model = VAE(
        (1, 4, 4), encoder=encoder, decoder=decoder, likelihood=DiscretizedLogistic(17), levels=17, latent_dim=3
    )
    k = torch.randint(17, (8, 1, 4, 4))
    centre = bin_center(k, 17)
    for place in (-0.9 / 17, 0.9 / 17):
        for num_samples in (1, 4):
            got, expected = (
                model.log_prob(x, num_samples=num_samples, rng=generator(0)).value for x in (centre + place, centre)
            )
            assert torch.equal(got, expected)
        losses = [model.loss(x, rng=generator(0)).total for x in (centre + place, centre)]
        assert torch.equal(*losses)
        assert torch.equal(model.encode(centre + place), model.encode(centre))


def test_the_discrete_bound_of_a_latent_that_is_ignored_is_the_probability_itself():
    """Decoder constant in z and posterior equal to the prior: the sum of exp(bound) over all 3^2 images is one."""
    params = torch.tensor([[0.2, -0.5], [-1.0, 0.3]]).double().view(1, 4, 1, 1)  # two channels: means, log scales
    encoder = network(lambda x, y: torch.zeros(len(x), 4).double())
    decoder = network(lambda z, y: params.expand(len(z), -1, 1, 1))
    model = VAE(
        (2, 1, 1), encoder=encoder, decoder=decoder, likelihood=DiscretizedLogistic(3), levels=3, latent_dim=2
    ).double()
    k = torch.cartesian_prod(torch.arange(3), torch.arange(3)).view(9, 2, 1, 1)
    for num_samples in (1, 5):
        log_p = model.log_prob(bin_center(k, 3, torch.float64), num_samples=num_samples).value
        assert float((log_p - 2 * math.log(3 / 2)).exp().sum()) == pytest.approx(1.0, abs=1e-10)


def test_classes_reach_both_networks():
    def class_only(z: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y.double(), 0 * y], 1)

    decoder = network(lambda z, y: (10 * y)[:, None].expand(-1, 2).double())
    model = VAE(
        (2,), ClassLabels(3), encoder=network(class_only), decoder=decoder, likelihood=Gaussian(), latent_dim=1
    ).double()
    y = torch.tensor([0, 2, 1])
    assert model.encode(torch.zeros(3, 2).double(), y).flatten().tolist() == [0, 2, 1]
    assert model.sample(3, y).x[:, 0].tolist() == [0, 20, 10]
