"""Likelihoods: probabilities sum to one, are scipy's differences of a cdf, and stay right in the tails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from genzoo.distributions.discretization import bin_center, quantize, to_bin_centers
from genzoo.distributions.likelihoods import (
    LOG_SCALE_MIN,
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    Gaussian,
    GaussianMixture,
    Likelihood,
    LogisticMixture,
    discretized_gaussian_log_mass,
    log_ndtr,
)
from genzoo.numerics.random import SampleStreams, generator

LEVELS = [2, 17, 256]
at_levels = pytest.mark.parametrize("levels", LEVELS)
MEANS = [-1.7, -1.0, -0.4, 0.0, 1 / 3, 0.99, 1.0, 2.5]
LOG_SCALES = [-7.0, -5.0, -3.0, -1.0, 0.0, 2.0, 5.0]


def logistic_log_mass(mean: float, log_scale: float, levels: int) -> Tensor:
    """Log probability of each level of one element, read off the density that the likelihood reports."""
    params = torch.tensor([[mean, log_scale]], dtype=torch.float64).expand(levels, 2)
    x = bin_center(torch.arange(levels), levels, torch.float64)[:, None]
    return DiscretizedLogistic(levels).log_prob(params, x) - math.log(levels / 2)


def gaussian_log_mass(mean: float, log_scale: float, levels: int) -> Tensor:
    x = bin_center(torch.arange(levels), levels, torch.float64)
    mean = torch.full_like(x, mean)
    return discretized_gaussian_log_mass(x, mean, torch.tensor(2 * log_scale, dtype=torch.float64), levels)


LAWS = {"logistic": (logistic_log_mass, stats.logistic), "gaussian": (gaussian_log_mass, stats.norm)}
both = pytest.mark.parametrize(("log_mass", "reference"), LAWS.values(), ids=LAWS)


def edges(levels: int) -> np.ndarray:
    """Of the bins, the outer ones at infinity."""
    inner = 2 * np.arange(1, levels) / levels - 1
    return np.concatenate([[-np.inf], inner, [np.inf]])


@both
@at_levels
def test_probabilities_of_all_levels_sum_to_one(log_mass, reference, levels):
    for mean in MEANS:
        for log_scale in LOG_SCALES:
            assert float(log_mass(mean, log_scale, levels).exp().sum()) == pytest.approx(1.0, abs=1e-10)


@both
@at_levels
def test_a_probability_is_the_difference_of_the_cdf_across_the_bin(log_mass, reference, levels):
    for mean in MEANS:
        for log_scale in LOG_SCALES:
            expected = np.diff(reference(mean, math.exp(log_scale)).cdf(edges(levels)))
            np.testing.assert_allclose(log_mass(mean, log_scale, levels).exp().numpy(), expected, atol=1e-14)


@both
@at_levels
def test_tails_are_accurate_to_many_digits(log_mass, reference, levels):
    """Left of the mean the difference of the cdf is safe, right of it that of the survival function."""
    for mean in MEANS:
        for log_scale in (-3.0, -2.0, -1.0):
            law = reference(mean, math.exp(log_scale))
            below, above = np.diff(law.cdf(edges(levels))), -np.diff(law.sf(edges(levels)))
            mass = np.where(edges(levels)[:-1] > mean, above, below)
            safe = mass > 1e-290
            got = log_mass(mean, log_scale, levels).numpy()
            np.testing.assert_allclose(got[safe], np.log(mass[safe]), rtol=1e-8, atol=1e-8)


@both
def test_no_level_is_impossible_however_narrow_and_far_the_law(log_mass, reference):
    for mean in (-1.0, 1.0):
        values = log_mass(mean, LOG_SCALE_MIN, 256)
        assert values.isfinite().all()
        ordered = values if mean > 0 else values.flip(0)
        assert (ordered[1:-1].diff() > 0).all()  # the end bins reach to infinity and stand apart


def test_far_in_the_tail_a_logistic_decays_by_its_scale():
    """Levels 20 bins apart, at scale e^-7: log P falls by 20 (2/256) e^7."""
    values = logistic_log_mass(-1.0, -7.0, 256)
    assert float(values[100] - values[120]) == pytest.approx(20 * 2 / 256 * math.exp(7), rel=1e-12)


def test_float32_keeps_the_tails_too():
    x = bin_center(torch.arange(256), 256)[:, None]
    for mean in (-1.0, 0.3, 1.0):
        params = torch.tensor([[mean, -4.0]]).expand(256, 2)
        exact = DiscretizedLogistic(256).log_prob(params.double(), x.double())
        torch.testing.assert_close(DiscretizedLogistic(256).log_prob(params, x).double(), exact, atol=2e-3, rtol=1e-5)


@at_levels
def test_a_discrete_event_counts_on_the_measure_of_the_data(levels):
    """log p = log P + D log(K/2) over all channels and pixels: the sum of the elements' own."""
    likelihood = DiscretizedLogistic(levels)
    params = 0.3 * torch.randn(5, 6, 4, 4, dtype=torch.float64)
    k = torch.randint(levels, (5, 3, 4, 4))
    log_p = likelihood.log_prob(params, bin_center(k, levels, torch.float64))
    mean, log_scale = params[:, :3].numpy(), params[:, 3:].numpy()
    law = stats.logistic(mean, np.exp(log_scale))
    mass = law.cdf(edges(levels)[k.numpy() + 1]) - law.cdf(edges(levels)[k.numpy()])
    expected = np.log(mass).reshape(5, -1).sum(1) + 48 * math.log(levels / 2)
    np.testing.assert_allclose(log_p.numpy(), expected, rtol=1e-9)


def test_all_places_in_a_bin_are_one_event():
    likelihood, params = DiscretizedLogistic(17), torch.randn(34, 2, 1, 1)
    k = torch.arange(17).repeat_interleave(2).view(-1, 1, 1, 1)
    places = bin_center(k, 17) + torch.tensor([-0.99 / 17, 0.99 / 17]).repeat(17).view(-1, 1, 1, 1)
    assert torch.equal(likelihood.log_prob(params, places), likelihood.log_prob(params, bin_center(k, 17)))


@at_levels
@pytest.mark.parametrize(("mean", "log_scale"), [(0.2, -1.0), (-1.2, -2.0), (0.9, 0.0), (0.1, -9.0)])
def test_draws_of_a_discretised_logistic_fall_as_often_as_it_says(levels, mean, log_scale):
    n = 100_000
    params = torch.tensor([[mean, log_scale]], dtype=torch.float64).expand(n, 2)
    x = DiscretizedLogistic(levels).sample(params, generator("logistic"))
    assert torch.equal(x, to_bin_centers(x, levels))
    p = logistic_log_mass(mean, log_scale, levels).exp()
    counts = quantize(x, levels).view(-1).bincount(minlength=levels)
    assert ((counts / n - p).abs() <= 5 * torch.sqrt(p * (1 - p) / n) + 1.5e-5).all()


def test_a_discretised_likelihood_needs_levels():
    with pytest.raises(ValueError, match="needs data with levels"):
        DiscretizedLogistic(None)


def test_a_shared_variance_is_torchs_normal_law():
    likelihood = Gaussian(log_var=-1.3).double()
    mean, x = torch.randn(2, 6, 3, 4, 4, dtype=torch.float64)
    law = torch.distributions.Normal(mean, math.exp(-0.65))
    torch.testing.assert_close(likelihood.log_prob(mean, x), law.log_prob(x).sum((1, 2, 3)), rtol=1e-6, atol=1e-6)
    assert torch.equal(likelihood.mean(mean), mean)


def test_a_variance_per_element_is_torchs_normal_law():
    likelihood = Gaussian(per_element=True)
    mean, log_var, x = torch.randn(3, 6, 2, 5, dtype=torch.float64)
    params = torch.cat([mean, log_var], dim=1)
    law = torch.distributions.Normal(mean, (0.5 * log_var).exp())
    torch.testing.assert_close(likelihood.log_prob(params, x), law.log_prob(x).sum((1, 2)), rtol=1e-12, atol=1e-12)
    assert torch.equal(likelihood.mean(params), mean)


@pytest.mark.parametrize("per_element", [False, True])
def test_draws_of_a_gaussian_have_its_moments(per_element):
    mean, log_var = torch.tensor([1.0, -2.0]).expand(100_000, 2), torch.tensor([-1.0, -1.0]).expand(100_000, 2)
    likelihood = Gaussian(per_element, log_var=-1.0)
    x = likelihood.sample(torch.cat([mean, log_var], 1) if per_element else mean, generator("gaussian"))
    torch.testing.assert_close(x.mean(0), mean[0], atol=0.01, rtol=0)
    torch.testing.assert_close(x.var(0), log_var[0].exp(), atol=0.01, rtol=0)


# Joint laws of the channels of a pixel

JOINT = {
    "bernoulli": Bernoulli(),
    "logistic": DiscretizedLogistic(3),
    "categorical": Categorical(3),
    "mixture": LogisticMixture(3, components=2),
}
joint = pytest.mark.parametrize("likelihood", JOINT.values(), ids=JOINT)
LEVELS_OF = {"Bernoulli": 2}


def all_pixels(likelihood: Likelihood, channels: int) -> Tensor:
    """Every event of one pixel, (K^C, C, 1, 1)."""
    levels = LEVELS_OF.get(type(likelihood).__name__, 3)
    k = torch.cartesian_prod(*[torch.arange(levels)] * channels).view(-1, channels, 1, 1)
    return bin_center(k, levels, torch.float64)


def masses(likelihood: Likelihood, params: Tensor, channels: int) -> Tensor:
    """Probability of every event of one pixel under parameters (1, P, 1, 1)."""
    x = all_pixels(likelihood, channels)
    levels = LEVELS_OF.get(type(likelihood).__name__, 3)
    return (likelihood.log_prob(params.expand(len(x), -1, -1, -1), x) - channels * math.log(levels / 2)).exp()


def some_params(likelihood: Likelihood, channels: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    shape = (1, likelihood.num_params(channels), 1, 1)
    return scale * torch.randn(shape, dtype=torch.float64, generator=generator("params", seed))


@joint
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_probabilities_of_all_pixels_sum_to_one(likelihood, channels):
    for seed in range(20):
        total = masses(likelihood, some_params(likelihood, channels, seed), channels).sum()
        assert float(total) == pytest.approx(1.0, abs=1e-12)


@joint
@pytest.mark.parametrize("channels", [1, 3])
def test_draws_of_a_pixel_fall_as_often_as_its_joint_law_says(likelihood, channels):
    n, params = 60_000, some_params(likelihood, channels)
    expected = masses(likelihood, params, channels)
    x = likelihood.sample(params.expand(n, -1, 1, 1), generator("joint"))
    events = all_pixels(likelihood, channels).flatten(1)
    index = (x.flatten(1)[:, None] - events).abs().amax(2).argmin(1)
    assert bool(((x.flatten(1) - events[index]).abs() < 1e-12).all())
    share = index.bincount(minlength=len(events)) / n
    assert bool(((share - expected).abs() <= 5 * torch.sqrt(expected * (1 - expected) / n) + 2e-5).all())


@joint
def test_places_of_an_image_are_independent_and_their_parameters_their_own(likelihood):
    params = torch.randn(4, likelihood.num_params(3), 2, 2, dtype=torch.float64)
    x = torch.rand(4, 3, 2, 2, dtype=torch.float64) * 2 - 1
    parts = [likelihood.log_prob(params[..., i : i + 1, j : j + 1], x[..., i : i + 1, j : j + 1])
             for i in range(2) for j in range(2)]  # fmt: skip
    torch.testing.assert_close(likelihood.log_prob(params, x), sum(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("likelihood", [*JOINT.values(), Gaussian(), Gaussian(True), GaussianMixture(components=3)])
def test_the_channels_of_an_output_are_told_by_its_size(likelihood, channels):
    params = torch.zeros(2, likelihood.num_params(channels), 3, 3)
    assert likelihood.channels(params) == channels
    assert likelihood.mean(params).shape == likelihood.sample(params).shape == (2, channels, 3, 3)


def test_a_logistic_mixture_is_the_sum_of_chained_differences_of_the_cdf():
    """PixelCNN++, eq. 2 and 3, written out for one pixel with scipy."""
    levels, M = 17, 3
    likelihood = LogisticMixture(levels, M)
    raw = 0.7 * torch.randn(M, 10, dtype=torch.float64, generator=generator("mixture"))
    for r, g, b in [(0, 0, 0), (16, 3, 9), (5, 16, 0), (8, 8, 8), (16, 16, 16)]:
        x = bin_center(torch.tensor([r, g, b]), levels, torch.float64)
        total = 0.0
        for m, weight in enumerate(raw[:, 0].softmax(0).tolist()):
            _, mu_r, mu_g, mu_b, *rest = raw[m].tolist()
            scales, (c1, c2, c3) = np.exp(rest[:3]), np.tanh(rest[3:])
            means = (mu_r, mu_g + c1 * float(x[0]), mu_b + c2 * float(x[0]) + c3 * float(x[1]))
            for mean, scale, k in zip(means, scales, (r, g, b), strict=True):
                cdf = stats.logistic(mean, scale).cdf(edges(levels))
                weight *= cdf[k + 1] - cdf[k]
            total += weight
        got = likelihood.log_prob(raw.reshape(1, -1, 1, 1), x.view(1, 3, 1, 1))
        assert float(got) - 3 * math.log(levels / 2) == pytest.approx(math.log(total), abs=1e-9)


def test_a_coin_and_a_softmax_are_torchs():
    logits = 2 * torch.randn(6, 3, 4, 4, dtype=torch.float64)
    k = torch.randint(2, logits.shape)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(k.double()).sum((1, 2, 3))
    got = Bernoulli().log_prob(logits, bin_center(k, 2, torch.float64))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

    logits = 2 * torch.randn(6, 17, 4, 4, dtype=torch.float64)
    k = torch.randint(17, (6, 1, 4, 4))
    expected = torch.distributions.Categorical(logits=logits.movedim(1, -1)).log_prob(k[:, 0]).sum((1, 2))
    got = Categorical(17).log_prob(logits, bin_center(k, 17, torch.float64))
    torch.testing.assert_close(got, expected + 16 * math.log(17 / 2), rtol=1e-12, atol=1e-12)


def test_one_component_of_a_mixture_is_the_logistic_law_itself():
    params = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64) * 2 - 1
    alone = DiscretizedLogistic(256).log_prob(params, x)
    mixed = LogisticMixture(256, 1).log_prob(torch.cat([torch.randn(5, 1, 4, 4), params], 1), x)
    torch.testing.assert_close(mixed, alone, rtol=1e-12, atol=1e-12)


def test_a_mixture_leaves_no_level_impossible_and_keeps_its_tails_in_float32():
    x = bin_center(torch.arange(256), 256).view(-1, 1, 1, 1)
    for mean in (-1.0, 1.0):
        params = torch.tensor([0.0, mean, -9.0, 0.3, mean, -8.0]).view(1, 6, 1, 1).expand(256, -1, 1, 1)
        exact = LogisticMixture(256, 2).log_prob(params.double(), x.double())
        single = LogisticMixture(256, 2).log_prob(params, x)
        assert single.isfinite().all()
        torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=2e-3)


def test_slopes_of_a_categorical_law_make_a_normal_law_whose_mean_follows_the_channel_before():
    """log N(g; a r, s^2) over the levels of g is -g^2/2s^2 + (a g/s^2) r and a number that normalises away."""
    levels, a, variance = 17, 0.8, 0.01
    centre = bin_center(torch.arange(levels), levels, torch.float64)
    logits = torch.stack([torch.zeros(levels), -centre.square() / (2 * variance), a * centre / variance], dim=1)
    likelihood = Categorical(levels)
    for r in centre[4:13].tolist():
        x = torch.stack([torch.full_like(centre, r), centre], 1).view(levels, 2, 1, 1)
        log_p = likelihood.log_prob(logits.reshape(1, -1, 1, 1).expand(levels, -1, 1, 1), x)
        expected = (-(centre - a * r).square() / (2 * variance)).log_softmax(0) - math.log(levels)
        torch.testing.assert_close(log_p, expected + 2 * math.log(levels / 2), rtol=1e-12, atol=1e-12)


def test_a_mixture_of_normal_laws_is_torchs():
    likelihood = GaussianMixture(components=4)
    raw = torch.randn(6, 4, 5, dtype=torch.float64)
    x = torch.randn(6, 2, dtype=torch.float64)
    normal = torch.distributions.Independent(torch.distributions.Normal(raw[..., 1:3], raw[..., 3:].exp()), 1)
    law = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=raw[..., 0]), normal)
    torch.testing.assert_close(likelihood.log_prob(raw.flatten(1), x), law.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(likelihood.mean(raw.flatten(1)), law.mean, rtol=1e-12, atol=1e-12)
    draws = likelihood.sample(raw[:1].flatten(1).expand(200_000, -1), generator("normals"))
    torch.testing.assert_close(draws.mean(0), law.mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(draws.var(0), law.variance[0], atol=0.05, rtol=0.05)


@joint
def test_the_mean_is_that_of_many_draws_to_a_level(likelihood):
    """With chained channels a mean of means: near the truth for laws that are not too wide."""
    params = some_params(likelihood, 1, seed=1, scale=1.0)
    levels = LEVELS_OF.get(type(likelihood).__name__, 3)
    mean = (masses(likelihood, params, 1) * all_pixels(likelihood, 1).flatten()).sum()
    assert float((likelihood.mean(params) - mean).abs()) <= 1 / levels + 0.1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Bernoulli(17), "needs binary images, levels=2, not 17"),
        (lambda: Categorical(None), "needs data with levels"),
        (lambda: LogisticMixture(None), "needs data with levels"),
        (lambda: LogisticMixture(256, 0), "components must be at least 1, not 0"),
        (lambda: GaussianMixture(17), "not images with 17 levels"),
        (lambda: GaussianMixture(components=0), "components must be at least 1, not 0"),
    ],
)
def test_a_likelihood_of_other_data_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


# Laws of all

LIKELIHOODS = {
    "shared": Gaussian(),
    "per_element": Gaussian(per_element=True),
    "normals": GaussianMixture(components=3),
    **JOINT,
}
every = pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)


@every
def test_a_draw_depends_on_its_own_sample_alone(likelihood: Likelihood):
    params = torch.randn(6, likelihood.num_params(2), 3, 3)
    whole = likelihood.sample(params, SampleStreams(0, range(6)))
    assert torch.equal(likelihood.sample(params[4:], SampleStreams(0, [4, 5])), whole[4:])


@every
def test_gradients_agree_with_finite_differences(likelihood: Likelihood):
    likelihood = likelihood.double()
    params = torch.randn(3, likelihood.num_params(2), 2, dtype=torch.float64, requires_grad=True)
    x = torch.rand(3, 2, 2, dtype=torch.float64) * 2 - 1
    assert torch.autograd.gradcheck(lambda p: likelihood.log_prob(p, x), params)


@every
def test_half_precision_of_a_network_costs_no_precision_of_the_sum(likelihood: Likelihood):
    """Parameters that bfloat16 can hold have the log density that they have in float32."""
    params = torch.randn(4, likelihood.num_params(1), 8, 8).bfloat16()
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    got = likelihood.float().log_prob(params, x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, likelihood.log_prob(params.float(), x), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("levels", [17, 256])
@pytest.mark.parametrize("log_std", [-5.3, -3.0, 0.0])
def test_a_mean_far_off_in_float32_has_the_gradient_of_its_distance(log_std, levels):
    """As an estimate of the data has that no clamp holds: -(mean - edge)/variance, and finite for the variance too."""
    x = bin_center(torch.arange(levels), levels)[1:-1]
    for guess in (10.0, -300.0, 1e4):
        mean = torch.full_like(x, guess).requires_grad_()
        log_var = torch.full_like(x, 2 * log_std).requires_grad_()
        discretized_gaussian_log_mass(x, mean, log_var, levels).sum().backward()
        edge = x + math.copysign(1 / levels, guess)
        torch.testing.assert_close(mean.grad, (edge - guess) / math.exp(2 * log_std), rtol=2e-2, atol=0)
        torch.testing.assert_close(log_var.grad, (edge - guess) ** 2 / 2 / math.exp(2 * log_std), rtol=2e-2, atol=0)


def test_the_log_of_the_distribution_function_has_the_gradient_of_the_inverse_mills_ratio():
    x = torch.cat([torch.linspace(-20, 8, 1001), -torch.logspace(1.31, 7, 100)]).requires_grad_()
    value = log_ndtr(x)
    value.sum().backward()
    points = x.detach().double().numpy()
    np.testing.assert_allclose(value.detach().numpy(), stats.norm.logcdf(points), rtol=2e-6, atol=1e-12)
    series = -points / (1 - points**-2.0 + 3 * points**-4.0)
    ratio = np.where(points < -20, series, np.exp(stats.norm.logpdf(points) - stats.norm.logcdf(points)))
    np.testing.assert_allclose(x.grad.numpy(), ratio, rtol=1e-5)


SCALED = {
    "gaussian": (lambda: Gaussian(per_element=True), lambda s: [0.0, s], 2 * LOG_SCALE_MIN),
    "discretised logistic": (lambda: DiscretizedLogistic(256), lambda s: [0.0, s], LOG_SCALE_MIN),
    "logistic mixture": (lambda: LogisticMixture(256, 1), lambda s: [0.0, 0.0, s], LOG_SCALE_MIN),
    "gaussian mixture": (lambda: GaussianMixture(None, 1), lambda s: [0.0, 0.0, s], LOG_SCALE_MIN),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_scale_below_its_least_is_brought_back_by_an_event_that_it_cannot_explain(name):
    likelihood, params, least = SCALED[name]
    output = torch.tensor([params(least - 1.0)], requires_grad=True)
    (-likelihood().log_prob(output, torch.full((1, 1), 0.5)).sum()).backward()
    assert float(output.grad[0, -1]) < 0, "descent raises the scale"
