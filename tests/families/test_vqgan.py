r"""VQGAN: its losses are those of its autoencoder, its critic and its perceptual network, and lambda is the ratio of the
gradients of both terms, put together here by hand, in the last weights of the decoder."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import ClassLabels
from genzoo.distributions.discretization import to_bin_centers
from genzoo.event import EventSpec
from genzoo.families.autoregressive import Autoregressive
from genzoo.families.latent import latent
from genzoo.families.vae import VAE
from genzoo.families.vqgan import VQGAN
from genzoo.families.vqvae import FSQVAE, VQVAE
from genzoo.metrics.features import FeatureError
from genzoo.metrics.perceptual import PerceptualDistance
from genzoo.nn.grid import GridDecoder, GridEncoder
from genzoo.nn.resnet import ConvEncoder
from genzoo.numerics.random import generator

EVENT = EventSpec((1, 8, 8), 17)
small: dict[str, Any] = {
    "encoder": functools.partial(GridEncoder, width=8, residual_width=4, blocks=1),
    "decoder": functools.partial(GridDecoder, width=8, residual_width=4, blocks=1),
}
AUTOENCODERS = {
    "vq": functools.partial(VQVAE, codebook_size=5, embedding_dim=3, **small),
    "residual": functools.partial(VQVAE, codebook_size=5, embedding_dim=3, depth=2, **small),
    "fsq": functools.partial(FSQVAE, code_levels=(3, 3), **small),
}


def built(autoencoder: str = "vq", condition=None, **settings) -> VQGAN:
    torch.manual_seed(0)
    critic = functools.partial(ConvEncoder, width=4, blocks=0, norm=False)
    settings = {"perceptual": PerceptualDistance("digits"), **settings}
    return VQGAN(EVENT, condition, autoencoder=AUTOENCODERS[autoencoder], critic=critic, **settings).double()


def images(n: int) -> Tensor:
    return 2 * torch.rand(n, 1, 8, 8, generator=generator("images"), dtype=torch.float64) - 1


def terms(model: VQGAN, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of the autoencoder alone, the reconstruction's terms, and the adversarial one, by their formulas."""
    auto = model.autoencoder
    e, _, commitment, _ = auto.quantizer(auto._vectors(x, None))
    params = auto.decoder(e, None)
    fake = auto.likelihood.location(params)
    distortion = -auto.likelihood.log_prob(params, x).mean() / 64
    rec = distortion + model.perceptual_weight * model.perceptual(to_bin_centers(x, 17), fake).mean()
    return distortion + 0.25 * commitment, rec, -model.critic(fake).mean()


@pytest.mark.parametrize("autoencoder", AUTOENCODERS)
def test_the_weight_balances_the_gradients_in_the_last_weights_of_the_decoder(autoencoder):
    model, x = built(autoencoder, perceptual_weight=0.7, adversarial_weight=0.4), images(6)
    loss, named, _ = model.loss(x)
    last = model.autoencoder.decoder.up[-1].weight
    own = terms(model, x)
    norms = [float(torch.autograd.grad(term, last, retain_graph=True)[0].norm()) for term in own[1:]]
    expected = 0.4 * norms[0] / (norms[1] + 1e-6)
    assert float(named["weight"]) == pytest.approx(expected, rel=1e-9)
    perceptual = 0.7 * named["perceptual"]
    torch.testing.assert_close(loss, own[0] + perceptual + named["weight"] * own[2], rtol=1e-10, atol=1e-10)


def test_the_critic_has_the_hinge_loss_and_each_turn_its_own_weights():
    model, x = built(), images(6)
    auto = model.autoencoder
    fake = auto.likelihood.location(auto.decoder(auto.quantizer(auto._vectors(x, None)).e, None)).detach()
    a, b = model.critic(to_bin_centers(x, 17)), model.critic(fake)
    expected = F.relu(1 - a).mean() + F.relu(1 + b).mean()
    torch.testing.assert_close(model.loss(x, turn="critic").total, expected, rtol=1e-12, atol=0)
    model.loss(x, turn="critic").total.backward()
    assert all(p.grad is None for p in auto.parameters()) and all(p.grad is not None for p in model.critic.parameters())
    model.zero_grad()
    for p in model.critic.parameters():
        p.requires_grad_(False)
    model.loss(x, turn="autoencoder").total.backward()
    assert all(p.grad is not None and p.grad.any() for p in auto.parameters())
    assert [model.turn(i) for i in range(4)] == ["autoencoder", "critic"] * 2


def test_the_adversarial_term_begins_after_its_first_images_and_that_is_saved():
    model, x = built(start=20), images(5)
    weights = []
    for step in range(6):
        turn = model.turn(step)
        loss = model.loss(x, turn=turn)
        if turn == "autoencoder":
            weights.append(float(loss.terms["weight"]))
        found = model.after_step(loss.aux, 5, rng=generator(step))
        assert ("dead" in found) == (turn == "autoencoder")
    assert weights[:2] == [0.0, 0.0] and weights[2] > 0
    other = built(start=20)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert int(other.seen) == 30


def test_without_its_terms_it_is_the_autoencoder_to_the_bit():
    model, x = built(perceptual=None, adversarial_weight=0.0), images(6)
    assert torch.equal(model.loss(x).total, model.autoencoder.loss(x).total)
    assert torch.equal(model.encode(x), model.autoencoder.encode(x))
    z = model.encode(x)
    assert torch.equal(model.decode(z), model.autoencoder.decode(z))
    assert torch.equal(model.log_likelihood(x, z), model.autoencoder.log_likelihood(x, z))
    samples = [one.sample(5, rng=generator(0)).x for one in (model, model.autoencoder)]
    assert torch.equal(*samples)


def test_its_loss_is_the_same_in_an_evaluation_and_inference_mode():
    model = built(condition=ClassLabels(3))
    x, y = images(6), torch.arange(6) % 3
    expected = model.loss(x, y).total
    with torch.inference_mode():
        found = model.eval().loss(x.clone(), y.clone()).total
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_it_is_a_codec_whose_prior_is_trained_afterwards():
    prior = functools.partial(Autoregressive, inputs="classes")
    model = latent(EVENT, codec=functools.partial(VQGAN, autoencoder=AUTOENCODERS["vq"]), prior=prior)
    assert [stage.name for stage in model.stages()] == ["codec", "prior"]
    x = images(4).float()
    assert bool(model.log_prob(x).value.isfinite().all())


def test_impossible_ones_are_refused():
    with pytest.raises(ValueError, match="adversarial_weight must not be negative, not -1"):
        built(adversarial_weight=-1.0)
    with pytest.raises(ValueError, match="autoencoder: VAE has no codes; choose vqvae, residual or fsq"):
        VQGAN(EVENT, autoencoder=VAE)  # type: ignore[arg-type]
    with pytest.raises(FeatureError, match="perceptual network 'clip_shapes': choose digits or fashion_mnist"):
        PerceptualDistance("clip_shapes")


# The perceptual distance


def test_the_perceptual_distance_is_its_formula():
    distance = PerceptualDistance("digits").double().train()
    x, y = images(3), images(3).flip(0)
    maps: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: maps.append(args[0])) for m in distance.body
             if isinstance(m, nn.MaxPool2d)]  # fmt: skip
    total = torch.zeros(3, dtype=torch.float64)
    pairs = []
    for image in (x, y):
        maps.clear()
        out = distance.body(image)
        pairs.append([*maps, out])
    for hook in hooks:
        hook.remove()
    assert len(pairs[0]) == 2
    for a, b in zip(*pairs, strict=True):
        unit = [v / v.square().sum(1, keepdim=True).sqrt() for v in (a, b)]
        total += (unit[0] - unit[1]).square().sum(1).mean((1, 2))
    torch.testing.assert_close(distance(x, y), total, rtol=1e-9, atol=1e-12)
    assert not distance(x, x).any() and not any(p.requires_grad for p in distance.parameters())
    assert not any(module.training for module in distance.modules()), "batch norm keeps its statistics"
    assert distance(torch.rand(2, 3, 12, 12).double(), torch.rand(2, 3, 12, 12).double()).shape == (2,)
