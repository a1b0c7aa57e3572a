"""Annealed importance sampling against normalisers in closed form (normal distributions) and by enumeration (a 4x4 Ising model
and a restricted Boltzmann machine), forward and in reverse from exact samples, float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from genzoo.distributions.annealing import annealed_log_weights, log_mean_exp, sandwich, sigmoid_schedule
from genzoo.distributions.langevin import at, mala_step
from genzoo.numerics.random import generator

SIDE = 4


def binary(bits: int) -> Tensor:
    """List all states of 0 and 1, (2^bits, bits) float64."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=bits)), dtype=torch.float64)


def bernoulli(p: Tensor, rng: torch.Generator) -> Tensor:
    return (torch.rand(p.shape, generator=rng, dtype=p.dtype) < p).to(p.dtype)


def exact_samples(log_f: Tensor, states: Tensor, n: int, rng: torch.Generator) -> Tensor:
    return states[torch.multinomial(log_f.softmax(0), n, replacement=True, generator=rng)]


class Ising:
    """Spins of +-1 on a torus, log f = J sum over neighbours s_i s_j + h sum s_i; at inverse temperature 0 all are equal."""

    J, h = 0.35, 0.1
    states = 2 * binary(SIDE * SIDE) - 1
    log_z0 = SIDE * SIDE * math.log(2)

    def log_ratio(self, s: Tensor) -> Tensor:
        grid = s.view(-1, SIDE, SIDE)
        bonds = grid * (grid.roll(1, 1) + grid.roll(1, 2))
        return self.J * bonds.sum((1, 2)) + self.h * s.sum(1)

    def start(self, n: int, rng: torch.Generator) -> Tensor:
        return 2 * bernoulli(torch.full((n, SIDE * SIDE), 0.5, dtype=torch.float64), rng) - 1

    def kernel(self, rng: torch.Generator):
        """Return a random order of Gibbs updates of both colours of the chessboard: each keeps the distribution."""
        black = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2 == 0

        def step(s: Tensor, beta: float) -> Tensor:
            grid = s.view(-1, SIDE, SIDE)
            for colour in (black, ~black):
                field = sum(grid.roll(shift, dim) for shift in (1, -1) for dim in (1, 2))
                up = torch.sigmoid(2 * beta * (self.J * field + self.h))
                grid = torch.where(colour, 2 * bernoulli(up, rng) - 1, grid)
            return grid.reshape(len(s), -1)

        return step


class RBM:
    """A restricted Boltzmann machine with its hidden units summed out, f_b(v) = e^(b a'v) prod (1 + e^(b (c + v'W)))."""

    def __init__(self, visible: int = 6, hidden: int = 4):
        rng = generator("rbm")
        self.W = 1.5 * torch.randn(visible, hidden, generator=rng, dtype=torch.float64)
        self.a = torch.randn(visible, generator=rng, dtype=torch.float64)
        self.c = torch.randn(hidden, generator=rng, dtype=torch.float64)
        v, h = binary(visible), binary(hidden)
        self.states = torch.cat([v.repeat_interleave(len(h), 0), h.repeat(len(v), 1)], dim=1)  # (v, h) together
        self.log_z0, self.visible = (visible + hidden) * math.log(2), visible

    def log_ratio(self, x: Tensor) -> Tensor:
        v, h = x.split([self.visible, x.shape[1] - self.visible], dim=1)
        return v @ self.a + h @ self.c + ((v @ self.W) * h).sum(1)

    def start(self, n: int, rng: torch.Generator) -> Tensor:
        return bernoulli(torch.full((n, self.states.shape[1]), 0.5, dtype=torch.float64), rng)

    def kernel(self, rng: torch.Generator):
        def step(x: Tensor, beta: float) -> Tensor:
            v = x[:, : self.visible]
            h = bernoulli(torch.sigmoid(beta * (self.c + v @ self.W)), rng)
            v = bernoulli(torch.sigmoid(beta * (self.a + h @ self.W.T)), rng)
            h = bernoulli(torch.sigmoid(beta * (self.c + v @ self.W)), rng)
            return torch.cat([v, h], dim=1)

        return step


@pytest.mark.parametrize("model", [Ising(), RBM()], ids=["ising", "rbm"])
def test_an_enumerated_normaliser_lies_between_forward_and_reverse_chains(model):
    rng, n = generator("discrete"), 400
    log_f = model.log_ratio(model.states)
    truth = float(log_f.logsumexp(0))
    gaps = []
    for steps in (4, 60):
        betas = sigmoid_schedule(steps)
        forward, _ = annealed_log_weights(model.start(n, rng), betas, model.log_ratio, model.kernel(rng))
        first = exact_samples(log_f, model.states, n, rng)
        reverse, _ = annealed_log_weights(first, betas.flip(0), model.log_ratio, model.kernel(rng))
        found = sandwich(forward, reverse)
        lower, upper = found.lower + model.log_z0, found.upper + model.log_z0
        assert lower <= truth + 4 * found.lower_stderr and upper >= truth - 4 * found.upper_stderr
        # Means of the log weights are bounds without the tails of the weights: they are apart, and meet with more steps.
        low, high = float(forward.mean()) + model.log_z0, float(-reverse.mean()) + model.log_z0
        assert low < truth < high
        gaps.append(high - low)
    assert gaps[1] < 0.25 * gaps[0]
    assert lower == pytest.approx(truth, abs=4 * found.lower_stderr) and found.lower_stderr < 0.1
    assert upper == pytest.approx(truth, abs=4 * found.upper_stderr) and found.upper_stderr < 0.1


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_the_mean_weight_is_unbiased_for_any_number_of_steps(steps):
    """Few steps of an Ising model: the mean over many chains is exp(log Z) itself, not a bound of it."""
    model, rng, n = Ising(), generator("unbiased", steps), 20_000 if steps < 40 else 2000
    model.J, model.h = 0.15, 0.05  # so that even one step has weights of finite variance that 20,000 chains resolve
    truth = float(model.log_ratio(model.states).logsumexp(0)) - model.log_z0
    log_w, x = annealed_log_weights(model.start(n, rng), sigmoid_schedule(steps), model.log_ratio, model.kernel(rng))
    found = log_mean_exp(log_w)
    assert found.stderr < 0.1 and found.value == pytest.approx(truth, abs=4 * found.stderr)
    assert x.shape == (n, SIDE * SIDE) and x.abs().eq(1).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_normal_distribution_s_normaliser_is_found_with_langevin_steps(reverse):
    """E = x'Lx/2 has log Z = (D log 2 pi - log det L)/2."""
    L = torch.tensor([[5.0, 1.5], [1.5, 1.0]], dtype=torch.float64)
    truth = math.log(2 * math.pi) - 0.5 * float(torch.logdet(L))
    rng, n = generator("normal", str(reverse)), 2000

    def log_ratio(x: Tensor) -> Tensor:
        return -0.5 * ((x @ L) * x).sum(1) + 0.5 * x.square().sum(1) + math.log(2 * math.pi)

    def kernel(x: Tensor, beta: float) -> Tensor:
        def potential(x: Tensor) -> Tensor:
            return 0.5 * (beta * ((x @ L) * x).sum(1) + (1 - beta) * x.square().sum(1))

        return mala_step(potential, at(potential, x), 0.2, rng)[0].x

    x, betas = torch.randn(n, 2, generator=rng, dtype=torch.float64), sigmoid_schedule(40)
    if reverse:
        x, betas = x @ torch.linalg.cholesky(torch.linalg.inv(L)).T, betas.flip(0)
    found = log_mean_exp(annealed_log_weights(x, betas, log_ratio, kernel)[0])
    assert found.stderr < 0.03
    assert (-found.value if reverse else found.value) == pytest.approx(truth, abs=4 * found.stderr)


def test_the_schedule_rises_from_zero_to_one_and_is_dense_at_both_ends():
    b = sigmoid_schedule(10)
    assert b[0] == 0 and b[-1] == 1 and (b.diff() > 0).all()
    expected = [1 / (1 + math.exp(-4 * (2 * t / 10 - 1))) for t in range(11)]
    expected = [(e - expected[0]) / (expected[-1] - expected[0]) for e in expected]
    torch.testing.assert_close(b, torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        sigmoid_schedule(0)


def test_the_mean_of_weights_and_its_error():
    log_w = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64) + 1000
    w = torch.tensor([1.0, math.e, math.e**2], dtype=torch.float64)
    found = log_mean_exp(log_w)
    assert found.value == pytest.approx(1000 + math.log(float(w.mean())))
    assert found.stderr == pytest.approx(float(w.std() / w.mean()) / math.sqrt(3))
    both = sandwich(log_w, log_w - 2001)
    assert both.lower == found.value and both.upper == pytest.approx(-(found.value - 2001))
    assert both.midpoint == pytest.approx((both.lower + both.upper) / 2)
    assert both.stderr == pytest.approx(math.hypot((both.upper - both.lower) / 2, found.stderr / math.sqrt(2)))
