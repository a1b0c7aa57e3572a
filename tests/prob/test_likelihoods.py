"""Likelihoods: probabilities sum to one, are scipy's differences of a cdf, and stay right in the tails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from genzoo.prob.likelihoods import (
    LOG_SCALE_MIN,
    DiscretizedLogistic,
    Gaussian,
    Likelihood,
    discretized_gaussian_log_mass,
)
from genzoo.prob.measure import bin_centre, quantize, snap
from genzoo.prob.random import SampleStreams, generator

LEVELS = [2, 17, 256]
at_levels = pytest.mark.parametrize("levels", LEVELS)
MEANS = [-1.7, -1.0, -0.4, 0.0, 1 / 3, 0.99, 1.0, 2.5]
LOG_SCALES = [-7.0, -5.0, -3.0, -1.0, 0.0, 2.0, 5.0]


def logistic_log_mass(mean: float, log_scale: float, levels: int) -> Tensor:
    """Log probability of each level of one element, read off the density that the likelihood reports."""
    params = torch.tensor([[mean, log_scale]], dtype=torch.float64).expand(levels, 2)
    x = bin_centre(torch.arange(levels), levels, torch.float64)[:, None]
    return DiscretizedLogistic(levels).log_prob(params, x) - math.log(levels / 2)


def gaussian_log_mass(mean: float, log_scale: float, levels: int) -> Tensor:
    x = bin_centre(torch.arange(levels), levels, torch.float64)
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
    x = bin_centre(torch.arange(256), 256)[:, None]
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
    log_p = likelihood.log_prob(params, bin_centre(k, levels, torch.float64))
    mean, log_scale = params[:, :3].numpy(), params[:, 3:].numpy()
    law = stats.logistic(mean, np.exp(log_scale))
    mass = law.cdf(edges(levels)[k.numpy() + 1]) - law.cdf(edges(levels)[k.numpy()])
    expected = np.log(mass).reshape(5, -1).sum(1) + 48 * math.log(levels / 2)
    np.testing.assert_allclose(log_p.numpy(), expected, rtol=1e-9)


def test_all_places_in_a_bin_are_one_event():
    likelihood, params = DiscretizedLogistic(17), torch.randn(34, 2, 1, 1)
    k = torch.arange(17).repeat_interleave(2).view(-1, 1, 1, 1)
    places = bin_centre(k, 17) + torch.tensor([-0.99 / 17, 0.99 / 17]).repeat(17).view(-1, 1, 1, 1)
    assert torch.equal(likelihood.log_prob(params, places), likelihood.log_prob(params, bin_centre(k, 17)))


@at_levels
@pytest.mark.parametrize(("mean", "log_scale"), [(0.2, -1.0), (-1.2, -2.0), (0.9, 0.0), (0.1, -9.0)])
def test_draws_of_a_discretised_logistic_fall_as_often_as_it_says(levels, mean, log_scale):
    n = 100_000
    params = torch.tensor([[mean, log_scale]], dtype=torch.float64).expand(n, 2)
    x = DiscretizedLogistic(levels).sample(params, generator("logistic"))
    assert torch.equal(x, snap(x, levels))
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


LIKELIHOODS = [Gaussian(), Gaussian(per_element=True), DiscretizedLogistic(17)]


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=["shared", "per_element", "logistic"])
def test_a_draw_depends_on_its_own_sample_alone(likelihood: Likelihood):
    params = torch.randn(6, likelihood.num_params, 3, 3)
    whole = likelihood.sample(params, SampleStreams(0, range(6)))
    assert torch.equal(likelihood.sample(params[4:], SampleStreams(0, [4, 5])), whole[4:])


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=["shared", "per_element", "logistic"])
def test_gradients_agree_with_finite_differences(likelihood: Likelihood):
    likelihood = likelihood.double()
    params = torch.randn(3, 2 * likelihood.num_params, 2, dtype=torch.float64, requires_grad=True)
    x = torch.rand(3, 2, 2, dtype=torch.float64) * 2 - 1
    assert torch.autograd.gradcheck(lambda p: likelihood.log_prob(p, x), params)
