"""Autoregressive models by enumeration: all 2^9 binary images of 3x3 pixels, all pixels of a few levels and channels, and
points of the plane whose conditional laws are known."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.diffusion.guidance import AutoGuidance, ClassifierFreeGuidance, guide
from genzoo.distributions.discretization import bin_center, quantize
from genzoo.distributions.likelihoods import Bernoulli, Categorical, GaussianMixture, LogisticMixture
from genzoo.families.autoregressive import Autoregressive
from genzoo.model import Density
from genzoo.nn.pixelcnn import PixelCNN
from genzoo.nn.transformer import Transformer
from genzoo.numerics.random import SampleStreams, generator

NETWORKS = {
    "pixelcnn": functools.partial(PixelCNN, width=8, layers=3, first_kernel=3),
    "transformer": functools.partial(Transformer, width=8, layers=2, heads=2),
}
either = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def built(network, likelihood, shape, levels=None, scale: float = 0.5, **settings) -> Autoregressive:
    """Build a model in float64 with weights far from where they start."""
    torch.manual_seed(0)
    model = Autoregressive(shape, network=network, likelihood=likelihood, levels=levels, **settings).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model


def all_events(shape: tuple[int, ...], levels: int) -> Tensor:
    """Every image, as bin centres, (K^D, *shape)."""
    D = math.prod(shape)
    return bin_center(torch.cartesian_prod(*[torch.arange(levels)] * D), levels, torch.float64).view(-1, *shape)


@torch.no_grad()
def probabilities(model: Autoregressive, y: int | None = None) -> Tensor:
    x = all_events(model.shape, model.levels)
    labels = None if y is None else torch.full((len(x),), y)
    return (model.log_prob(x, labels).value - model.dim * math.log(model.levels / 2)).exp()


LAWS = {
    "binary": (Bernoulli, (1, 3, 3), 2, {}),
    "binary-classes": (Categorical, (1, 3, 3), 2, {"inputs": "classes"}),
    "codes": (Categorical, (1, 2, 2), 5, {"inputs": "classes"}),
    "colour": (Categorical, (3, 1, 2), 3, {}),
    "colour-mixture": (functools.partial(LogisticMixture, components=2), (3, 1, 2), 3, {}),
    "patch": (functools.partial(LogisticMixture, components=2), (1, 2, 4), 3, {"patch": 2}),
    "patch-codes": (Categorical, (1, 2, 4), 2, {"patch": 2, "inputs": "classes"}),
}
laws = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


@laws
@either
def test_probabilities_of_all_images_sum_to_one(network, law):
    likelihood, shape, levels, settings = law
    p = probabilities(built(network, likelihood, shape, levels, **settings))
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(p.max() / p.min()) > 10, "a law this flat would hide a fault"


@pytest.mark.parametrize("y", [0, 2])
@either
def test_the_law_of_every_class_sums_to_one_and_is_its_own(network, y):
    model = built(network, Bernoulli, (1, 3, 3), 2, condition=ClassLabels(3))
    p = probabilities(model, y)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float((p - probabilities(model, 1)).abs().sum()) > 0.05


@laws
@either
def test_images_are_drawn_as_often_as_their_probability_says(network, law):
    """Pearson's statistic over all images that are expected often enough, the rest as one."""
    likelihood, shape, levels, settings = law
    n, model = 10_000, built(network, likelihood, shape, levels, **settings)
    x = model.sample(n, rng=generator("draws")).x
    weights = levels ** torch.arange(model.dim - 1, -1, -1)
    counts = (quantize(x, levels).flatten(1) * weights).sum(1).bincount(minlength=levels**model.dim)
    expected = n * probabilities(model)
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    kept = expected > 0
    statistic = float(((counts - expected).square() / expected)[kept].sum())
    freedom = int(kept.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), "beyond five standard deviations of chi-square"
    assert torch.equal(x, bin_center(quantize(x, levels), levels, x.dtype)), "levels come as bin centres"


@laws
@either
def test_log_prob_is_the_sum_of_the_conditional_laws(network, law):
    """The chain rule with the network asked anew at every prefix, later pixels filled with noise."""
    likelihood, shape, levels, settings = law
    model = built(network, likelihood, shape, levels, **settings)
    x = bin_center(torch.randint(levels, (4, *shape)), levels, torch.float64)
    pixels = torch.nn.functional.pixel_unshuffle(x, model.patch)
    C, H, W = pixels.shape[1:]
    total = torch.zeros(4, dtype=torch.float64)
    for i in range(H):
        for j in range(W):
            guess = bin_center(torch.randint(levels, pixels.shape), levels, torch.float64)
            guess[:, :, :i] = pixels[:, :, :i]
            guess[:, :, i, :j] = pixels[:, :, i, :j]
            seen = guess
            if model.inputs == "classes":
                hot = torch.nn.functional.one_hot(quantize(guess, levels), levels).double()
                seen = torch.cat([hot[:, c].permute(0, 3, 1, 2) for c in range(C)], dim=1)
            total += model.likelihood.log_prob(model.network(seen)[:, :, i, j], pixels[:, :, i, j])
    torch.testing.assert_close(model.log_prob(x).value, total, rtol=1e-10, atol=1e-10)


@either
def test_all_places_in_a_bin_are_one_event(network):
    model = built(network, Categorical, (1, 3, 3), 17)
    centre = bin_center(torch.randint(17, (5, 1, 3, 3)), 17, torch.float64)
    for place in (-0.99 / 17, 0.99 / 17):
        torch.testing.assert_close(
            model.log_prob(centre + place).value, model.log_prob(centre).value, rtol=1e-12, atol=0
        )


def test_classes_have_no_order_for_the_network():
    """One-hot inputs: a permutation of the levels that permutes the weights of the first layer changes nothing."""
    model = built(NETWORKS["transformer"], Categorical, (1, 2, 2), 5, inputs="classes")
    k = torch.randint(5, (6, 1, 2, 2))
    before = model.network(model._network_input(bin_center(k, 5, torch.float64)))
    order = torch.randperm(5)
    with torch.no_grad():
        model.network.stem[0].weight.copy_(model.network.stem[0].weight[:, order.argsort()])
    after = model.network(model._network_input(bin_center(order[k], 5, torch.float64)))
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


# Points


@either
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_vector_is_a_chain_of_its_coordinates(network, dim):
    """The law of coordinate i changes with those before it and with none after."""
    model = built(network, functools.partial(GaussianMixture, components=3), (dim,))
    x = torch.randn(5, dim, dtype=torch.float64, requires_grad=True)
    pixels = x.view(5, 1, dim, 1)
    params = model.network(pixels)[:, :, :, 0]
    by_hand = sum(model.likelihood.log_prob(params[:, :, i], x[:, i : i + 1]) for i in range(dim))
    torch.testing.assert_close(model.log_prob(x).value, by_hand, rtol=1e-12, atol=1e-12)
    for i in range(dim):
        (gradient,) = torch.autograd.grad(params[:, :, i].sum(), x, retain_graph=True, allow_unused=True)
        assert (gradient.abs().amax(0) > 0).tolist() == [j < i for j in range(dim)]


def test_draws_of_points_have_the_moments_of_the_density():
    model = built(NETWORKS["transformer"], functools.partial(GaussianMixture, components=2), (2,), scale=0.2)
    axis = torch.linspace(-12, 12, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        p = model.log_prob(grid).value.exp() * float(axis[1] - axis[0]) ** 2
    assert float(p.sum()) == pytest.approx(1, abs=1e-3)
    x = model.sample(50_000, rng=generator("points")).x
    mean = (p[:, None] * grid).sum(0)
    covariance = (p[:, None, None] * (grid - mean)[:, :, None] * (grid - mean)[:, None]).sum(0)
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0.05, atol=0.06)


def test_training_learns_the_conditional_law_of_a_curve():
    """x_2 = sin 2 x_1 + noise: the entropy is known, and is the least negative log-likelihood."""
    torch.manual_seed(0)
    std = 0.3
    x1 = torch.randn(1024)
    x = torch.stack([x1, torch.sin(2 * x1) + std * torch.randn(1024)], dim=1)
    network = functools.partial(Transformer, width=32, layers=1, heads=2)
    model = Autoregressive((2,), network=network, likelihood=functools.partial(GaussianMixture, components=4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 160)
    for step in range(160):
        rows = torch.arange(128) + 128 * (step % 8)
        optimizer.zero_grad()
        model.loss(x[rows]).total.backward()
        optimizer.step()
        decay.step()
    entropy = math.log(2 * math.pi * math.e) + math.log(std)
    with torch.no_grad():
        assert float(-model.log_prob(x).value.mean()) == pytest.approx(entropy, abs=0.1)


# What a sample costs


@either
def test_a_sample_is_the_same_whatever_its_batch_and_costs_one_evaluation_a_pixel(network):
    model = built(network, Categorical, (1, 4, 4), 3, patch=2)
    whole = model.sample(5, rng=SampleStreams(1, range(5)))
    assert whole.nfe == 4
    assert torch.equal(model.sample(2, rng=SampleStreams(1, [3, 4])).x, whole.x[3:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inputs": "codes"}, "inputs must be values or classes, not 'codes'"),
        ({"patch": 3}, r"patch=3 does not tile an event of shape \(1, 4, 4\)"),
        ({"patch": 0}, "patch=0 does not tile"),
        ({"shape": (2,), "patch": 2}, r"patch=2 does not tile an event of shape \(2,\)"),
        ({"levels": None}, "needs data with levels"),
        ({"levels": None, "inputs": "classes", "likelihood": GaussianMixture}, "inputs=classes needs data with levels"),
        ({"likelihood": GaussianMixture}, "not images with 4 levels"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    arguments = {"likelihood": Categorical, "levels": 4, **settings}
    shape = arguments.pop("shape", (1, 4, 4))
    with pytest.raises(ValueError, match=message):
        Autoregressive(shape, network=NETWORKS["pixelcnn"], **arguments)


# Guidance


def guided_probabilities(model: Autoregressive, y: int, scale: float) -> Tensor:
    """The guided law by enumeration: each factor in turn is renormalised over its levels.

    The factors are quotients of marginals of the joint probabilities, with the class and with the null value.
    """
    x, K, D = all_events(model.shape, model.levels), model.levels, model.dim
    joint = []
    for label in (y, model.condition.n):
        value = model._log_prob(x, torch.full((len(x),), label), 1, None).value
        joint.append((value - D * math.log(K / 2)).exp().view(*[K] * D))
    log_p = torch.zeros_like(joint[0])
    for i in range(D):  # in the order of the axes, which for one row of one channel, or one pixel, is the raster
        factors = []
        for p in joint:
            marginal = p.reshape(*[K] * (i + 1), -1).sum(-1)
            factors.append((marginal / marginal.sum(-1, keepdim=True)).log())
        guided = (factors[1] + scale * (factors[0] - factors[1])).log_softmax(-1)
        log_p = log_p + guided.view(*guided.shape, *[1] * (D - 1 - i))
    return log_p.exp()


@pytest.mark.parametrize("scale", [0.0, 1.7, 4.0])
@pytest.mark.parametrize(
    ("likelihood", "shape", "levels"),
    [(Categorical, (1, 1, 3), 3), (Bernoulli, (1, 1, 5), 2), (Categorical, (3, 1, 1), 3),
     (functools.partial(LogisticMixture, components=2), (1, 1, 3), 4),
     (functools.partial(LogisticMixture, components=3), (3, 1, 1), 3)],
    ids=["categorical", "bernoulli", "categorical-colour", "mixture", "mixture-colour"],
)  # fmt: skip
def test_guided_samples_have_the_renormalised_probabilities(likelihood, shape, levels, scale):
    network = NETWORKS["pixelcnn"]
    model = built(network, likelihood, shape, levels, condition=ClassLabels(2), condition_dropout=0.1)
    expected = guided_probabilities(model, 1, scale).flatten()
    assert float(expected.sum()) == pytest.approx(1.0)
    plain = guided_probabilities(model, 1, 1.0).flatten()
    torch.testing.assert_close(plain, probabilities(model, 1).flatten())
    assert float((expected - plain).abs().sum()) > 0.1, "guidance without effect would hide a fault"
    guided = guide(model, functools.partial(ClassifierFreeGuidance, scale=scale))
    n = 20_000
    drawn = guided.sample(n, torch.ones(n, dtype=torch.long), rng=torch.Generator().manual_seed(0))
    assert drawn.nfe == 2 * shape[1] * shape[2]
    k = quantize(drawn.x, levels).flatten(1)
    index = (k * levels ** torch.arange(k.shape[1] - 1, -1, -1)).sum(1)
    found = torch.bincount(index, minlength=len(expected)) / n
    likely = expected * n > 5
    chi2 = (n * (found - expected).square() / expected)[likely].sum()
    assert float(chi2) < float(likely.sum()) + 5 * math.sqrt(2 * float(likely.sum()))


def test_a_scale_of_one_is_the_model_itself_and_guidance_changes_no_other_model():
    model = built(NETWORKS["transformer"], Categorical, (1, 2, 2), 3, condition=ClassLabels(2), condition_dropout=0.1)
    assert guide(model, functools.partial(ClassifierFreeGuidance, scale=1.0)) is model
    y, rng = torch.ones(4, dtype=torch.long), torch.Generator()
    before = model.sample(4, y, rng=rng.manual_seed(0))
    guided = guide(model, functools.partial(ClassifierFreeGuidance, scale=3.0))
    assert not isinstance(guided, Density), "the density of the model is not that of guided samples"
    assert guided.sample(4, y, rng=rng.manual_seed(0)).nfe == 2 * before.nfe
    assert torch.equal(model.sample(4, y, rng=rng.manual_seed(0)).x, before.x)
    shared = {p.data_ptr() for p in guided.parameters()}
    assert shared == {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize(
    ("settings", "guidance", "problem"),
    [({"condition_dropout": 0.1}, functools.partial(ClassifierFreeGuidance, scale=2.0), "unconditional"),
     ({"condition": ClassLabels(2)}, functools.partial(ClassifierFreeGuidance, scale=2.0), "condition_dropout=0"),
     ({"condition": ClassLabels(2), "condition_dropout": 0.1},
      functools.partial(ClassifierFreeGuidance, scale=-1.0), "at least 0"),
     ({"condition": ClassLabels(2), "condition_dropout": 0.1},
      functools.partial(ClassifierFreeGuidance, scale=2.0, interval=(0.1, 1.0)), "no noise levels"),
     ({"condition": ClassLabels(2), "condition_dropout": 0.1},
      functools.partial(AutoGuidance, scale=2.0, worse=None), "their own unconditional logits")],
)  # fmt: skip
def test_logits_that_cannot_be_guided_are_refused(settings, guidance, problem):
    with pytest.raises(ValueError, match=problem):
        guide(built(NETWORKS["transformer"], Categorical, (1, 2, 2), 3, **settings), guidance)


def test_points_have_no_logits():
    model = built(NETWORKS["transformer"], GaussianMixture, (2,), condition=ClassLabels(2), condition_dropout=0.1)
    with pytest.raises(ValueError, match="GaussianMixture has no logits"):
        guide(model, functools.partial(ClassifierFreeGuidance, scale=2.0))


def test_a_dropped_class_trains_the_unconditional_factors_and_no_density_drops_one():
    model = built(NETWORKS["transformer"], Categorical, (1, 2, 2), 3, condition=ClassLabels(2), condition_dropout=1.0)
    x, y = all_events((1, 2, 2), 3), torch.arange(81) % 2
    model.loss(x, y).total.backward()
    gradient = model.network.embed_y.weight.grad
    assert bool((gradient[:2] == 0).all()) and bool((gradient[2] != 0).any())
    first, second = (model.log_prob(x, torch.full((81,), k)).value for k in (0, 1))
    assert not torch.allclose(first, second)
