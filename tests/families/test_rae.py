r"""Regularised autoencoders, where linear ones have closed forms.

With a decoder of weights W, an encoder V and data of covariance eigenvalues l, the loss

    E|x - W V x|^2 + beta/2 E|V x|^2 + gamma |W|^2

is least where each component is shrunk by a = 1 - sqrt(beta gamma/(2 l)): for w v = a the two penalties, beta a^2 l/(2 w^2) +
gamma w^2, are at least a sqrt(2 beta gamma l), and l (1 - a)^2 + a sqrt(2 beta gamma l) is least there.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import genzoo
from genzoo.event import EventSpec
from genzoo.families.ddpm import DDPM
from genzoo.families.gmm import GMM
from genzoo.families.latent import LatentModel, latent
from genzoo.families.rae import RAE
from genzoo.model import Density
from genzoo.numerics.random import generator
from tests.exact import network
from tests.families.test_vae_options import EIGENVALUES, minimise, whitened


def linear(in_shape, out_shape, condition) -> nn.Module:
    class Linear(nn.Linear):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return super().forward(x)

    return Linear(math.prod(in_shape), math.prod(out_shape), bias=False)


def test_a_linear_autoencoder_shrinks_its_components_to_the_closed_form():
    beta, gamma, torch_seed = 0.5, 0.8, 0
    torch.manual_seed(torch_seed)
    x = whitened(200)
    model = RAE((5,), encoder=linear, decoder=linear, latent_dim=3, code_penalty=beta, decoder_penalty=gamma).double()
    minimise(model, x, 1500)
    top = EIGENVALUES[:3]
    shrunk = 1 - (beta * gamma / (2 * top)).sqrt()
    assert bool((shrunk > 0).all())
    least = (top * (1 - shrunk) ** 2 + shrunk * (2 * beta * gamma * top).sqrt()).sum() + EIGENVALUES[3:].sum()
    total, terms, _ = model.loss(x)
    assert 5 * float(total.detach()) == pytest.approx(float(least), rel=1e-3)
    kept = torch.linalg.svdvals((model.decoder.weight @ model.encoder.weight).detach())[:3]
    torch.testing.assert_close(kept, shrunk.sort(descending=True).values, atol=0.01, rtol=0)
    error = (top * (1 - shrunk) ** 2).sum() + EIGENVALUES[3:].sum()
    assert 5 * float(terms["squared_error"]) == pytest.approx(float(error), rel=0.01)


def test_the_gradient_penalty_is_the_squared_norm_of_the_decoders_jacobian():
    A = torch.randn(4, 2, generator=generator("A")).double()
    model = RAE(
        (4,), encoder=network(lambda x, y: x[:, :2]), decoder=network(lambda z, y: torch.sin(z) @ A.T), latent_dim=2,
        regularizer="gradient_penalty", code_penalty=0.0, decoder_penalty=2.0,
    )  # fmt: skip
    x = torch.randn(1, 4, generator=generator("x")).double().repeat(100_000, 1)
    total, terms, _ = model.loss(x, rng=generator("v"))
    jacobian = A * torch.cos(x[0, :2])
    expected = float(jacobian.square().sum())
    assert float(terms["smoothness"]) == pytest.approx(expected, rel=0.02)
    assert 4 * float(total) == pytest.approx(
        4 * float(terms["squared_error"]) + 2 * float(terms["smoothness"]), rel=1e-9
    )


def test_the_gradient_penalty_moves_the_decoder():
    torch.manual_seed(0)
    settings = {"regularizer": "gradient_penalty", "code_penalty": 0.0, "latent_dim": 2}
    x = torch.randn(50, 3).double()
    norms = []
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        model = RAE((3,), encoder=linear, decoder=linear, decoder_penalty=weight, **settings).double().train()
        minimise(model, x, 200)
        norms.append(float(model.decoder.weight.detach().norm()))
    assert norms[1] < 0.7 * norms[0]


def test_images_are_snapped_to_their_levels_in_and_out():
    model = RAE((1, 4, 4), levels=17, latent_dim=3).eval()
    k = torch.randint(17, (5, 1, 4, 4))
    centre = (2 * k + 1) / 17 - 1
    for place in (-0.9 / 17, 0.9 / 17):
        torch.testing.assert_close(model.encode(centre + place), model.encode(centre))
        torch.testing.assert_close(model.loss(centre + place).total, model.loss(centre).total)
    levels = (model.decode(torch.randn(5, 3)) + 1) * 17 / 2 - 0.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("prior", [GMM, DDPM])
def test_a_density_is_fitted_after_the_codec(prior):
    """Two stages, and no density of events, since the codec has no likelihood."""
    torch.manual_seed(0)
    model = latent(
        EventSpec((2,)), codec=lambda event, condition: RAE(event, latent_dim=1, code_penalty=0.1), prior=prior
    )
    assert type(model) is LatentModel and not isinstance(model, Density)
    assert [stage.name for stage in model.stages()] == ["codec", "prior"]


def test_samples_and_attribute_directions_of_a_mixture_over_codes():
    torch.manual_seed(0)
    rng = generator("clusters")
    y = torch.arange(400) % 2
    x = torch.stack([4.0 * y - 2, torch.zeros(400)], 1).double() + 0.2 * torch.randn(400, 2, generator=rng).double()
    codec = RAE((2,), encoder=linear, decoder=linear, latent_dim=2, code_penalty=0.01, decoder_penalty=0.01).double()
    minimise(codec, x, 300)
    codec.requires_grad_(False)
    model = latent(EventSpec((2,)), codec=codec, prior=lambda event, condition: GMM(event, components=2)).double()
    model.initialize(x, rng=generator("first"))
    drawn = model.sample(4000, rng=generator("drawn")).x
    assert float((drawn[:, 0] > 0).double().mean()) == pytest.approx(0.5, abs=0.04)
    sides = drawn[drawn[:, 0] > 0]
    torch.testing.assert_close(sides.mean(0), torch.tensor([2.0, 0.0]).double(), atol=0.1, rtol=0)
    assert float(sides.std(0).mean()) == pytest.approx(0.2, abs=0.05)
    z = genzoo.encode(model, x)
    direction = genzoo.attribute_direction(z[y == 0], z[y == 1])
    moved = genzoo.add_direction(model, z[y == 0], direction, [0.0, 1.0])
    torch.testing.assert_close(moved[1].mean(0) - moved[0].mean(0), torch.tensor([4.0, 0.0]).double(), atol=0.1, rtol=0)


def test_settings_that_do_not_fit_are_refused():
    for settings, message in (
        ({"latent_dim": 0}, "latent_dim"),
        ({"code_penalty": -1.0}, "negative"),
        ({"decoder_penalty": -1.0}, "negative"),
        ({"regularizer": "spectral"}, "regularizer"),
    ):
        with pytest.raises(ValueError, match=message):
            RAE((2,), **settings)
