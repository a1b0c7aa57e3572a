"""Langevin dynamics by its stationary variance in closed form, and the Metropolis correction by detailed balance, float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genzoo.distributions.langevin import at, log_ratio, mala_step, propose
from genzoo.numerics.random import generator

VARIANCES = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)


def normal(x: Tensor) -> Tensor:
    """Return the potential of independent normal coordinates."""
    return (x.square() / (2 * VARIANCES)).sum(1)


@pytest.mark.parametrize("h", [0.05, 0.3])
def test_the_stationary_variance_without_correction_is_that_of_the_step_size(h):
    """x - l E' + w xi on variance s^2 is stationary at w^2 s^4/(l (2 s^2 - l))."""
    rng, n = generator("langevin"), 20_000
    w = math.sqrt(2 * h)
    stationary = w**2 * VARIANCES**2 / (h * (2 * VARIANCES - h))
    x = stationary.sqrt() * torch.randn(n, 3, generator=rng, dtype=torch.float64)
    for _ in range(60):
        x = propose(at(normal, x), h, rng)
    torch.testing.assert_close(x.var(0), stationary, rtol=5 * math.sqrt(2 / n), atol=0)
    assert ((stationary / VARIANCES) > 1 + h / 9).all()  # which the tolerance tells from the variance of the energy


def test_corrected_steps_keep_the_distribution_for_any_step_size():
    rng, n = generator("mala"), 20_000
    x = VARIANCES.sqrt() * torch.randn(n, 3, generator=rng, dtype=torch.float64)
    point, first = at(normal, x), x
    for _ in range(60):
        point, probability = mala_step(normal, point, 0.4, rng)
        assert ((probability > 0) & (probability <= 1)).all()
    assert 0.3 < float(probability.mean()) < 0.99
    torch.testing.assert_close(point.x.var(0), VARIANCES, rtol=5 * math.sqrt(2 / n), atol=0)
    assert float((point.x != first).double().mean()) > 0.99
    torch.testing.assert_close(point.potential, normal(point.x))
    torch.testing.assert_close(point.gradient, point.x / VARIANCES)


def test_the_acceptance_ratio_is_that_of_detailed_balance():
    h = torch.tensor([0.1, 0.7], dtype=torch.float64)
    a, b = (at(normal, torch.randn(2, 3, dtype=torch.float64)) for _ in range(2))

    def log_flow(start: Tensor, end: Tensor, i: int) -> Tensor:
        mean = start - h[i] * start / VARIANCES
        q = torch.distributions.Normal(mean, (2 * h[i]).sqrt()).log_prob(end).sum()
        return -normal(start[None])[0] + q

    expected = [log_flow(b.x[i], a.x[i], i) - log_flow(a.x[i], b.x[i], i) for i in range(2)]
    torch.testing.assert_close(log_ratio(a, b, h), torch.stack(expected))


def test_unadjusted_chains_accept_what_others_reject():
    x = torch.full((2, 3), 50.0, dtype=torch.float64)
    steep = at(lambda x: 10 * normal(x), x)
    free = torch.tensor([True, False])
    after, probability = mala_step(lambda x: 10 * normal(x), steep, 1.0, generator("steep"), free)
    assert probability.max() < 1e-9
    assert (after.x[0] != x[0]).all() and torch.equal(after.x[1], x[1])
    assert after.potential[1] == steep.potential[1] and after.potential[0] != steep.potential[0]
