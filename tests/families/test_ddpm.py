r"""Denoising diffusion with the exact network: the terms of its variational bound are closed forms on Gaussian data.

With ``d = x - mu`` and the exact estimate of the data, the gap of the two means at index i >= 1 and dimension of
variance lambda is ``a (x - x0)``, ``a = alpha_s var_ts / sigma_t^2``, and over the noise of x_t

    E (x - x0)^2 = (sigma^2 d / c)^2 + (alpha lambda sigma / c)^2,      c = alpha^2 lambda + sigma^2.

The sums below go over all T terms in the paper's betas, and know nothing of the estimator that they judge.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.diffusion.samplers import DDIM, Ancestral
from genzoo.diffusion.samplers.chain import StepCoefficients
from genzoo.diffusion.schedules import DiscreteSchedule, LinearSchedule
from genzoo.distributions.discretization import bin_center, bits_per_dim
from genzoo.event import EventSpec
from genzoo.families.ddpm import DDPM, LossHistory, geometric_strata
from genzoo.numerics.random import generator
from tests.exact import GaussianDenoiser, exact_network, network

MU, LAM = [0.5, -1.0], [0.25, 2.0]
VARIANCES = ["fixedlarge", "fixedsmall"]
both = pytest.mark.parametrize("variance", VARIANCES)


def exact_model(T: int, variance: str = "fixedlarge", kind: str = "eps", mu=MU, lam=LAM) -> DDPM:
    schedule = LinearSchedule(T)
    denoiser = GaussianDenoiser(schedule, mu, lam, kind)
    return DDPM(
        (len(mu),), network=exact_network(denoiser), schedule=schedule, prediction=kind, variance=variance
    ).double()


def kl(mean_gap2, var_q, var_p):
    return 0.5 * (var_q / var_p - 1 - np.log(var_q / var_p) + mean_gap2 / var_p)


def exact_bound(x: Tensor, T: int, variance: str, mu=MU, lam=LAM) -> np.ndarray:
    """The variational bound of each event, (B,): all T terms, each in closed form."""
    betas = np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999)
    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    posterior = betas * (1 - before) / (1 - abar)
    d, mu, lam = x.numpy() - np.array(mu), np.array(mu), np.array(lam)
    bound = -kl(abar[-1] * x.numpy() ** 2, 1 - abar[-1], 1.0)
    for i in range(T):
        c = abar[i] * lam + 1 - abar[i]
        error2 = ((1 - abar[i]) * d / c) ** 2 + abar[i] * lam**2 * (1 - abar[i]) / c**2
        if i == 0:  # the decoder, with the variance that the next index gives the posterior
            decoder = lam * (1 - abar[0]) / c if variance == "optimal" else posterior[1]
            bound -= 0.5 * (error2 / decoder + np.log(2 * math.pi * decoder))
        else:
            of_x0 = math.sqrt(before[i]) * betas[i] / (1 - abar[i])
            reverse = {
                "fixedlarge": betas[i],
                "fixedsmall": posterior[i],
                "optimal": posterior[i] + of_x0**2 * lam * (1 - abar[i]) / c,  # law of total variance
            }[variance]
            bound -= kl(of_x0**2 * error2, posterior[i], reverse)
    return bound.sum(1)


def learned_model(T: int, **kwargs) -> DDPM:
    """The exact noise, and the exact variance of every step: at index 0 that of the data, given x_1."""
    schedule = LinearSchedule(T)
    denoiser = GaussianDenoiser(schedule, MU, LAM, hop=1 / T)
    betas, alpha, sigma = schedule.betas, *schedule.at(torch.arange(1, T + 1).double() / T)[:2]
    floor = betas[1] * (sigma[0] / sigma[1]) ** 2
    of_data = denoiser.lam * sigma[0] ** 2 / (alpha[0] ** 2 * denoiser.lam + sigma[0] ** 2)

    def answer(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        eps, share = denoiser.predict(x_t, t)[1:]
        share = torch.where((t < 1.5 / T)[:, None], torch.log(of_data / floor) / torch.log(betas[0] / floor), share)
        return torch.cat([eps, 2 * share - 1], dim=1)

    kwargs.setdefault("objective", "hybrid")
    return DDPM((2,), network=network(answer), schedule=schedule, variance="learned", **kwargs).double()


EVENTS = torch.tensor([[0.3, 0.2], [1.4, -3.0]], dtype=torch.float64)


@both
@pytest.mark.parametrize(("T", "repetitions"), [(20, 20_000), (1000, 4_000)])
def test_the_bound_is_the_sum_of_its_closed_terms(T, repetitions, variance):
    x = EVENTS.repeat_interleave(repetitions, dim=0)
    value, stderr = exact_model(T, variance).log_prob(x, num_samples=40)
    value, stderr = value.view(2, -1), stderr.view(2, -1)
    error = stderr.square().mean(1).sqrt() / math.sqrt(repetitions)
    expected = torch.from_numpy(exact_bound(EVENTS, T, variance))
    assert ((value.mean(1) - expected).abs() < 4 * error).all(), (value.mean(1), expected, error)
    assert (error < 0.08).all()


def test_the_bound_with_the_best_variance_is_its_closed_form():
    x = EVENTS.repeat_interleave(20_000, dim=0)
    value, stderr = (v.view(2, -1) for v in learned_model(20).log_prob(x, num_samples=40))
    error = stderr.square().mean(1).sqrt() / math.sqrt(20_000)
    expected = torch.from_numpy(exact_bound(EVENTS, 20, "optimal"))
    assert ((value.mean(1) - expected).abs() < 4 * error).all(), (value.mean(1), expected, error)


def test_the_best_variance_closes_the_bound():
    """The reverse chain is then the exact one but for its prior: the bound is the likelihood, event by event, on the
    shortest chain too, where the fixed variances are far from it."""
    law = torch.distributions.Normal(torch.tensor(MU).double(), torch.tensor(LAM).double().sqrt())
    x = law.sample((4000,))
    log_p = law.log_prob(x).sum(1)
    for T in (8, 20, 100):
        torch.testing.assert_close(torch.from_numpy(exact_bound(x, T, "optimal")), log_p, atol=1e-3, rtol=0)
    best, *fixed = (m.log_prob(x, num_samples=16) for m in (learned_model(8), *(exact_model(8, v) for v in VARIANCES)))
    error = float(best.stderr.square().mean().sqrt()) / math.sqrt(4000)
    assert float(best.value.mean()) == pytest.approx(float(log_p.mean()), abs=4 * error)
    assert all(float(bound.value.mean()) < float(log_p.mean()) - max(0.1, 4 * error) for bound in fixed)


@pytest.mark.parametrize("kind", ["x0", "v"])
def test_the_bound_does_not_depend_on_what_the_network_predicts(kind):
    x = torch.randn(50, 2, dtype=torch.float64)
    got, expected = (exact_model(20, kind=k).log_prob(x, rng=generator(0)).value for k in (kind, "eps"))
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-9)


def test_the_bound_lies_below_the_likelihood_and_close_to_it():
    """In the mean over the data, by closed forms alone: what the test above compares with is a bound, and no loose one.
    The posterior's variance is the least that a step can have, and pays for it in short chains."""
    law = torch.distributions.Normal(torch.tensor(MU), torch.tensor(LAM).sqrt())
    x = law.sample((4000,)).double()
    log_p = float(law.log_prob(x).sum(1).mean())
    large, small = ([log_p - exact_bound(x, T, v).mean() for T in (8, 20, 100)] for v in VARIANCES)
    assert large[0] > large[1] > large[2] > 0
    assert large[2] < 0.1
    assert small[0] > small[1] > small[2] > large[2]


@pytest.mark.parametrize("num_samples", [4, 8, 20, 40, 400])
def test_the_estimate_is_unbiased_and_its_error_honest(num_samples):
    """On a chain of 20 steps: two draws of all the rest, of a few strata, of nearly each index, and of each twice."""
    n = 20_000
    x = EVENTS[1:].repeat(n, 1)
    value, stderr = exact_model(20).log_prob(x, num_samples=num_samples)
    expected = float(exact_bound(EVENTS[1:], 20, "fixedlarge")[0])
    spread = float(value.std())
    assert float(value.mean()) == pytest.approx(expected, abs=4 * spread / math.sqrt(n))
    assert float(stderr.square().mean().sqrt()) == pytest.approx(spread, rel=0.15)


def test_200_repetitions_spread_as_one_evaluation_says():
    """The way it is used: the mean over a test set, and the error of each event."""
    model, x = exact_model(1000), EVENTS[:1].repeat(16, 1)
    draws = [model.log_prob(x, num_samples=12, rng=generator(i)) for i in range(200)]
    values, errors = torch.stack([draw.value for draw in draws]), torch.stack([draw.stderr for draw in draws])
    assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.15)
    of_the_mean = errors.square().sum(1).sqrt() / 16
    assert float(of_the_mean.square().mean().sqrt()) == pytest.approx(float(values.mean(1).std()), rel=0.15)


@pytest.mark.parametrize("T", [2, 3, 20, 1000, 4000])
@pytest.mark.parametrize("count", [2, 3, 10, 20, 5000])
def test_strata_cut_the_chain_without_gap_or_overlap(T, count):
    ranges = geometric_strata(T, count)
    assert ranges[0] == (0, 1)
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(T))
    assert len(ranges) == min(T, count)
    assert all(start < stop for start, stop in ranges)


@pytest.mark.parametrize(
    ("num_samples", "message"),
    [(0, "at least 1, not 0"), *((n, f"even and at least 4, not {n}") for n in (2, 5, 7))],
)
def test_draws_come_in_pairs_of_at_least_two_strata(num_samples, message):
    with pytest.raises(ValueError, match=f"num_samples must be {message}"):
        exact_model(20).log_prob(EVENTS, num_samples=num_samples)


def test_the_bound_has_a_total_mass_of_at_most_one():
    """On a grid of the plane, and not of much less, so that a lost constant would show."""
    n, reach = 50, 5.0
    axis = reach * (2 * (torch.arange(n, dtype=torch.float64) + 0.5) / n - 1)
    points = torch.cartesian_prod(axis, axis)
    model = exact_model(20, mu=[0.0, 0.0], lam=[1.0, 0.5])
    bound = torch.stack([model.log_prob(points, num_samples=40).value for _ in range(30)]).mean(0)
    mass = float(bound.exp().sum() * (2 * reach / n) ** 2)
    exact = float(np.exp(exact_bound(points, 20, "fixedlarge", [0.0, 0.0], [1.0, 0.5])).sum() * (2 * reach / n) ** 2)
    assert 0.9 < exact < 1
    assert mass == pytest.approx(exact, rel=0.03)  # the noise of the exponent raises its mean


# ---------------------------------------------------------------------------------------------------------------------
# Images: the discretised decoder.


def constant_model(levels: int, shape: tuple[int, ...], variance: str, guess: float = 0.3) -> DDPM:
    """A chain of two steps whose network always guesses the same data: its bound holds no chance at all."""
    schedule = DiscreteSchedule(torch.tensor([0.3, 0.6], dtype=torch.float64))
    answer = network(lambda x_t, t, y: torch.full_like(x_t, guess))
    return DDPM(shape, network=answer, levels=levels, schedule=schedule, prediction="x0", variance=variance).double()


@both
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_at_the_last_step_the_probabilities_of_all_levels_sum_to_one(levels, variance):
    """What is left of the bound of one pixel after its two closed terms, times the width of a bin."""
    model = constant_model(levels, (1, 1, 1), variance)
    x = bin_center(torch.arange(levels), levels, torch.float64)
    value, stderr = model.log_prob(x.view(-1, 1, 1, 1), num_samples=4)
    assert stderr.max() < 1e-12
    beta, before, now = 0.6, 0.7, 0.7 * 0.4
    posterior = beta * (1 - before) / (1 - now)
    gap2 = before * beta**2 / (1 - now) ** 2 * (x.numpy() - 0.3) ** 2
    rest = kl(now * x.numpy() ** 2, 1 - now, 1.0) + kl(gap2, posterior, beta if variance == "fixedlarge" else posterior)
    density = np.exp(value.numpy() + rest)
    assert float(density.sum() * 2 / levels) == pytest.approx(1.0, abs=1e-9)
    assert float(value.exp().sum() * 2 / levels) < 1


def test_pixels_add_up():
    model, one = constant_model(17, (2, 1, 2), "fixedlarge"), constant_model(17, (1, 1, 1), "fixedlarge")
    x = bin_center(torch.randint(17, (6, 2, 1, 2)), 17, torch.float64)
    parts = one.log_prob(x.view(-1, 1, 1, 1), num_samples=4).value.view(6, 4).sum(1)
    torch.testing.assert_close(model.log_prob(x, num_samples=4).value, parts, atol=1e-10, rtol=0)


def test_estimates_of_an_image_beyond_the_interval_are_clipped():
    x = bin_center(torch.arange(17), 17, torch.float64).view(-1, 1, 1, 1)
    got, expected = (
        constant_model(17, (1, 1, 1), "fixedlarge", g).log_prob(x, num_samples=4).value for g in (1.8, 1.0)
    )
    assert torch.equal(got, expected)


def test_images_are_snapped_to_their_levels():
    model = constant_model(17, (1, 2, 2), "fixedlarge")
    centre = bin_center(torch.randint(17, (9, 1, 2, 2)), 17, torch.float64)
    for place in (-0.9 / 17, 0.9 / 17):
        x = centre + place
        assert torch.equal(model.log_prob(x, num_samples=4).value, model.log_prob(centre, num_samples=4).value)
        assert torch.equal(model.loss(x, rng=generator(0)).total, model.loss(centre, rng=generator(0)).total)


@pytest.mark.parametrize(("levels", "variance"), [(256, "fixedlarge"), (17, "fixedsmall")])
def test_uniform_data_cost_their_entropy_and_a_little_more(levels, variance):
    """The exact denoiser of equally likely levels, by enumeration. No bound may be below the entropy, 8 bits for bytes,
    and on a chain of 4000 steps this one is not far above."""
    entropy = math.log2(levels)
    schedule = LinearSchedule(4000)
    points = bin_center(torch.arange(levels), levels, torch.float64)

    def expected_data(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        alpha, sigma = (c.view(-1, 1) for c in schedule.at(t)[:2])
        posterior = torch.softmax(-((x_t.flatten(1) - alpha * points) ** 2) / (2 * sigma**2), dim=1)
        return (posterior @ points).view_as(x_t)

    answer = network(expected_data)
    model = DDPM(
        (1, 1, 1), network=answer, levels=levels, schedule=schedule, prediction="x0", variance=variance
    ).double()
    x = points.repeat(3000 // levels).view(-1, 1, 1, 1)
    value, stderr = model.log_prob(x, num_samples=60)
    bits = float(bits_per_dim(value, 1, levels).mean())
    error = float(stderr.square().mean().sqrt()) / math.sqrt(len(x)) / math.log(2)
    assert entropy - 4 * error < bits < entropy + 0.2, (bits, error)


# ---------------------------------------------------------------------------------------------------------------------
# The loss, the classes, the samples.


def test_the_loss_is_least_at_the_exact_network():
    x = torch.tensor(MU) + torch.randn(100_000, 2, dtype=torch.float64) * torch.tensor(LAM).sqrt()
    schedule = LinearSchedule(20)
    exact = GaussianDenoiser(schedule, MU, LAM)
    losses = {}
    for factor in (0.95, 1.0, 1.05):
        answer = network(lambda x_t, t, y, factor=factor: factor * exact.exact("eps", x_t, t))
        losses[factor] = float(DDPM((2,), network=answer, schedule=schedule).double().loss(x, rng=generator(0)).total)
    assert losses[1.0] < min(losses[0.95], losses[1.05])


def test_the_loss_draws_all_times_of_the_chain_equally_often():
    seen = []

    def watch(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x_t)

    DDPM((1,), network=network(watch), schedule=LinearSchedule(10)).double().loss(torch.zeros(50_000, 1).double())
    index = (seen[0] * 10).round().long() - 1
    assert torch.equal(seen[0], (index + 1).double() / 10)
    assert ((index.bincount(minlength=10) - 5000).abs() < 5 * math.sqrt(5000)).all()


def conditional(seen: list, **kwargs) -> DDPM:
    def watch(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.append(y)
        return torch.zeros_like(x_t)

    return DDPM((2,), ClassLabels(4), network=network(watch), schedule=LinearSchedule(10), **kwargs)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_classes_become_the_null_label_as_often_as_asked(dropout):
    seen, y = [], torch.arange(4).repeat(10_000)
    conditional(seen, condition_dropout=dropout).loss(torch.zeros(40_000, 2), y)
    dropped = seen[0] != y
    assert (seen[0][dropped] == 4).all()
    assert float(dropped.double().mean()) == pytest.approx(dropout, abs=5 * math.sqrt(dropout * (1 - dropout) / 40_000))


def test_samples_and_bounds_get_their_classes_as_they_are():
    seen, y = [], torch.tensor([3, 0, 2])
    model = conditional(seen, condition_dropout=1.0, sampler=DDIM(3))
    model.sample(3, y)
    model.log_prob(torch.zeros(3, 2), y, num_samples=4)
    assert len(seen) == 3 + 4
    assert all(torch.equal(labels, y) for labels in seen)


@pytest.mark.parametrize("sampler", [Ancestral(), DDIM(20)], ids=["ancestral", "ddim"])
def test_a_model_samples_with_the_sampler_that_it_was_given(sampler):
    model = exact_model(100)
    model.sampler = sampler
    x, nfe, _ = model.sample(20, rng=generator(1))
    assert nfe == (sampler.steps or 100)
    assert torch.equal(x, sampler(model, 20, rng=generator(1)).x)


def test_the_bound_is_computed_with_coefficients_in_double_precision():
    """A model in float32 agrees with the exact sum where float32 tables of 1000 steps would not: abar_0 = .9999."""
    x = EVENTS.repeat_interleave(4000, dim=0).float()
    schedule = LinearSchedule(1000)
    denoiser = GaussianDenoiser(schedule, MU, LAM)
    answer = network(lambda x_t, t, y: denoiser.exact("eps", x_t.double(), t).to(x_t.dtype))
    value, stderr = DDPM((2,), network=answer, schedule=schedule).log_prob(x, num_samples=40)
    error = stderr.view(2, -1).square().mean(1).sqrt() / math.sqrt(4000)
    expected = torch.from_numpy(exact_bound(EVENTS, 1000, "fixedlarge"))
    assert ((value.view(2, -1).mean(1) - expected).abs() < 4 * error + 1e-3).all()


# ---------------------------------------------------------------------------------------------------------------------
# Improved DDPM: learned variances, the hybrid objective and the bound, importance sampling.


class Wired(torch.nn.Module):
    """Predicts ``a x_t`` for the noise and ``b`` for the place of the variance, and notes what it was asked."""

    def __init__(self, learned: bool):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.6, 0.3))
        self.learned = learned

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.x_t, self.t = x_t, t
        return torch.cat([self.a * x_t, self.b.expand_as(x_t)], dim=1) if self.learned else self.a * x_t


def wired(objective: str, T: int = 10, levels: int | None = None, shape: tuple[int, ...] = (3,)) -> DDPM:
    learned = objective != "simple"
    return DDPM(
        shape,
        network=lambda *shapes: Wired(learned),
        levels=levels,
        schedule=LinearSchedule(T),
        variance="learned" if learned else "fixedlarge",
        objective=objective,
    ).double()


def gradients(model: DDPM, x: Tensor) -> tuple[float, float | None]:
    model.loss(x, rng=generator(5)).total.backward()
    b = model.network.b.grad
    return float(model.network.a.grad), None if b is None else float(b)


@pytest.mark.parametrize("T", [10, 1000])
def test_in_the_hybrid_the_bound_moves_the_variance_alone(T):
    """The mean sees the gradient of the simple loss and nothing else, the variance T/1000 that of the bound."""
    x = torch.randn(400, 3, dtype=torch.float64)
    simple, bound, hybrid = (gradients(wired(objective, T), x) for objective in ("simple", "vlb", "hybrid"))
    assert hybrid[0] == pytest.approx(simple[0], rel=1e-12)
    assert hybrid[1] == pytest.approx(bound[1], rel=1e-12)
    assert abs(bound[0]) > 1e-3 * T / 1000
    assert simple[1] is None


def test_the_hybrid_is_the_simple_loss_and_a_thousandth_of_the_bound_in_bits():
    """Each term written out in betas: KL to the posterior, log variance between the posterior's and beta's by (b + 1)/2."""
    T, model = 10, wired("hybrid")
    x = torch.randn(300, 3, dtype=torch.float64)
    total, terms, _ = model.loss(x, rng=generator(5))
    x_t, index = model.network.x_t.detach(), (model.network.t * T).round().long() - 1
    betas = torch.from_numpy(np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999))
    abar = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1).double(), abar[:-1]])
    posterior = betas * (1 - before) / (1 - abar)
    low, high = posterior.clone(), betas
    low[0] = posterior[1]
    b, now, then, beta = betas[index, None], abar[index, None], before[index, None], betas[index, None]
    eps, share = 0.6 * x_t, (0.3 + 1) / 2
    x0 = (x_t - (1 - now).sqrt() * eps) / now.sqrt()
    variance = torch.exp(share * high[index, None].log() + (1 - share) * low[index, None].log())
    means = [then.sqrt() * beta / (1 - now) * data + (1 - b).sqrt() * (1 - then) / (1 - now) * x_t for data in (x, x0)]
    q, p = (
        torch.distributions.Normal(m, v.sqrt())
        for m, v in zip(means, (low[index, None].expand(-1, 3), variance), strict=True)
    )
    divergence = torch.distributions.kl_divergence(q, p)
    decoder = -torch.distributions.Normal(x0, variance.sqrt()).log_prob(x)
    bits = torch.where(index[:, None] == 0, decoder, divergence).mean() / math.log(2)
    true_eps = (x_t - now.sqrt() * x) / (1 - now).sqrt()
    mse = (eps - true_eps).square().mean()
    assert float(terms["vlb"]) == pytest.approx(float(bits), rel=1e-9)
    assert float(terms["mse"]) == pytest.approx(float(mse), rel=1e-9)
    assert float(total.detach()) == pytest.approx(float(mse + T / 1000 * bits), rel=1e-9)


class Table(torch.nn.Module):
    """Outputs its weights, whatever the input, and keeps the times of the last call."""

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...], condition: None):
        super().__init__()
        self.output = torch.nn.Parameter(torch.randn(40, *out_shape, generator=generator(7)))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        self.t = t
        return self.output.repeat(len(x_t) // 40, *[1] * (x_t.ndim - 1))[: len(x_t)]


OBJECTIVES = [("simple", v) for v in VARIANCES] + [("vlb", v) for v in VARIANCES]
OBJECTIVES += [("hybrid", "learned"), ("vlb", "learned")]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(("objective", "variance"), OBJECTIVES)
def test_almost_every_pixel_of_an_image_has_a_gradient_at_every_time(objective, variance, prediction):
    """With outputs as wrong as those of an untrained network, whose estimates of the data leave [-1, 1]: nearly all of them
    at t = .8 if the network predicts the noise. The pixels without are those whose level is as good as certain."""
    T, n = 50, 40
    model = DDPM(
        (1, 6, 6),
        network=Table,
        levels=17,
        schedule=LinearSchedule(T),
        prediction=prediction,
        objective=objective,
        variance=variance,
    )
    x = bin_center(torch.randint(17, (n, 1, 6, 6), generator=generator(1)), 17)
    flowing: dict[int, list[float]] = {}
    for i in range(12):
        model.zero_grad()
        model.loss(x, rng=generator(i)).total.backward()
        share = model.network.output.grad.ne(0).double().flatten(1).mean(1)
        assert model.network.output.grad.isfinite().all()
        for index, of_event in zip((model.network.t * T).round().int().tolist(), share.tolist(), strict=True):
            flowing.setdefault(index, []).append(of_event)
    assert set(flowing) == set(range(1, T + 1))
    least = min(sum(shares) / len(shares) for shares in flowing.values())
    assert least > 0.97, least


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_the_bound_of_images_whose_estimates_lie_within_the_interval_is_the_loss(prediction):
    """There the clamp of scoring does nothing: the loss and the reported bound are one functional."""
    model = exact_model(20, kind=prediction, mu=[0.1, -0.2], lam=[0.01, 0.02])
    model.event, model.objective = EventSpec(model.shape, 256), "vlb"
    x = torch.tensor([[0.05, -0.1]], dtype=torch.float64).repeat(200_000, 1)
    bits = model.loss(x, rng=generator(0)).terms["vlb"] * 20
    prior = float(model._prior_kl(x[:1]))
    value, stderr = model.log_prob(x[:20_000], num_samples=40, rng=generator(1))
    expected = (-float(value.mean()) - prior) / (2 * math.log(2))
    error = float(stderr.square().mean().sqrt()) / math.sqrt(20_000)
    assert float(bits) == pytest.approx(expected, abs=5 * error + 0.02)


def test_the_objective_vlb_is_the_bound_but_for_the_prior():
    """Its mean over times, data and noise is -(log p bound + KL of the prior)/(T D log 2), in bits."""
    T, n = 20, 200_000
    model = exact_model(T)
    model.objective = "vlb"
    x = EVENTS[:1].expand(n, 2)
    abar = float(model.schedule.at(torch.ones(())).alpha ** 2)
    prior = float(kl(abar * EVENTS[0].numpy() ** 2, 1 - abar, 1.0).sum())
    expected = -(float(exact_bound(EVENTS[:1], T, "fixedlarge")[0]) + prior) / (T * 2 * math.log(2))
    draws = [model.loss(x[: n // 20], rng=generator(i)) for i in range(20)]
    terms = torch.stack([loss.terms["vlb"] for loss in draws])
    error = float(terms.std()) / math.sqrt(20)
    assert float(terms.mean()) == pytest.approx(expected, abs=4 * error)
    assert error < 0.04 * abs(expected)
    assert float(draws[0].total) == pytest.approx(T / 1000 * float(terms[0]), rel=1e-12)


@pytest.mark.parametrize("place", [-1.0, -0.2, 1.0, 1.3])
def test_a_learned_variance_lies_between_the_fixed_ones_in_its_logarithm(place):
    """At the ends the bound is that of the fixed choice, between them and beyond as log v says."""
    T, x = 10, torch.randn(40, 2, dtype=torch.float64)
    denoiser = GaussianDenoiser(LinearSchedule(T), MU, LAM)
    answer = network(lambda x_t, t, y: torch.cat([denoiser.exact("eps", x_t, t), torch.full_like(x_t, place)], dim=1))
    model = DDPM((2,), network=answer, schedule=LinearSchedule(T), variance="learned", objective="hybrid").double()
    share = model.predict(x, torch.full((40,), 0.5)).variance_weight
    torch.testing.assert_close(share, torch.full_like(x, (place + 1) / 2))
    index = torch.arange(40) % (T - 1) + 1
    step = StepCoefficients(*model._chain.value[index].unbind(1))
    t = (index + 1).double() / T
    terms = {
        v: exact_model(T, v)._vlb_term(x, x, index, exact_model(T, v).predict(x, t), clip=False) for v in VARIANCES
    }
    got = model._vlb_term(x, x, index, model.predict(x, t), clip=False)
    if abs(place) == 1:
        torch.testing.assert_close(got, terms["fixedlarge" if place == 1 else "fixedsmall"], atol=1e-10, rtol=1e-10)
    variance = step.var_ts ** ((place + 1) / 2) * step.posterior_var ** ((1 - place) / 2)
    gap = step.alpha_s * step.var_ts / step.sigma_t**2 * (x - denoiser.exact("x0", x, t)).T
    q = step.posterior_var
    expected = 0.5 * ((q + gap**2) / variance - 1 - torch.log(q / variance)).sum(0)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_times_are_drawn_uniformly_until_each_was_seen_ten_times():
    history = LossHistory(4)
    for _ in range(9):
        history.update(torch.arange(4), torch.arange(4).double() + 1)
    history.update(torch.tensor([0, 1, 2]), torch.ones(3))
    assert torch.equal(history.probs(), torch.full((4,), 0.25).double())
    history.update(torch.tensor([3]), torch.tensor([4.0]))
    assert history.probs()[3] > 0.25 > history.probs()[0]


def test_times_are_drawn_by_the_root_mean_square_of_their_last_ten_losses():
    """Equation 18; a thousandth of the draws stays uniform."""
    rng = torch.Generator().manual_seed(0)
    history, losses = LossHistory(5), torch.rand(37, 5, generator=rng, dtype=torch.float64) * torch.arange(1, 6)
    for row in losses:
        order = torch.randperm(5, generator=rng)
        history.update(order, row[order])
    rms = losses[-10:].square().mean(0).sqrt()
    torch.testing.assert_close(history.probs(), 0.999 * rms / rms.sum() + 0.001 / 5)
    index, weight = history.sample(100_000, generator(0))
    share = index.bincount(minlength=5) / 100_000
    assert ((share - history.probs()).abs() < 4 * (share * (1 - share) / 100_000).sqrt()).all()
    torch.testing.assert_close(weight, 1 / (5 * history.probs()[index]))


def test_two_losses_of_one_time_in_one_batch_are_both_remembered():
    history = LossHistory(2)
    history.update(torch.tensor([0, 0, 1, 0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert history.counts.tolist() == [3, 1]
    assert history.losses[0, :3].tolist() == [1.0, 2.0, 4.0]


def importance_model(T: int = 20, **kwargs) -> DDPM:
    denoiser = GaussianDenoiser(LinearSchedule(T), MU, LAM)
    return DDPM(
        (2,), network=exact_network(denoiser), schedule=LinearSchedule(T), objective="vlb", importance=True, **kwargs
    ).double()


def test_importance_sampling_changes_the_variance_of_the_loss_and_not_its_mean():
    model, x = importance_model().train(), EVENTS[:1].expand(2000, 2)
    uniform = exact_model(20)
    uniform.objective = "vlb"
    while (model.history.counts < LossHistory.LAST).any():
        assert torch.equal(model.history.probs(), torch.full((20,), 1 / 20, dtype=torch.float64))
        counts = model.history.counts.clone()
        loss = model.loss(x, rng=generator("warm-up", int(counts.sum())))
        assert torch.equal(model.history.counts, counts)  # a loss alone is not remembered
        model.after_step(loss.aux, len(x))
    assert model.history.probs().max() > 3 / 20
    model.eval()
    counts = model.history.counts.clone()
    drawn, plain = (torch.stack([m.loss(x, rng=generator(i)).total for i in range(60)]) for m in (model, uniform))
    error = math.sqrt((float(drawn.var()) + float(plain.var())) / 60)
    assert float(drawn.mean()) == pytest.approx(float(plain.mean()), abs=4 * error)
    assert float(drawn.std()) < 0.8 * float(plain.std())
    assert torch.equal(model.history.counts, counts)  # a loss that is only looked at is not remembered


def test_the_history_travels_with_the_weights():
    model, other = importance_model().train(), importance_model()
    model.after_step(model.loss(EVENTS.repeat(50, 1), rng=generator(0)).aux, 100)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.history.counts, model.history.counts)
    assert int(model.history.counts.sum()) == 100
    assert torch.equal(other.history.losses, model.history.losses)
    assert exact_model(20).history is None


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ({"prediction": "score"}, "'score'"),
        ({"variance": "small"}, "'small'"),
        ({"objective": "kl"}, "'kl'"),
        ({"variance": "learned"}, "learned is incompatible with objective=simple"),
        ({"objective": "hybrid"}, "fixedlarge is incompatible with objective=hybrid"),
        ({"condition_dropout": 2.0}, "not 2.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, what):
    with pytest.raises(ValueError, match=what):
        DDPM((2,), network=network(lambda x_t, t, y: x_t), **setting)


def test_a_learned_variance_is_sampled_with():
    """By the ancestral sampler alone: others take such a model too, and leave its variance alone."""
    ddim = [DDIM(5)(model, 9, rng=generator(3)).x for model in (learned_model(20), exact_model(20))]
    torch.testing.assert_close(*ddim)
    model = learned_model(20, sampler=Ancestral("learned"))
    x = model.sample(40_000, rng=generator(2)).x
    spread = x.var(0)
    assert float(spread[0]) == pytest.approx(chain_variance(LAM[0], 20), rel=0.05)
    assert float(spread[1]) == pytest.approx(chain_variance(LAM[1], 20), rel=0.05)


def chain_variance(lam: float, T: int) -> float:
    """Of the ancestral chain from N(0, 1) with exact variances, without noise at its last step."""
    betas = np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999)
    abar = np.append(1.0, np.cumprod(1 - betas))
    v = 1.0
    for i in range(T, 0, -1):
        c = abar[i] * lam + 1 - abar[i]
        of_x0 = math.sqrt(abar[i - 1]) * betas[i - 1] / (1 - abar[i])
        of_x_t = math.sqrt(1 - betas[i - 1]) * (1 - abar[i - 1]) / (1 - abar[i])
        drawn = betas[i - 1] * (1 - abar[i - 1]) / (1 - abar[i]) + of_x0**2 * lam * (1 - abar[i]) / c
        v = (of_x0 * math.sqrt(abar[i]) * lam / c + of_x_t) ** 2 * v + (drawn if i > 1 else 0.0)
    return v


@pytest.mark.parametrize("B", [1, 7, 100])
def test_a_history_of_losses_is_kept_as_if_they_came_one_by_one(B):
    """Ranges of one time that are longer than the memory included."""
    T = 4
    history = LossHistory(T)
    losses, counts = torch.zeros(T, history.LAST, dtype=torch.float64), [0] * T
    for step in range(12):
        rng = generator(step)
        index, values = torch.randint(T - step % 2, (B,), generator=rng), torch.rand(B, generator=rng)
        history.update(index, values)
        for i, value in zip(index.tolist(), values.tolist(), strict=True):
            losses[i, counts[i] % history.LAST] = value
            counts[i] += 1
        assert torch.equal(history.losses, losses) and history.counts.tolist() == counts
