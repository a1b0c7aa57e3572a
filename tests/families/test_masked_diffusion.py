"""Masked and uniform diffusion by enumeration: tabulated joint distributions with their exact conditional distributions as the
network, where the bound is the negative log probability, and arbitrary networks, against chains of explicit matrices."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.diffusion.guidance import ClassifierFreeGuidance, guide
from genzoo.distributions.discretization import bin_center, quantize
from genzoo.distributions.likelihoods import Bernoulli, Categorical, DiscretizedLogistic, Gaussian, LogisticMixture
from genzoo.families.masked_diffusion import SCHEDULES, MaskedDiffusion, MaskNoise, PositionDistribution
from genzoo.model import Density
from genzoo.nn.dit import DiT
from genzoo.numerics.random import SampleStreams, generator
from tests.exact import network

K, D = 3, 3
SHAPES = {"row": (1, 1, 3), "colour": (3, 1, 1), "vector": (3,)}
EVENTS = torch.cartesian_prod(*[torch.arange(K)] * D)  # (27, 3)
either = pytest.mark.parametrize("noise", ["mask", "uniform"])
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def table(seed: int = 0) -> Tensor:
    """Draw the probabilities of all events, (27,), far from independent."""
    return (2.0 * torch.randn(K**D, generator=generator("table", seed), dtype=torch.float64)).softmax(0)


def evidence(k_t: Tensor, level: Tensor) -> Tensor:
    """q(x_t | x) of each value of each position up to a factor, (B, D, K)."""
    kept = torch.nn.functional.one_hot(k_t, K + 1)[..., :K].double()
    uniform = (1 - level)[:, None, None] * kept + level[:, None, None] / K
    masked = (k_t == K)[..., None]
    return torch.where(masked, 1.0, uniform)


def exact_conditionals(p: Tensor, noise: str):
    """p(x_i | x_t without position i), (B, K D, ...), from one-hot inputs and the noise level."""

    def log_mu(k_t: Tensor, level: Tensor) -> Tensor:
        # An unmasked position of absorbing noise is certain.
        given = evidence(k_t, torch.zeros_like(level) if noise == "mask" else level)
        parts = []
        for i in range(D):
            weights = p.expand(len(k_t), -1)
            for j in (j for j in range(D) if j != i):
                weights = weights * given[:, j, EVENTS[:, j]]
            parts.append(torch.stack([weights[:, EVENTS[:, i] == v].sum(1) for v in range(K)], dim=1))
        mu = torch.stack(parts, dim=2)
        return (mu / mu.sum(1, keepdim=True)).log()  # (B, K, D)

    return log_mu


def arbitrary(noise: str):
    """An inexact function of x_t, and for uniform noise of the level too."""
    weights = torch.randn(D, K + 1, K, D, generator=generator("arbitrary"), dtype=torch.float64)

    def log_mu(k_t: Tensor, level: Tensor) -> Tensor:
        logits = sum(weights[j, k_t[:, j]] for j in range(D))
        return (logits * (1 if noise == "mask" else 1 - level[:, None, None])).log_softmax(1)

    return log_mu


def built(log_mu, shape=(1, 1, 3), noise: str = "mask", **settings) -> MaskedDiffusion:
    """Build a model whose network is a function of states, (B, D), and levels, (B,), to log probabilities, (B, K, D)."""
    states = K + (noise == "mask")

    def function(x: Tensor, level: Tensor, y: Tensor | None) -> Tensor:
        C, (H, W) = x.shape[1] // states, x.shape[2:]
        k_t = x.view(len(x), states, -1).argmax(1)
        given = log_mu(k_t, level) if y is None else log_mu(k_t, level, y)
        return given.reshape(len(x), K * C, H, W)

    settings = {"steps": 5, "network": network(function), **settings}
    return MaskedDiffusion(shape, levels=K, noise=noise, **settings).double().eval()


def events(shape: tuple[int, ...]) -> Tensor:
    return bin_center(EVENTS, K, torch.float64).view(-1, *shape)


def cost(model: MaskedDiffusion, k: Tensor, k_t: Tensor, level: Tensor) -> Tensor:
    """Evaluate the integrand of the bound, for rows of values."""
    k, k_t = (v.view(-1, *model.raster) for v in (k, k_t))
    return model.noise.cost(k, k_t, level, model.predict(k_t, level))


def forward_probs(k: Tensor, states: Tensor, level: float, noise: str) -> Tensor:
    """q(x_t | x) of all noisy events, (len(k), len(states))."""
    same = k[:, None] == states[None]
    other = states[None] == K if noise == "mask" else torch.full_like(states[None], True, dtype=torch.bool) / K
    return ((1 - level) * same + level * other).prod(2)


def all_states(noise: str) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(K + (noise == "mask"))] * D)


def mass_of_masks(model: MaskedDiffusion) -> Tensor:
    """The bound as the sum over numbers of masked positions, and subsets of them, of the weighted cost, (27,)."""
    total, noise = torch.zeros(len(EVENTS), dtype=torch.float64), model.noise
    edges = noise.schedule.time(torch.arange(D + 1, dtype=torch.float64) / D)
    for n in range(1, D + 1):
        t = (edges[n - 1] + edges[n]).expand(len(EVENTS)) / 2
        level, weight = noise.at(t)
        assert torch.equal(level, torch.full_like(level, n / D)), "times of n masked positions"
        for places in itertools.combinations(range(D), n):
            k_t = EVENTS.clone()
            k_t[:, list(places)] = K
            probability = (edges[n] - edges[n - 1]) / math.comb(D, n)
            total += probability * weight * cost(model, EVENTS, k_t, level)
    return total


def integral(model: MaskedDiffusion, noise: str, nodes: int = 120) -> Tensor:
    """The continuous-time bound by quadrature over t, and enumeration of x_t, (27,).

    ``t = s^4/(s^4 + (1 - s)^4)`` resolves the logarithmic singularities of its ends.
    """
    s = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
    t = s**4 / (s**4 + (1 - s) ** 4)
    dt = 4 * s**3 * (1 - s) ** 3 / (s**4 + (1 - s) ** 4) ** 2 / nodes
    level, slope = model.noise.schedule.noise(t)
    weight = dt * slope / (level if noise == "mask" else K * (1 - level).clamp(min=1e-15))
    states = all_states(noise)
    x, x_t = forward_probs(EVENTS, states, 0.5, noise).nonzero().unbind(1)
    q = torch.stack([forward_probs(EVENTS, states, float(m), noise)[x, x_t] for m in level])
    values = cost(model, EVENTS[x].repeat(nodes, 1), states[x_t].repeat(nodes, 1), level.repeat_interleave(len(x)))
    return torch.zeros(len(EVENTS), dtype=torch.float64).index_add(0, x, weight @ (q * values.view_as(q)))


# The bound


@schedules
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_bound_of_masks_is_the_log_probability_of_every_event_for_every_schedule(shape, schedule):
    p = table()
    model = built(exact_conditionals(p, "mask"), shape, schedule=schedule)
    bound = mass_of_masks(model)
    torch.testing.assert_close(bound, -p.log(), rtol=0, atol=1e-8)
    assert float((p * bound).sum()) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-8), "the entropy"


@schedules
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "arbitrary"])
def test_the_sum_over_masks_is_the_integral_over_time_for_every_schedule(schedule, exact):
    """With independent masks and the weight -alpha'/(1 - alpha), for any network."""
    p = table()
    model = built(exact_conditionals(p, "mask") if exact else arbitrary("mask"), schedule=schedule)
    total = mass_of_masks(model)
    torch.testing.assert_close(integral(model, "mask"), total, rtol=1e-4, atol=1e-4)
    assert exact or float((p * (total + p.log())).sum()) > 0.1, "an inexact network has a looser bound"


@schedules
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_bound_of_uniform_noise_is_the_log_probability_of_every_event_for_every_schedule(shape, schedule):
    p = table()
    model = built(exact_conditionals(p, "uniform"), shape, noise="uniform", schedule=schedule)
    torch.testing.assert_close(integral(model, "uniform"), -p.log(), rtol=0, atol=2e-4)


def reverse_chain(model: MaskedDiffusion, levels: list[float], noise: str) -> list[Tensor]:
    """p(x_s | x_t) of each step as a matrix over all states, by Bayes' rule with explicit transition matrices."""
    states, chain = all_states(noise), []
    S = K + (noise == "mask")
    pi = torch.full((S,), 1 / K, dtype=torch.float64) if noise == "uniform" else torch.eye(S, dtype=torch.float64)[K]
    for before, after in itertools.pairwise(levels):
        kept = (1 - before) / (1 - after)
        forward = kept * torch.eye(S, dtype=torch.float64) + (1 - kept) * pi  # q(x_t | x_s), (s, t)
        k_t = states.view(-1, *model.raster)
        level = model.noise.level(k_t, before)
        mu = torch.zeros(len(states), D, S, dtype=torch.float64)
        mu[:, :, :K] = model.predict(k_t, level).log_probs().detach().exp().flatten(2).mT
        joint = forward.T[states] * ((1 - after) * mu + after * pi)  # (states, D, S)
        if noise == "mask":  # an unmasked value stays; the formula with mu of the others would be 0/0
            unmasked = states != K
            joint[unmasked] = torch.eye(S, dtype=torch.float64)[states[unmasked]]
        posterior = joint / joint.sum(2, keepdim=True)
        chain.append(posterior[:, torch.arange(D), states].prod(2))  # (x_t, x_s)
    return chain


@either
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_bound_is_the_limit_of_that_of_a_chain_of_explicit_matrices(noise, schedule):
    """-E_q log p(x_0..x_T) / q(x_1..x_T | x_0) with T steps, extrapolated to T -> infinity, for an arbitrary network."""
    model = built(arbitrary(noise), noise=noise, schedule=schedule)
    states, bounds = all_states(noise), []
    for T in (50, 100, 200):
        levels = [float(model.noise.schedule.noise(torch.tensor(1 - i / T, dtype=torch.float64))[0]) for i in range(T)]
        levels = [1.0, *levels[1:], 0.0]
        bound = torch.zeros(len(EVENTS), dtype=torch.float64)
        for (before, after), p in zip(itertools.pairwise(levels), reverse_chain(model, levels, noise), strict=True):
            kept = (1 - before) / (1 - after)
            q_t, q_s = (forward_probs(EVENTS, states, level, noise) for level in (before, after))
            forward = forward_probs(states, states, 1 - kept, noise)  # (x_s, x_t)
            joint = q_s[:, None] * forward.T[None]  # (x, x_t, x_s)
            log_q = (joint / q_t[:, :, None].clamp(min=1e-300)).log()
            bound += torch.where(joint > 0, joint * (log_q - p.log()), 0.0).sum((1, 2))
        bounds.append(bound)
    coarse, fine = 2 * bounds[1] - bounds[0], 2 * bounds[2] - bounds[1]
    torch.testing.assert_close(integral(model, noise), fine, rtol=2e-3, atol=5e-3)
    assert (fine - coarse).abs().max() < 2e-2


@either
@schedules
def test_loss_and_log_prob_are_unbiased_estimates_of_the_bound(noise, schedule):
    model = built(arbitrary(noise), noise=noise, schedule=schedule)
    exact = mass_of_masks(model) if noise == "mask" else integral(model, noise)
    x, rng = events((1, 1, 3)), generator("estimates")
    losses = D * torch.stack([model.loss(x, rng=rng).total for _ in range(200)])
    error = float(losses.std()) / math.sqrt(len(losses))
    assert float(losses.mean()) == pytest.approx(float(exact.mean()), abs=4.5 * error + 1e-4)
    row, repeats = 5, 2000
    value, stderr = model.log_prob(x[row].expand(repeats, -1, -1, -1), num_samples=4, rng=rng)
    bound = D * math.log(K / 2) - value
    error = float(bound.std()) / math.sqrt(repeats)
    assert float(bound.mean()) == pytest.approx(float(exact[row]), abs=4.5 * error + 1e-4)
    assert float(stderr.square().mean()) == pytest.approx(float(value.var()), rel=0.25)


def test_times_of_a_batch_are_equidistant_and_reported_ones_stratified():
    """With the numbers of masks as strata, the variance between them is removed."""
    model = built(exact_conditionals(table(), "mask"))
    x = events((1, 1, 3))
    many = x.repeat(20, 1, 1, 1)
    few, stratified = (model.log_prob(many, num_samples=s, rng=generator(s)).stderr.square().mean() for s in (2, 24))
    assert float(stratified) < 0.8 * float(few) / 12
    seen = []
    model.noise.at, at = lambda t: (seen.append(t), at(t))[1], model.noise.at
    model.loss(x, rng=generator("times"))
    gaps = seen[0].sort().values.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / len(x)), rtol=0, atol=1e-12)


def test_unmasked_positions_have_no_weight():
    model, k = built(arbitrary("mask")), EVENTS.view(-1, 1, 1, 3)
    level = torch.full((len(k),), 2 / 3, dtype=torch.float64)
    k_t = model.noise.corrupt(k, level, generator("masks"))
    assert torch.equal((k_t == K).flatten(1).sum(1), torch.full((len(k),), 2))
    assert torch.equal(k_t[k_t != K], k[k_t != K])
    params = torch.randn(len(k), K, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    model.noise.cost(k, k_t, level, PositionDistribution(Categorical(K), params)).sum().backward()
    moved = params.grad.abs().amax(1) > 0
    assert torch.equal(moved, k_t == K)


def test_every_set_of_masked_positions_of_a_size_is_as_likely():
    model, n = built(arbitrary("mask")), 12_000
    k = torch.zeros(n, 1, 1, 3, dtype=torch.int64)
    k_t = model.noise.corrupt(k, torch.full((n,), 1 / 3, dtype=torch.float64), generator("subsets"))
    counts = (k_t == K).flatten(1).double().sum(0)
    assert float((counts - n / 3).square().sum() / (n / 3)) < 2 + 5 * 2


@pytest.mark.parametrize(
    "likelihood", [Categorical, functools.partial(LogisticMixture, components=2), DiscretizedLogistic]
)
def test_the_probability_of_a_value_is_that_among_all_values(likelihood):
    built_likelihood = likelihood(levels=K).double()
    params = torch.randn(4, built_likelihood.num_params(1), 2, 3, 3, dtype=torch.float64)
    mu, k = PositionDistribution(built_likelihood, params), torch.randint(K, (4, 2, 3, 3))
    log_probs = mu.log_probs()
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(4, 2, 3, 3, dtype=torch.float64))
    torch.testing.assert_close(mu.log_prob(k), log_probs.gather(1, k[:, None])[:, 0])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules_go_from_data_to_noise_with_their_derivative_and_inverse(schedule):
    survival, h = schedule(), 1e-6
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    level, slope = survival.noise(t)
    assert float(level[0]) == pytest.approx(0, abs=1e-15) and float(level[-1]) == pytest.approx(1, abs=1e-12)
    assert bool((level.diff() > 0).all())
    torch.testing.assert_close(survival.time(level)[:-1], t[:-1], rtol=0, atol=1e-6)
    inner = t[1:-1]
    difference = (survival.noise(inner + h)[0] - survival.noise(inner - h)[0]) / (2 * h)
    torch.testing.assert_close(slope[1:-1], difference, rtol=1e-5, atol=1e-7)


# Sampling


def frequencies(x: Tensor) -> Tensor:
    index = (quantize(x, K).flatten(1) * torch.tensor([K**2, K, 1])).sum(1)
    return torch.bincount(index, minlength=K**D).double()


def check_drawn(model, expected: Tensor, n: int = 10_000, y: Tensor | None = None) -> None:
    """Pearson's statistic of samples and their probabilities."""
    counts = frequencies(model.sample(n, y, rng=generator("draws")).x)
    assert float(expected.sum()) == pytest.approx(1, abs=1e-9)
    often = n * expected >= 5
    statistic = float(((counts - n * expected).square() / (n * expected))[often].sum())
    freedom = int(often.sum())
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def enumerated(model: MaskedDiffusion, steps: int, noise: str) -> Tensor:
    """Distribution of the samples of a chain of matrices, (27,)."""
    states = all_states(noise)
    law = (states == K).all(1).double() if noise == "mask" else torch.full((len(states),), K**-D, dtype=torch.float64)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    levels = [1.0, *model.noise.schedule.noise(times)[0].tolist()[1:-1], 0.0]
    for p in reverse_chain(model, levels, noise):
        law = law @ p
    complete = (states < K).all(1)
    assert float(law[complete].sum()) == pytest.approx(1, abs=1e-9), "each position is unmasked"
    return law[complete]


@either
@pytest.mark.parametrize(("steps", "schedule"), [(1, "linear"), (2, "cosine"), (7, "linear"), (4, "geometric")])
def test_samples_of_some_steps_have_the_distribution_of_the_chain(noise, steps, schedule):
    """Fewer and more steps than positions, with exact conditional distributions."""
    p = table()
    model = built(exact_conditionals(p, noise), noise=noise, steps=steps, schedule=schedule)
    expected = enumerated(model, steps, noise)
    check_drawn(model, expected)
    if steps == 1:
        assert float((expected - p).abs().sum()) > 0.2, "independent positions"


@either
def test_more_steps_approach_the_joint_distribution(noise):
    p = table()
    model = built(exact_conditionals(p, noise), noise=noise)
    errors = [float((enumerated(model, steps, noise) - p).abs().sum()) for steps in (8, 64, 512)]
    assert errors[1] < errors[0] / 4 and errors[2] < errors[1] / 4 and errors[2] < 0.02


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_position_at_a_time_reproduces_the_joint_distribution(shape):
    p = table()
    model = built(exact_conditionals(p, "mask"), shape, steps=None)
    assert model.sample(2).nfe == D
    check_drawn(model, p)


@pytest.mark.parametrize("settings", [{"steps": None}, {"steps": 2}, {"steps": 9}, {"steps": 2, "order": "confidence"},
                                      {"steps": None, "order": "confidence"}])  # fmt: skip
def test_each_position_is_unmasked_once(settings):
    model = built(arbitrary("mask"), **settings)
    path, step = [], model.noise.step
    model.noise.step = lambda *args: (path.append(args[0]), step(*args))[1]
    x, nfe, _ = model.sample(200, rng=generator("path"))
    path.append(quantize(x, K))
    assert nfe == len(path) - 1 == (settings["steps"] or D)
    for before, after in itertools.pairwise(path):
        assert torch.equal(after[before != K], before[before != K])
        if settings["steps"] is None:
            assert torch.equal((before == K).flatten(1).sum(1) - 1, (after == K).flatten(1).sum(1))
    assert bool((path[0] == K).all()) and bool((path[-1] < K).all())


def test_the_order_by_confidence_begins_with_the_largest_probability_and_is_another_distribution():
    p = table()
    model = built(exact_conditionals(p, "mask"), steps=None, order="confidence", temperature=0.0)
    log_mu = torch.randn(50, K, 1, 1, 3, dtype=torch.float64).log_softmax(1)
    k_t = torch.full((50, 1, 1, 3), K)
    after = model.noise.step(k_t, log_mu, 1.0, 2 / 3, generator("confident"))
    drawn = after.clamp(max=K - 1)[:, None]
    unmasked = (after < K).flatten(1)
    assert bool((unmasked.sum(1) == 1).all())
    # Drawn by the same numbers, all positions at once.
    k = model.noise.step(k_t, log_mu, 1.0, 0.0, generator("confident"))[:, None]
    best = log_mu.gather(1, k).flatten(1).argmax(1)
    assert torch.equal(unmasked.long().argmax(1), best)
    assert torch.equal(drawn.flatten(1)[unmasked], k.flatten(1)[unmasked])
    n = 10_000
    counts = frequencies(model.sample(n, rng=generator("draws")).x)
    assert float((counts / n - p).abs().sum()) > 0.1


@either
def test_a_sample_does_not_depend_on_its_batch(noise):
    model = MaskedDiffusion((1, 2, 2), levels=4, noise=noise, steps=3, network=small()).double().eval()
    whole = model.sample(5, rng=SampleStreams(1, range(5))).x
    assert torch.equal(model.sample(2, rng=SampleStreams(1, [3, 4])).x, whole[3:])


def small():
    return functools.partial(DiT, patch=1, width=16, layers=1, heads=2)


# Guidance


def conditional_network(tables: list[Tensor]):
    """Exact conditional distributions of each class; the null value has those of the last table."""
    exact = [exact_conditionals(p, "mask") for p in tables]

    def log_mu(k_t: Tensor, level: Tensor, y: Tensor) -> Tensor:
        return torch.stack([mu(k_t, level) for mu in exact])[y, torch.arange(len(k_t))]

    return log_mu


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guided_samples_have_the_renormalised_conditionals(scale):
    """One position at a time, by enumeration of the orders; the scale 1 is the model itself."""
    tables = [table(1), table(2), table(3)]
    model = built(conditional_network(tables), steps=None, condition=ClassLabels(2), condition_dropout=0.1)
    guided = guide(model, functools.partial(ClassifierFreeGuidance, scale=scale))
    if scale == 1:
        assert guided is model
    else:
        assert not isinstance(guided, Density) and guided.sample(2).nfe == 2 * D
    c, u = (exact_conditionals(p, "mask") for p in tables[1:])
    expected = torch.zeros(K**D, dtype=torch.float64)
    for order in itertools.permutations(range(D)):
        k_t, log_p = torch.full_like(EVENTS, K), torch.zeros(K**D, dtype=torch.float64)
        for i in order:
            log_c, log_u = (mu(k_t, torch.ones(K**D, dtype=torch.float64))[:, :, i] for mu in (c, u))
            factor = (log_u + scale * (log_c - log_u)).log_softmax(1)
            log_p = log_p + factor.gather(1, EVENTS[:, i : i + 1])[:, 0]
            k_t[:, i] = EVENTS[:, i]
        expected += log_p.exp() / math.factorial(D)
    if scale == 1:
        torch.testing.assert_close(expected, tables[1])
    n = 10_000
    check_drawn(guided, expected, n, torch.ones(n, dtype=torch.long))


def test_conditions_are_dropped_in_losses_alone():
    torch.manual_seed(0)
    model = MaskedDiffusion((1, 2, 2), levels=3, condition=ClassLabels(2), condition_dropout=1.0, network=small())
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    x = bin_center(torch.randint(3, (8, 1, 2, 2)), 3)
    zeros, ones = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    losses = [model.train().loss(x, y, rng=generator("drop")).total for y in (zeros, ones)]
    assert torch.equal(*losses)
    values = [model.eval().log_prob(x, y, rng=generator("drop")).value for y in (zeros, ones)]
    assert not torch.allclose(*values)


# Options


@pytest.mark.parametrize("inputs", ["classes", "values"])
@either
def test_inputs_tell_all_states_apart(inputs, noise):
    model = MaskedDiffusion((2, 1, 3), levels=K, noise=noise, inputs=inputs, network=small())
    states = all_states(noise)
    k_t = torch.stack([states, states.flip(0)], dim=1)[:, :, None]
    encoded = model._encode_states(k_t)
    assert encoded.shape[1:] == (
        2 * (K + 1 if noise == "mask" else K) if inputs == "classes" else 2 * (2 if noise == "mask" else 1),
        1,
        3,
    )
    assert len(encoded.flatten(1).unique(dim=0)) == len(states)


def test_without_time_the_network_is_given_one_level():
    levels = []
    for time in (True, False):
        model = built(lambda k_t, level: (levels.append(level), torch.zeros(len(k_t), K, D).double())[1], time=time)
        model.predict(torch.full((2, 1, 1, 3), K), torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert levels[0].tolist() == [1.0, 0.5] and levels[1].tolist() == [0.0, 0.0]


@either
def test_training_reaches_the_entropy_of_a_distribution(noise):
    """Two patterns of four binary pixels have the entropy log 2."""
    torch.manual_seed(0)
    model = MaskedDiffusion((1, 2, 2), levels=2, noise=noise, network=small(), likelihood=Bernoulli, steps=16)
    k = torch.tensor([[0, 0, 1, 1], [1, 0, 0, 1]]).repeat(32, 1).view(-1, 1, 2, 2)
    x, rng = bin_center(k, 2), generator("training")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(250):
        optimizer.zero_grad()
        model.loss(x, rng=rng).total.backward()
        optimizer.step()
    model.eval()
    value = model.log_prob(x, num_samples=40, rng=rng).value.mean()  # log density log P + D log(2/2)
    assert math.log(2) - 0.1 < -float(value.detach()) < math.log(2) + (0.15 if noise == "mask" else 0.4)
    samples = quantize(model.sample(200, rng=rng).x, 2).flatten(1)
    hits = (samples[:, None] == k[:2].flatten(1)).all(2).any(1)
    assert float(hits.double().mean()) > (0.9 if noise == "mask" else 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": None}, "needs data with levels"),
        ({"noise": "normal"}, "noise must be mask or uniform, not 'normal'"),
        ({"schedule": "vp"}, "schedule must be linear or cosine or geometric, not 'vp'"),
        ({"inputs": "codes"}, "inputs must be classes or values, not 'codes'"),
        ({"order": "raster"}, "order must be random or confidence, not 'raster'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"noise": "uniform", "steps": None}, "noise=uniform has no masks"),
        ({"noise": "uniform", "order": "confidence"}, "noise=uniform has no masks"),
        ({"likelihood": lambda levels: Gaussian()}, "Gaussian has no probabilities of levels"),
    ],
)
def test_unsuitable_options_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskedDiffusion((1, 2, 2), **{"levels": 4, "network": small(), **settings})


def test_odd_numbers_of_samples_and_guidance_without_a_null_value_are_refused():
    model = MaskedDiffusion((1, 2, 2), levels=4, network=small())
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="num_samples must be even, not 3"):
        model.log_prob(x, num_samples=3)
    guidance = functools.partial(ClassifierFreeGuidance, scale=2.0)
    with pytest.raises(ValueError, match="unconditional"):
        guide(model, guidance)
    conditional = MaskedDiffusion((1, 2, 2), levels=4, network=small(), condition=ClassLabels(2), condition_dropout=0.0)
    with pytest.raises(ValueError, match="condition_dropout=0"):
        guide(conditional, guidance)
    assert isinstance(model.noise, MaskNoise)
