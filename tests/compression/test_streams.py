"""Entropy coders: what is pushed is popped, at the cost of its information, and pops from a stack are draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from genzoo.compression.streams import Queue, Stack, initial_words
from genzoo.numerics.random import generator


def tables(m: int, K: int, name: str = "tables") -> tuple[torch.Tensor, torch.Tensor]:
    """Make up log probabilities, (m, K), and levels drawn from them."""
    rng = generator(name)
    log_p = (3 * torch.randn(m, K, generator=rng, dtype=torch.float64)).log_softmax(1)
    return log_p, torch.multinomial(log_p.exp(), 1, generator=rng)[:, 0]


def information(log_p: torch.Tensor, k: torch.Tensor) -> float:
    return -float(log_p.gather(1, k[:, None]).sum()) / math.log(2)


def perturbed(x: torch.Tensor, name: str) -> torch.Tensor:
    """Change numbers as another order of sums would, but some thousand times as much as in float64."""
    return x * (1 + 2e-11 * torch.randn(x.shape, generator=generator(name), dtype=x.dtype))


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("transposed", [False, True])
def test_levels_cost_their_information(levels, transposed):
    log_p, k = tables(3000, levels)
    given = log_p.T.contiguous().T if transposed else log_p
    queue, stack = Queue(), Stack()
    queue.push_levels(k, given)
    before = stack.bits
    stack.push_levels(k, given)
    expected = information(log_p, k)
    assert 32 * len(queue.words()) == pytest.approx(expected, abs=64 + 1e-3 * expected)
    assert stack.bits - before == pytest.approx(expected, abs=32 + 1e-3 * expected)
    assert torch.equal(Queue(queue.words()).pop_levels(given), k)
    back = Stack(stack.words())
    assert torch.equal(back.pop_levels(given), k) and back.is_initial()


def test_improbable_levels_are_coded_too():
    log_p = torch.tensor([[0.0, -1e4, -math.inf]] * 50, dtype=torch.float64)
    k = torch.arange(50) % 3
    stack = Stack()
    stack.push_levels(k, log_p)
    assert torch.equal(Stack(stack.words()).pop_levels(log_p), k)


def test_a_stack_is_last_in_first_out():
    (log_p, k), (log_q, j) = tables(10, 5), tables(10, 7, "others")
    stack = Stack()
    stack.push_levels(k, log_p)
    stack.push_levels(j, log_q)
    assert torch.equal(stack.pop_levels(log_q), j) and torch.equal(stack.pop_levels(log_p), k) and stack.is_initial()


def test_lattice_points_far_from_their_mean_are_escaped():
    mean = torch.tensor([0.2, 5.5, -300.7, 1e5], dtype=torch.float64)
    std = torch.tensor([4.0, 4.0, 0.5, 4.0], dtype=torch.float64)
    j = torch.tensor([0, 1_000_000, -301, -40_000])
    stack = Stack()
    stack.push_normal(j, mean, std, escapes=True)
    back = Stack(stack.words())
    assert torch.equal(back.pop_normal(mean, std, escapes=True), j) and back.is_initial()
    with pytest.raises(ValueError, match="too far"):
        Stack().push_normal(j + 2**23, mean, std, escapes=True)


def test_pops_from_a_stack_are_draws_that_pushes_take_back():
    rng = generator("moments")
    mean = 50 * torch.randn(20_000, generator=rng, dtype=torch.float64)
    std = 4 + 4 * torch.rand(20_000, generator=rng, dtype=torch.float64)
    stack = Stack()
    j = stack.pop_normal(mean, std, escapes=False)
    dither = torch.rand(len(j), generator=rng, dtype=torch.float64) - 0.5  # within the cell
    z = (j + dither - mean) / std
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    entropy = float((std.log2() + 0.5 * math.log2(2 * math.pi * math.e)).sum())
    # Just as many words lie beneath as the draws need.
    assert stack.initial_bits - stack.bits == pytest.approx(entropy, rel=5e-3)
    assert stack.bits < 32 * (len(j) // 64 + 4)
    stack.push_normal(j, mean, std, escapes=False)
    assert stack.is_initial() and stack.bits == stack.initial_bits


def test_the_words_beneath_do_not_depend_on_their_number():
    assert np.array_equal(initial_words(9)[-4:], initial_words(4))
    words = Stack().words()
    assert not (Stack(words[:-1]).is_initial() or Stack(np.append(words[:-1], words[-1] + 2)).is_initial())


def test_rounding_hides_differences_of_another_processor():
    log_p, k = tables(20_000, 17)
    queue, stack = Queue(), Stack()
    queue.push_levels(k, perturbed(log_p, "here"))
    assert torch.equal(Queue(queue.words()).pop_levels(perturbed(log_p, "there")), k)
    mean, std = 50 * torch.randn(20_000, generator=generator("m"), dtype=torch.float64), log_p[:, 0].exp() + 1
    j = stack.pop_normal(perturbed(mean, "here"), perturbed(std, "here"), escapes=False)
    stack.push_normal(j, perturbed(mean, "there"), perturbed(std, "there"), escapes=False)
    assert stack.is_initial()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_probabilities_and_moments_that_are_no_numbers_are_refused(value):
    bad = torch.tensor([[0.0, value]], dtype=torch.float64)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Queue().push_levels(torch.zeros(1, dtype=torch.int64), bad)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Stack().pop_normal(bad[0], torch.ones(2, dtype=torch.float64), escapes=False)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Stack().pop_normal(torch.zeros(2, dtype=torch.float64), bad[0] + 1, escapes=False)
