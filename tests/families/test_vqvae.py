"""The VQ-VAE: where its gradients go, what its bound is, and when its codebook moves."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.distributions.discretization import bin_center
from genzoo.distributions.likelihoods import DiscretizedLogistic, Gaussian
from genzoo.families.vqvae import VQVAE
from genzoo.model import reconstruct
from genzoo.nn.grid import GridDecoder, GridEncoder
from genzoo.nn.mlp import MLP
from genzoo.numerics.random import generator
from genzoo.training.budget import Budget
from genzoo.training.module import GenerativeModule
from tests.exact import network

small = functools.partial(MLP, width=16, depth=1)


def plane(**settings) -> VQVAE:
    torch.manual_seed(0)
    settings = {"codebook_size": 6, "embedding_dim": 3, "tokens": 2, **settings}
    return VQVAE((2,), encoder=small, decoder=small, likelihood=Gaussian(log_var=-1.0), **settings)


def points(n: int) -> Tensor:
    return torch.randn(n, 2, generator=generator("points"), dtype=torch.float64)


def test_the_encoder_gets_the_gradient_of_the_codes_and_that_of_its_commitment():
    """d loss/d z = d distortion/d e / D + 2 beta (z - e)/n, and the codebook has no gradient at all."""
    z = torch.randn(7, 3, 2, 1, dtype=torch.float64, requires_grad=True)
    x, beta = points(7), 0.25
    model = VQVAE(
        (2,),
        encoder=network(lambda x, y: z),
        decoder=small,
        likelihood=Gaussian(),
        codebook_size=6,
        embedding_dim=3,
        commitment=beta,
    )
    model.double().eval()
    total, terms, _ = model.loss(x)
    total.backward()
    e = model.quantizer.lookup(model.quantizer.nearest(z)).detach().requires_grad_()
    distortion = -model.likelihood.log_prob(model.decoder(e), x).mean()
    (of_e,) = torch.autograd.grad(distortion, e)
    torch.testing.assert_close(z.grad, of_e / 2 + 2 * beta * (z - e).detach() / z.numel(), rtol=1e-12, atol=1e-14)
    assert float(terms["distortion"]) == pytest.approx(float(distortion), rel=1e-12)
    assert float(terms["commitment"]) == pytest.approx(float((z - e).square().mean()), rel=1e-12)
    assert not any(b.requires_grad or b.grad_fn for b in model.quantizer.buffers())


def test_the_codebook_moves_after_a_step_alone_and_never_by_looking():
    model, x = plane().double(), points(20)
    before = model.quantizer.codes.clone()
    for look in (model.eval().loss, model.encode, model.infer, functools.partial(reconstruct, model)):
        look(x)
    model.train().encode(x)
    loss = model.loss(x, rng=generator(0))
    assert torch.equal(model.quantizer.codes, before)
    model.after_step(loss.aux, len(x), rng=generator(0))
    assert not torch.equal(model.quantizer.codes, before)


def test_the_posterior_is_certain_and_the_likelihood_is_that_of_the_decoded_codes():
    model, x = plane(condition=ClassLabels(3)).double().eval(), points(9)
    y = torch.arange(9) % 3
    z, log_q = model.infer(x, y)
    assert torch.equal(z, model.encode(x, y)) and z.shape == (9, 1, 2, 1) and not log_q.any()
    mean, log_var = model.decode(z, y), model.likelihood.log_var
    expected = -0.5 * ((x - mean) ** 2 / log_var.exp() + log_var + math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(model.log_likelihood(x, z, y), expected, rtol=1e-12, atol=1e-12)


def test_samples_draw_each_code_as_often_as_it_is_used():
    """A decoder that shows the first coordinate of each code, on codes that are their own numbers."""
    model = VQVAE(
        (2,),
        encoder=small,
        decoder=network(lambda e, y: e[:, 0, :, 0]),
        likelihood=Gaussian(),
        codebook_size=4,
        embedding_dim=1,
    )
    model.quantizer.codes.copy_(torch.arange(4.0)[:, None])
    model.quantizer.counts.copy_(torch.tensor([1.0, 5.0, 0.0, 4.0]))
    n = 20_000
    x = model.sample(n, rng=generator("usage")).x
    for token in x.T:
        share = torch.bincount(token.long(), minlength=4) / n
        assert share[2] == 0 and float((share - torch.tensor([0.1, 0.5, 0.0, 0.4])).abs().max()) < 4 * 0.5 / n**0.5
    together = ((x[:, 0] == 1) & (x[:, 1] == 3)).double().mean()
    assert float(together) == pytest.approx(0.2, abs=4 * 0.4 / n**0.5)


def test_samples_may_hold_the_noise_of_the_likelihood():
    model = VQVAE(
        (2,),
        encoder=small,
        decoder=network(lambda e, y: 0 * e[:, 0, :, 0]),
        likelihood=Gaussian(log_var=-2.0),
        sample_likelihood=True,
    )
    assert float(model.sample(20_000, rng=generator(0)).x.var()) == pytest.approx(math.exp(-2), rel=0.03)
    model.sample_likelihood = False
    assert not model.sample(4).x.any()


def test_images_are_snapped_to_their_levels_before_they_are_encoded():
    model = VQVAE(
        (1, 8, 8),
        levels=17,
        encoder=functools.partial(GridEncoder, width=8),
        decoder=functools.partial(GridDecoder, width=8),
        likelihood=DiscretizedLogistic(17),
        codebook_size=8,
        embedding_dim=4,
        downsampling=2,
    ).eval()
    centre = bin_center(torch.randint(17, (8, 1, 8, 8)), 17)
    assert model.latent.shape == (1, 4, 4) and model.encode(centre).shape == (8, 1, 4, 4)
    for place in (-0.9 / 17, 0.9 / 17):
        assert torch.equal(model.encode(centre + place), model.encode(centre))
        assert torch.equal(model.loss(centre + place).total, model.loss(centre).total)


def test_training_lowers_the_distortion_and_the_averaged_model_reconstructs_as_well():
    """The average of the encoder's weights meets the codebook of the weights themselves."""
    x = torch.randn(512, 2, generator=generator("data"))
    model = plane(codebook_size=16, tokens=2)
    model.likelihood.log_var.data.fill_(-3.0)
    batches, adam = Batches(Split(x, None), 64, seed=0), functools.partial(torch.optim.Adam, lr=3e-3)
    module = GenerativeModule(model, adam, batches, Budget(images=64 * 300), ema_half_life=44_000)
    module.make_plan()
    module.training_step((0, 300), 0)
    assert torch.equal(module.ema.model.quantizer.codes, model.quantizer.codes)
    errors = [float((reconstruct(m.eval(), x) - x).square().mean()) for m in (model, module.ema.model)]
    assert errors[0] < 0.1 and errors[1] < 1.1 * errors[0], errors


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"commitment": -1.0}, "commitment must not be negative, not -1.0"),
        ({"tokens": 0}, "at least 1, not 4 and 0"),
        ({"codebook_size": 1}, "at least 2 codes"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plane(**settings)


def test_patches_must_tile_the_image():
    with pytest.raises(ValueError, match="downsampling=4 does not divide the sides of 10x8 pixels"):
        VQVAE((1, 10, 8), encoder=small, decoder=small, likelihood=DiscretizedLogistic(4), levels=4)
    with pytest.raises(ValueError, match="downsampling from 9x9 to 3x3 is not a power of two"):
        GridEncoder((1, 9, 9), (4, 3, 3))


def test_the_networks_have_as_many_weights_as_sonnet_s():
    """Counted by hand from the layers of its notebook, for 32x32 colour images and 3 outputs: 372,416 and 290,307."""

    def conv(inputs: int, outputs: int, side: int) -> int:
        return inputs * outputs * side**2 + outputs

    residual = 2 * (conv(128, 32, 3) + conv(32, 128, 1))
    encoder = conv(3, 64, 4) + conv(64, 128, 4) + conv(128, 128, 3) + residual + conv(128, 64, 1)
    decoder = conv(64, 128, 3) + residual + conv(128, 64, 4) + conv(64, 3, 4)
    count = [sum(p.numel() for p in net.parameters()) for net in (GridEncoder((3, 32, 32), (64, 8, 8)),
             GridDecoder((64, 8, 8), (3, 32, 32)))]  # fmt: skip
    assert count == [encoder, decoder] == [372_416, 290_307]
