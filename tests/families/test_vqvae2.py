r"""VQ-VAE-2 against enumeration: K = 3 codes in grids of 1x1 and 2x2 are 3^5 = 243 hierarchies.

Their probabilities sum to 1 and factor into that of the top level and those of the bottom given the top, samples have them, and
the bound of an event is that of its own codes, below the sum over all. One level is a VQ-VAE to the bit.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels, Codes, Joint
from genzoo.diffusion.guidance import ClassifierFreeGuidance, guide
from genzoo.distributions.discretization import bin_center
from genzoo.distributions.likelihoods import Categorical
from genzoo.event import EventSpec
from genzoo.families.autoregressive import Autoregressive
from genzoo.families.ddpm import DDPM
from genzoo.families.latent import LatentDensity
from genzoo.families.vqvae import VQVAE
from genzoo.families.vqvae2 import VQVAE2, LevelPriors, level_grids, vqvae2
from genzoo.nn.embeddings import CodeFeatures
from genzoo.nn.grid import GridDecoder, GridEncoder
from genzoo.nn.pixelcnn import PixelCNN
from genzoo.nn.quantize import FiniteScalarQuantizer, ResidualQuantizer, VectorQuantizer
from genzoo.nn.transformer import Transformer
from genzoo.numerics.random import generator

K = 3
EVENT = EventSpec((1, 4, 4), 4)
CLASSES = ClassLabels(2)
small: dict[str, Any] = {
    **{name: functools.partial(GridEncoder, width=8, residual_width=4, blocks=1) for name in ("encoder", "reduce")},
    **{name: functools.partial(GridDecoder, width=8, residual_width=4, blocks=1) for name in ("decoder", "expand")},
    "features": 6,
}
QUANTIZERS = {
    "vq": functools.partial(VectorQuantizer, K, 5),
    "residual": functools.partial(ResidualQuantizer, K, 5, 2),
    "fsq": functools.partial(FiniteScalarQuantizer, (K,)),
}
NETWORKS = {
    "transformer": functools.partial(Transformer, width=16, layers=1, heads=2),
    "pixelcnn": functools.partial(PixelCNN, width=8, layers=2, first_kernel=3),
}
each_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)
each_network = pytest.mark.parametrize("network", NETWORKS)


def prior_of(network: str) -> Any:
    return functools.partial(
        Autoregressive, network=NETWORKS[network], likelihood=Categorical, inputs="classes", condition_dropout=0.2
    )


def built(network: str = "transformer", quantizer: str = "vq", condition=None, **settings) -> LatentDensity:
    """Build a model in float64 with weights that are no longer those of an initialisation."""
    torch.manual_seed(0)
    codec = functools.partial(VQVAE2, **small, quantizer=QUANTIZERS[quantizer], **settings)
    model = vqvae2(EVENT, condition, codec=codec, prior=prior_of(network)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def hierarchies() -> Tensor:
    """Return all codes, (243, 1, 5, 1), the top level first."""
    return torch.tensor(list(itertools.product(range(K), repeat=5))).view(-1, 1, 5, 1)


def images(n: int, name: str = "images") -> Tensor:
    return 2 * torch.rand(n, 1, 4, 4, generator=generator(name), dtype=torch.float64) - 1


# One level


@pytest.mark.parametrize("condition", [None, CLASSES], ids=["unconditional", "classes"])
def test_one_level_is_a_vq_vae_to_the_bit(condition):
    settings = {"encoder": small["encoder"], "decoder": small["decoder"], "downsampling": 2}
    torch.manual_seed(0)
    plain = VQVAE(EVENT, condition, codebook_size=K, embedding_dim=5, **settings)
    torch.manual_seed(0)
    model = VQVAE2(EVENT, condition, **{**small, **settings}, quantizer=QUANTIZERS["vq"], levels=1)
    x, y = images(6).float(), None if condition is None else torch.arange(6) % 2
    adams = [torch.optim.Adam(one.parameters(), lr=1e-2) for one in (plain, model)]
    for step in range(5):
        losses = [one.loss(x, y) for one in (plain, model)]
        assert torch.equal(losses[0].total, losses[1].total)
        for one, adam, loss in zip((plain, model), adams, losses, strict=True):
            adam.zero_grad()
            loss.total.backward()
            adam.step()
            one.after_step(loss.aux, 6, rng=generator("revival", step))
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert torch.equal(plain.encode(x, y).flatten(), model.encode(x, y).flatten())
    samples = [one.sample(4, None if y is None else y[:4], rng=generator("samples")).x for one in (plain, model)]
    assert torch.equal(*samples)


# Codes


@each_quantizer
def test_codes_are_one_sequence_of_which_every_part_reaches_the_event(quantizer):
    model = built(quantizer=quantizer).codec
    depth = model.quantizer.quantizers[0].depth
    assert model.grids == [(1, depth), (2, 2 * depth)] and model.latent.shape == (1, 5 * depth, 1)
    z = torch.randint(K, (1, *model.latent.shape), generator=generator("codes"))
    hierarchy = model.quantizer
    assert torch.equal(hierarchy.join(hierarchy.split(z[:, 0])), z[:, 0])
    assert len(hierarchy.marginals) == len(hierarchy.split(z[:, 0])) == 2 * depth
    x = model.decode(z)
    for place in range(5 * depth):
        other = z.clone()
        other[0, 0, place, 0] = (z[0, 0, place, 0] + 1) % K
        assert float((model.decode(other) - x).abs().max()) > 1e-6, "a code is never looked at"


@each_quantizer
def test_training_quantises_as_encoding_does_and_decodes_what_it_quantises(quantizer):
    model = built(quantizer=quantizer).codec
    x = images(7)
    e, k, commitment, z = model.quantizer(model._vectors(x, None))
    assert torch.equal(k.unsqueeze(1), model.encode(x))
    torch.testing.assert_close(e, model.quantizer.lookup(k), rtol=0, atol=1e-12)
    assert (float(commitment.detach()) > 0) == (quantizer != "fsq")
    assert z.shape[2] == 5


def test_the_bottom_level_is_quantised_given_the_top():
    """The networks between levels by hand."""
    codec = built().codec
    q, h = codec.quantizer, codec._vectors(images(4), None)
    above = q.reduce[0](h)
    z_top = q.merge[1](above)
    k_top = q.quantizers[1].nearest(z_top)
    u = q.expand[0](q.quantizers[1].lookup(k_top))
    z_bottom = q.merge[0](torch.cat([h, u], dim=1))
    k_bottom = q.quantizers[0].nearest(z_bottom)
    expected = torch.cat([k_top.flatten(1), k_bottom.flatten(1)], dim=1)
    assert torch.equal(codec.encode(images(4)).flatten(1), expected)
    e = torch.cat([q.quantizers[0].lookup(k_bottom), u], dim=1)
    torch.testing.assert_close(q.lookup(expected.unsqueeze(2)), e, rtol=0, atol=1e-12)
    distances = [(z - quantizer.lookup(k)).square().mean() for z, quantizer, k in
                 ((z_top, q.quantizers[1], k_top), (z_bottom, q.quantizers[0], k_bottom))]  # fmt: skip
    torch.testing.assert_close(q(h).commitment, sum(distances), rtol=1e-12, atol=0)


@each_quantizer
def test_every_level_follows_its_own_vectors(quantizer):
    """After a step each codebook is that of a quantiser alone, which has been given the vectors of its level."""
    hierarchy = built(quantizer=quantizer).codec.quantizer
    _, k, _, z = hierarchy(torch.randn(6, 6, 2, 2, generator=generator("h"), dtype=torch.float64))
    alone = [QUANTIZERS[quantizer]().double() for _ in range(2)]
    for mine, one in zip(alone, hierarchy.quantizers, strict=True):
        mine.load_state_dict(one.state_dict())
    rng = generator("revival")
    bottom, top = hierarchy.levels(k)
    alone[0].update(z[..., 0][:, :, 1:].view(6, -1, 2, 2), bottom, rng)
    alone[1].update(z[..., 0][:, :, :1].view(6, -1, 1, 1), top, rng)
    hierarchy.update(z, k, generator("revival"))
    for mine, one in zip(alone, hierarchy.quantizers, strict=True):
        assert all(torch.equal(value, one.state_dict()[name]) for name, value in mine.state_dict().items())


def test_the_codec_learns_with_all_of_its_networks():
    codec = built().codec.train()
    loss = codec.loss(images(8))
    loss.total.backward()
    assert not [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
    assert "dead" in codec.after_step(loss.aux, 8, rng=generator(0))


@pytest.mark.parametrize(
    ("sides", "downsampling", "levels", "expected"),
    [
        ((28, 28), 2, 2, [(14, 14), (7, 7)]),
        ((32, 32), 2, 3, [(16, 16), (8, 8), (4, 4)]),
        ((2, 2), 2, 2, [(1, 1), (1, 1)]),
        ((), 2, 3, [(5, 1), (3, 1), (2, 1)]),
    ],
)
def test_each_level_has_half_the_sides_of_the_one_below(sides, downsampling, levels, expected):
    assert level_grids(sides, downsampling, 5, levels) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"levels": 0}, "levels must be at least 1, not 0"),
        ({"levels": 3, "downsampling": 4, "event": EventSpec((1, 28, 28), 4)}, "levels=3: 7x7 codes cannot be halved"),
        ({"commitment": -1.0}, "commitment must not be negative, not -1.0"),
    ],
)
def test_impossible_hierarchies_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        VQVAE2(wrong.pop("event", EVENT), **small, **wrong)


# The prior


@each_network
@pytest.mark.parametrize("condition", [None, CLASSES], ids=["unconditional", "classes"])
def test_the_probabilities_of_all_hierarchies_are_those_of_the_top_times_those_of_the_bottom(network, condition):
    model = built(network, condition=condition)
    prior, k = model.prior, hierarchies()
    y = None if condition is None else torch.ones(len(k), dtype=torch.int64)
    x = bin_center(k, K, torch.float64)
    log_p = prior.log_prob(x, y).value - 5 * math.log(K / 2)  # of integers
    table = log_p.exp().view(K, K**4)
    assert table.sum().item() == pytest.approx(1, abs=1e-12)
    top = prior.priors[0].log_prob(x[:: K**4, :, :1], None if y is None else y[:K]).value - math.log(K / 2)
    torch.testing.assert_close(table.sum(1), top.exp(), rtol=1e-10, atol=0)
    bottom = table / table.sum(1, keepdim=True)
    assert float((bottom[0] - bottom[1]).abs().sum()) > 1e-2, "the bottom does not depend on the top"


@each_network
def test_samples_have_these_probabilities(network):
    model = built(network, condition=CLASSES)
    k, n = hierarchies(), 20_000
    y = torch.zeros(n, dtype=torch.int64)
    p = (model.prior.log_prob(bin_center(k, K, torch.float64), y[: len(k)]).value - 5 * math.log(K / 2)).exp()
    x, nfe, _ = model.prior.sample(n, y, rng=generator("samples"))
    assert nfe == 5
    drawn = torch.floor((x + 1) * K / 2).long().flatten(1) @ torch.tensor([81, 27, 9, 3, 1])
    counts = torch.bincount(drawn, minlength=len(k)).double()
    kept = p * n > 5
    chi = ((counts - n * p)[kept].square() / (n * p)[kept]).sum()
    degrees = int(kept.sum()) - 1
    assert float(chi) < degrees + 5 * math.sqrt(2 * degrees)


@each_network
@pytest.mark.parametrize("quantizer", [name for name in QUANTIZERS if name != "residual"])  # which has 3^10 hierarchies
def test_the_bound_is_that_of_the_events_own_codes(network, quantizer):
    model, x, k = built(network, quantizer), images(5), hierarchies()
    log_prior = model.prior.log_prob(bin_center(k, K, torch.float64)).value - 5 * math.log(K / 2)
    joint = torch.stack(
        [log_prior + model.codec.log_likelihood(row.expand(len(k), 1, 4, 4), k) for row in x]
    )  # (5, 243)
    own = model.codec.encode(x).flatten(1) @ torch.tensor([81, 27, 9, 3, 1])
    found = model.log_prob(x).value
    torch.testing.assert_close(found, joint[torch.arange(5), own], rtol=1e-10, atol=1e-10)
    assert bool((found < joint.logsumexp(1)).all())


def test_the_loss_of_the_prior_is_its_negative_log_probability_in_nats_per_code():
    model = built()
    stage, x = model.stages()[1].module.eval(), images(6)
    loss = stage.loss(x)
    k = model.codec.encode(x)
    nll = -model.prior.log_prob(bin_center(k, K, torch.float64)).value.mean()
    torch.testing.assert_close(loss.total, nll / 5, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss.terms["nll_0"] + loss.terms["nll_1"], nll, rtol=1e-10, atol=0)


def test_guidance_sharpens_every_level():
    """Guided logits u + s (c - u) of both levels, by enumeration of two networks' logits."""
    model = built(condition=CLASSES)
    n = 4000
    y = torch.zeros(n, dtype=torch.int64)
    sharp = guide(model.prior, functools.partial(ClassifierFreeGuidance, scale=3.0))
    drawn = torch.floor((sharp.sample(n, y, rng=generator("guided")).x + 1) * K / 2).long().flatten(1)
    top = model.prior.priors[0]
    k = bin_center(torch.arange(K).view(K, 1, 1, 1), K, torch.float64)
    c, u = (top._log_prob(k, v, 1, None).value for v in (torch.zeros(K).long(), torch.full((K,), 2)))
    p = torch.softmax(u + 3 * (c - u), 0)
    shares = torch.bincount(drawn[:, 0], minlength=K).double() / n
    torch.testing.assert_close(shares, p.detach(), rtol=0, atol=0.03)
    chosen = int(p.argmax())
    given = model.prior._given(1, k[chosen : chosen + 1].expand(1, 1, 1, 1), y[:1])
    null = model.prior.priors[1].condition.null(given)
    bottom = model.prior.priors[1]
    first = []
    for v in (given, null):
        state = bottom.network.incremental(1, v)
        first.append(torch.log_softmax(state.step(None).double().view(K), 0))
    p = torch.softmax(first[1] + 3 * (first[0] - first[1]), 0)
    rows = drawn[drawn[:, 0] == chosen]
    shares = torch.bincount(rows[:, 1], minlength=K).double() / len(rows)
    torch.testing.assert_close(shares, p.detach(), rtol=0, atol=0.05)


def test_codes_above_are_never_dropped_and_classes_are():
    prior = built(condition=CLASSES).prior
    assert prior.priors[0].condition == CLASSES
    condition = prior.priors[1].condition
    assert condition == Joint((Codes((1, 1), K), CLASSES), fixed=1)
    given = prior._given(1, torch.zeros(3, 1, 1, 1).double(), torch.tensor([0, 1, 1]))
    codes, labels = condition.split(condition.null(given))
    assert codes.flatten().tolist() == [1, 1, 1] and labels.tolist() == [2, 2, 2]


def test_priors_without_a_density_and_other_codecs_are_refused():
    with pytest.raises(ValueError, match="prior: Deaf has no density; choose transformer or pixelcnn"):

        class Deaf(torch.nn.Module):
            def __init__(self, event, condition):
                super().__init__()

        LevelPriors(EventSpec((1, 5, 1), K), prior=Deaf, grids=[(1, 1), (2, 2)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs 5 codes, not"):
        LevelPriors(EventSpec((1, 4, 1), K), prior=DDPM, grids=[(1, 1), (2, 2)])
    with pytest.raises(ValueError, match="codec: VQVAE has one level of codes; use model=vqvae, or codec=vqvae2"):
        vqvae2(EVENT, codec=VQVAE, prior=prior_of("transformer"))  # type: ignore[arg-type]


# Codes as conditions


def test_features_of_codes_stand_where_the_codes_do():
    features = CodeFeatures(Codes((2, 2), 4), 6, (6, 6)).double()
    y = torch.randint(4, (3, 2, 2), generator=generator("codes"))
    other = y.clone()
    other[:, 1, 1] = (other[:, 1, 1] + 1) % 4
    change = (features(y)[0] - features(other)[0]).abs().sum(1)
    assert bool((change[:, 3:, 3:] > 0).all()) and not change[:, 0, 0].any(), "two 3x3 convolutions reach two pixels"


def test_codes_have_a_domain_and_a_null_value():
    codes = Codes((2, 3), 5)
    y = torch.randint(5, (4, 2, 3))
    assert bool(codes.valid(y)) and not bool(codes.valid(y - 5))
    null = codes.null(y)
    assert bool(codes.is_null(null).all()) and not bool(codes.valid(null)) and bool(codes.valid(null, allow_null=True))
    half = y.clone()
    half[0, 0] = 5
    assert not bool(codes.valid(half, allow_null=True))
    with pytest.raises(ValueError, match="Codes needs a shape"):
        Codes((2,), 5)
