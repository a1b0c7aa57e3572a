"""The model of captions and codes by enumeration: all captions of two tokens and all images of a few codes."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from genzoo.conditions import ClassLabels, Tokens
from genzoo.diffusion.guidance import ClassifierFreeGuidance, guide
from genzoo.distributions.discretization import bin_center, quantize
from genzoo.distributions.likelihoods import Gaussian
from genzoo.event import EventSpec
from genzoo.families.dalle import DALLE
from genzoo.families.dvae import DVAE
from genzoo.families.latent import LatentDensity, latent
from genzoo.families.vqvae import FSQVAE, VQVAE
from genzoo.model import Bound, Density
from genzoo.nn.mlp import MLP
from genzoo.nn.text_image_transformer import TextImageTransformer
from genzoo.numerics.random import SampleStreams, generator

L, V, K, SHAPE = 2, 4, 3, (1, 2, 2)
N = math.prod(SHAPE)
CAPTIONS = [[1, 0], [2, 1], [2, 2], [2, 3], [3, 1], [3, 2], [3, 3]]  # all that end, or fill both places
NULL = [V, V]
small = functools.partial(TextImageTransformer, width=8, layers=2, heads=2)


def built(scale: float = 0.5, shape: tuple[int, ...] = SHAPE, levels: int = K, **settings) -> DALLE:
    """Build a model in float64 with weights far from where they start."""
    torch.manual_seed(0)
    model = DALLE(EventSpec(shape, levels), Tokens(L, V), network=small, **settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model


def all_images(levels: int = K, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Every image, as bin centres, (K^N, *shape)."""
    values = torch.cartesian_prod(*[torch.arange(levels)] * math.prod(shape))
    return bin_center(values, levels, torch.float64).view(-1, *shape)


@torch.no_grad()
def probabilities(model: DALLE, caption: list[int]) -> Tensor:
    """Probability of every image given a caption, (K^N,)."""
    x = all_images(model.levels, model.shape)
    log_p = model._log_prob(x, torch.tensor([caption]).expand(len(x), -1), 1, None).value
    return (log_p - model.dim * math.log(model.levels / 2)).exp()


# Probabilities


@pytest.mark.parametrize("caption", [*CAPTIONS, NULL], ids=str)
def test_probabilities_of_all_images_of_a_caption_sum_to_one(caption):
    model = built()
    p = probabilities(model, caption)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(p.max() / p.min()) > 10, "a law this flat would hide a fault"
    others = [other for other in [*CAPTIONS, NULL] if other != caption]
    assert all(float((p - probabilities(model, other)).abs().sum()) > 1e-3 for other in others)


@torch.no_grad()
def test_probabilities_of_all_captions_and_images_sum_to_one():
    model = built()
    of_text = model.text_log_prob(torch.tensor(CAPTIONS)).exp()
    assert float(of_text.sum()) == pytest.approx(1.0, abs=1e-12)
    joint = torch.stack([p * probabilities(model, caption) for p, caption in zip(of_text, CAPTIONS, strict=True)])
    assert float(joint.sum()) == pytest.approx(1.0, abs=1e-12)
    assert model.bound is Bound.EXACT


@torch.no_grad()
def test_what_fills_the_places_after_an_end_changes_nothing():
    condition, shape = Tokens(5, 7), (1, 2, 2)
    model = DALLE(EventSpec(shape, K), condition, network=small).double().eval()
    for parameter in model.parameters():
        parameter += 0.5 * torch.randn_like(parameter)
    x = all_images()[:10]
    padded = torch.tensor([[2, 3, 1, 0, 0]])
    for filling in itertools.product([0, 1, 2, 6], repeat=2):
        other = torch.tensor([[2, 3, 1, *filling]])
        assert torch.equal(model.text_log_prob(other), model.text_log_prob(padded))
        a, b = (model.log_prob(x, y.expand(10, -1)).value for y in (other, padded))
        assert torch.equal(a, b)
    longer = torch.tensor([[2, 3, 4, 1, 0]])
    assert not torch.allclose(model.log_prob(x, longer.expand(10, -1)).value, b)


# The loss


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.125, 0.5, 0.0])
def test_the_loss_weighs_the_cross_entropies_per_token_of_each_kind(weight):
    model = built(text_weight=weight, condition_dropout=0.0)
    x, y = all_images()[:42:6], torch.tensor(CAPTIONS)
    total, terms, _ = model.loss(x, y, rng=generator(0))
    image = -(model.log_prob(x, y).value - N * math.log(K / 2)).mean() / N
    tokens = sum(row.index(1) + 1 if 1 in row else L for row in CAPTIONS)
    text = -model.text_log_prob(y).sum() / tokens
    assert tokens == 13
    assert float(terms["image_nll"]) == pytest.approx(float(image), rel=1e-12)
    assert float(terms["text_nll"]) == pytest.approx(float(text), rel=1e-12)
    assert float(total) == pytest.approx(float(weight * text + (1 - weight) * image), rel=1e-12)


def test_the_paper_s_weight_is_an_eighth():
    assert built().text_weight == 1 / 8


@torch.no_grad()
def test_a_dropped_caption_is_the_null_value_and_has_no_cross_entropy():
    model = built(condition_dropout=1.0)
    x, y = all_images()[:7], torch.tensor(CAPTIONS)
    total, terms, _ = model.loss(x, y, rng=generator(0))
    null = torch.tensor([NULL]).expand(7, -1)
    image = -(model._log_prob(x, null, 1, None).value - N * math.log(K / 2)).mean() / N
    assert float(terms["image_nll"]) == pytest.approx(float(image), rel=1e-12) and float(terms["text_nll"]) == 0
    assert float(total) == pytest.approx(7 / 8 * float(image), rel=1e-12)
    some = built(condition_dropout=0.5)
    y = some.conditioner.drop(torch.tensor(CAPTIONS), generator(3))
    kept = [caption for caption in y.tolist() if caption != NULL]
    assert 0 < len(kept) < 7
    tokens = sum(row.index(1) + 1 if 1 in row else L for row in kept)
    expected = -some.text_log_prob(torch.tensor(kept)).sum() / tokens
    found = some.loss(x, torch.tensor(CAPTIONS), rng=generator(3)).terms["text_nll"]
    assert float(found) == pytest.approx(float(expected), rel=1e-12)


def test_training_learns_which_image_belongs_to_a_caption():
    torch.manual_seed(0)
    model = DALLE(EventSpec(SHAPE, K), Tokens(L, V), network=functools.partial(small, width=16), condition_dropout=0.0)
    images = torch.randint(K, (len(CAPTIONS), *SHAPE))
    y = torch.tensor(CAPTIONS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(bin_center(images, K), y)
        loss.total.backward()
        optimizer.step()
    assert float(loss.terms["image_nll"]) < 0.05
    # The captions are equally frequent: log 7 nats each, over 13 tokens.
    assert float(loss.terms["text_nll"]) == pytest.approx(7 * math.log(7) / 13, abs=0.03)
    x = model.eval().sample(len(y), y, rng=generator(0)).x
    assert float((quantize(x, K) == images).double().mean()) > 0.9


# Samples


def counted(model: DALLE, caption: list[int], n: int, rng: torch.Generator) -> Tensor:
    x = model.sample(n, torch.tensor([caption]).expand(n, -1), rng=rng).x
    assert torch.equal(x, bin_center(quantize(x, model.levels), model.levels, x.dtype))
    weights = model.levels ** torch.arange(model.dim - 1, -1, -1)
    return (quantize(x, model.levels).flatten(1) * weights).sum(1).bincount(minlength=model.levels**model.dim)


def fits(counts: Tensor, p: Tensor) -> bool:
    """Pearson's statistic over all images that are expected often enough, the rest as one; five standard deviations."""
    expected = p * counts.sum()
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    kept = expected > 0
    freedom = max(int(kept.sum()) - 1, 1)
    return float(((counts - expected).square() / expected)[kept].sum()) < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("caption", [[1, 0], [3, 1], [2, 3]], ids=str)
def test_images_are_drawn_as_often_as_their_probability_says(caption):
    model = built()
    counts = counted(model, caption, 10_000, generator("draws"))
    assert fits(counts, probabilities(model, caption))
    assert not fits(counts, probabilities(model, [2, 2])), "a test without power"


def guided(model: DALLE, caption: list[int], scale: float) -> Tensor:
    """The guided law by enumeration: each factor in turn is renormalised over the codes."""
    joint = [probabilities(model, y).view(*[model.levels] * model.dim) for y in (caption, NULL)]
    log_p = torch.zeros_like(joint[0])
    for i in range(model.dim):
        factors = []
        for p in joint:
            marginal = p.reshape(*[model.levels] * (i + 1), -1).sum(-1)
            factors.append((marginal / marginal.sum(-1, keepdim=True)).log())
        w = scale - 1
        factor = ((1 + w) * factors[0] - w * factors[1]).log_softmax(-1)
        log_p = log_p + factor.view(*factor.shape, *[1] * (model.dim - 1 - i))
    return log_p.exp().flatten()


@pytest.mark.parametrize("scale", [0.0, 1.7, 4.0])
def test_guided_samples_have_the_renormalised_probabilities(scale):
    model, caption = built(condition_dropout=0.1), [3, 1]
    expected, plain = guided(model, caption, scale), guided(model, caption, 1.0)
    torch.testing.assert_close(plain, probabilities(model, caption))
    assert float((expected - plain).abs().sum()) > 0.1, "guidance without effect would hide a fault"
    stronger = guide(model, functools.partial(ClassifierFreeGuidance, scale=scale))
    assert not isinstance(stronger, Density)
    counts = counted(stronger, caption, 20_000, generator("guided"))
    assert fits(counts, expected) and not fits(counts, plain)


def test_a_sample_is_the_same_whatever_its_batch_and_costs_one_evaluation_a_code():
    model, y = built(), torch.tensor(CAPTIONS)
    whole = model.sample(7, y, rng=SampleStreams(1, range(7)))
    assert whole.nfe == N
    assert torch.equal(model.sample(3, y[4:], rng=SampleStreams(1, [4, 5, 6])).x, whole.x[4:])
    stronger = guide(model, functools.partial(ClassifierFreeGuidance, scale=2.0))
    both = stronger.sample(7, y, rng=SampleStreams(1, range(7)))
    assert both.nfe == 2 * N
    assert torch.equal(stronger.sample(3, y[4:], rng=SampleStreams(1, [4, 5, 6])).x, both.x[4:])


# As a prior

CODECS = {
    "dvae": functools.partial(DVAE, codebook_size=K, embedding_dim=4),
    "vqvae": functools.partial(VQVAE, codebook_size=K, embedding_dim=4),
    "fsq": functools.partial(FSQVAE, code_levels=(3,)),
}


@pytest.mark.parametrize("name", CODECS)
def test_with_any_codec_it_bounds_the_density_of_images_given_their_captions(name):
    """Points whose two codes are enumerated: the bound is below log sum_z P(z | t) p(x | z) for every caption."""
    torch.manual_seed(0)
    mlp = functools.partial(MLP, width=16, depth=1)
    codec = functools.partial(CODECS[name], encoder=mlp, decoder=mlp, likelihood=Gaussian())
    options = {"prior": functools.partial(DALLE, network=small), "conditional_codec": False}
    model = latent(EventSpec((2,)), Tokens(L, V), codec=codec, **options).double().eval()
    assert isinstance(model, LatentDensity) and model.bound is Bound.LOWER and model.codec.condition is None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        z = torch.cartesian_prod(torch.arange(K), torch.arange(K)).view(-1, 1, 2, 1)
        n, x = 4000, torch.randn(3, 2, dtype=torch.float64)
        bounds = []
        for caption in ([1, 0], [2, 3]):
            y = torch.tensor([caption])
            log_P = model.prior.log_prob(bin_center(z, K, torch.float64), y.expand(len(z), -1)).value
            log_P = log_P - 2 * math.log(K / 2)
            assert float(log_P.exp().sum()) == pytest.approx(1, abs=1e-9)
            log_p = torch.stack([model.codec.log_likelihood(x, code.expand(3, -1, -1, -1)) for code in z], dim=1)
            truth = (log_p + log_P).logsumexp(1)
            value = model.log_prob(x.repeat_interleave(n, 0), y.expand(3 * n, -1), rng=generator("bound")).value
            value = value.view(3, n)
            assert bool((value.mean(1) < truth + 4 * value.std(1) / math.sqrt(n) + 1e-9).all())
            bounds.append(value.mean(1))
        assert float((bounds[0] - bounds[1]).abs().min()) > 1e-3, "a bound that does not depend on the caption"


def test_the_codec_has_no_caption_unless_it_is_told_to():
    codec = functools.partial(DVAE, codebook_size=K, downsampling=2)
    options = {"codec": codec, "prior": functools.partial(DALLE, network=small)}
    model = latent(EventSpec((1, 4, 4), 2), Tokens(L, V), **options, conditional_codec=False)
    assert model.codec.condition is None and model.prior.condition == Tokens(L, V)
    assert latent(EventSpec((1, 4, 4), 2), Tokens(L, V), **options).codec.condition == Tokens(L, V)


@pytest.mark.parametrize("condition", [None, ClassLabels(3)])
def test_data_without_captions_are_refused(condition):
    with pytest.raises(ValueError, match="data without captions: choose data with captions, such as data=shapes"):
        DALLE(EventSpec(SHAPE, K), condition)


@pytest.mark.parametrize(
    ("event", "settings", "message"),
    [
        (EventSpec((3, 2, 2), K), {}, "integers of one channel, such as codes"),
        (EventSpec((1, 2, 2)), {}, "integers of one channel, such as codes"),
        (EventSpec(SHAPE, K), {"text_weight": 1.0}, r"text_weight must be in \[0, 1\), not 1.0"),
        (EventSpec(SHAPE, K), {"condition_dropout": 2.0}, r"condition_dropout must be in \[0, 1\], not 2.0"),
    ],
)
def test_what_makes_no_sense_is_refused(event, settings, message):
    with pytest.raises(ValueError, match=message):
        DALLE(event, Tokens(L, V), network=small, **settings)


def test_guidance_without_dropped_captions_is_refused():
    model = built(condition_dropout=0.0)
    with pytest.raises(ValueError, match="condition_dropout=0"):
        guide(model, functools.partial(ClassifierFreeGuidance, scale=2.0))


def test_logits_of_the_vocabularies_are_apart():
    text, image = built()._logits(all_images()[:5], torch.tensor(CAPTIONS[:5]))
    assert text.shape == (5, L, V - 1) and image.shape == (5, K, 2, 2)
    assert not torch.isnan(F.log_softmax(text, -1)).any()
