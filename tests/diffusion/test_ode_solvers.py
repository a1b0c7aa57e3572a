"""The adaptive solver: its table by the order conditions, its answers by closed forms and by SciPy, its steps by counting."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from genzoo.diffusion.ode_solvers import _ERROR, _NODES, _WEIGHTS, dopri5, rms


def column(u: Tensor) -> Tensor:
    return u[:, None]


def pendulum(u: Tensor, z: Tensor, rows: Tensor) -> Tensor:
    """A driven pendulum, angle and speed: nothing of it is linear."""
    angle, speed = z.unbind(1)
    return torch.stack([speed, torch.cos(3 * u) - 4 * torch.sin(angle)], dim=1)


class Watched:
    """A drift that notes where it is asked, row by row."""

    def __init__(self, drift):
        self.drift, self.calls, self.seen = drift, 0, {}

    def __call__(self, u: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        self.calls += 1
        for row, where in zip(rows.tolist(), u.tolist(), strict=True):
            self.seen.setdefault(row, []).append(where)
        return self.drift(u, z, rows)


def steps(asked: list[float]) -> list[float]:
    """Where each trial step of a row began: six evaluations each, after the two that choose the first step."""
    trials = [asked[i : i + 6] for i in range(2, len(asked), 6)]
    return [(5 * trial[0] - trial[-1]) / 4 for trial in trials]  # at u + h/5 first, at u + h last


def test_the_table_meets_the_conditions_of_its_orders():
    """Rows sum to their nodes; the weights integrate u^k exactly up to k = 4, and the embedded ones up to k = 3."""
    for node, row in zip(_NODES, _WEIGHTS, strict=True):
        assert sum(row) == pytest.approx(node, abs=1e-14)
    nodes, weights = (0.0, *_NODES), (*_WEIGHTS[-1], 0.0)
    matrix = [(), *_WEIGHTS]
    for k in range(5):
        assert sum(b * c**k for b, c in zip(weights, nodes, strict=True)) == pytest.approx(1 / (k + 1), abs=1e-14)
        error = sum(e * c**k for e, c in zip(_ERROR, nodes, strict=True))
        assert error == pytest.approx(0.0, abs=1e-14) if k < 4 else abs(error) > 1e-4
    # One of the conditions of order 4 and one of order 5 that see the inner weights.
    inner = [sum(a * nodes[j] ** 2 for j, a in enumerate(row)) for row in matrix]
    assert sum(b * i for b, i in zip(weights, inner, strict=True)) == pytest.approx(1 / 12, abs=1e-14)
    assert sum(b * c * i for b, c, i in zip(weights, nodes, inner, strict=True)) == pytest.approx(1 / 15, abs=1e-14)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 3.0), (3.0, 0.0), (-1.0, 2.5)])
def test_a_pendulum_swings_as_scipy_says(start, stop):
    z = torch.tensor([[0.5, 1.0], [3.0, -0.2], [-1.0, 4.0]], dtype=torch.float64)
    got, _ = dopri5(pendulum, start, stop, z, rtol=1e-10, atol=1e-10)
    for row, result in zip(z, got, strict=True):
        reference = solve_ivp(
            lambda u, v: [v[1], math.cos(3 * u) - 4 * math.sin(v[0])],
            (start, stop),
            row.numpy(),
            method="DOP853",
            rtol=1e-12,
            atol=1e-12,
        )
        torch.testing.assert_close(result, torch.from_numpy(reference.y[:, -1]), atol=1e-7, rtol=0)


def test_there_and_back_is_where_it_was():
    z = torch.randn(4, 2, dtype=torch.float64)
    there, _ = dopri5(pendulum, 0.0, 2.0, z, rtol=1e-10, atol=1e-10)
    back, _ = dopri5(pendulum, 2.0, 0.0, there, rtol=1e-10, atol=1e-10)
    assert (there - z).abs().max() > 0.1
    torch.testing.assert_close(back, z, atol=1e-7, rtol=0)


def test_the_error_follows_the_tolerance_and_the_work_its_fifth_root():
    z = torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    truth, _ = dopri5(pendulum, 0.0, 3.0, z, rtol=1e-13, atol=1e-13)
    tolerances = [1e-4, 1e-6, 1e-8, 1e-10]
    runs = [dopri5(pendulum, 0.0, 3.0, z, rtol=tolerance, atol=tolerance) for tolerance in tolerances]
    errors = [float((result - truth).abs().max()) for result, _ in runs]
    assert all(0.02 < error / tolerance < 50 for error, tolerance in zip(errors, tolerances, strict=True)), errors
    slope = (math.log10(errors[0]) - math.log10(errors[-1])) / 6
    assert 0.85 < slope < 1.15
    work = math.log10(runs[-1][1] / runs[1][1]) / 4
    assert 0.15 < work < 0.25
    watched = Watched(pendulum)
    dopri5(watched, 0.0, 3.0, z, rtol=1e-6, atol=1e-6)
    begun = steps(watched.seen[0])
    rejected = sum(abs(b - a) < 1e-9 for a, b in pairwise(begun))
    assert rejected < 0.2 * len(begun)  # the way is smooth


def test_each_tolerance_counts():
    """A state that decays to 1e-6: a relative tolerance follows it there, an absolute one need not."""

    def decay(u: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        return -z

    z, u = torch.ones(1, 1, dtype=torch.float64), 14.0
    relative, many = dopri5(decay, 0.0, u, z, rtol=1e-6, atol=1e-30)
    absolute, few = dopri5(decay, 0.0, u, z, rtol=1e-30, atol=1e-6)
    assert abs(float(relative) * math.exp(u) - 1) < 1e-4
    assert abs(float(absolute) - math.exp(-u)) < 1e-5
    assert few < many


def rise(u: Tensor, z: Tensor, rows: Tensor) -> Tensor:
    """A slope that rises twentyfold at u = 1/2, which the steps before it do not announce."""
    return column(0.1 + 2 * torch.sigmoid((u - 0.5) / 0.005)) * torch.cos(z)


def test_rejected_steps_are_repeated_and_counted():
    watched = Watched(rise)
    z = torch.zeros(1, 1, dtype=torch.float64)
    result, evaluations = dopri5(watched, 0.0, 1.0, z, rtol=1e-6, atol=1e-6)
    assert evaluations == watched.calls
    begun = steps(watched.seen[0])
    rejected = sum(abs(b - a) < 1e-9 for a, b in pairwise(begun))
    assert rejected >= 2
    assert evaluations == 2 + 6 * len(begun)
    # dz/cos z = g du, in closed form by the Gudermannian function.
    integral = 0.1 + 2 * 0.5
    assert float(result) == pytest.approx(2 * math.atan(math.tanh(integral / 2)), abs=1e-4)


def both(u: Tensor, z: Tensor, rows: Tensor) -> Tensor:
    """A hard equation for odd rows, an easy one for even ones."""
    return torch.where(column(rows % 2 == 1), rise(u, z, rows), -0.01 * z)


def test_each_row_walks_at_its_own_pace_and_knows_nothing_of_its_neighbours():
    z = torch.randn(6, 2, dtype=torch.float64)
    watched = Watched(both)
    together, evaluations = dopri5(watched, 0.0, 1.0, z)
    assert evaluations == watched.calls == max(len(seen) for seen in watched.seen.values())
    for i in range(6):
        alone = Watched(lambda u, z, rows, i=i: both(u, z, rows + i))
        result, count = dopri5(alone, 0.0, 1.0, z[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], result, atol=1e-13, rtol=1e-13)
        assert count == len(watched.seen[i])
    easy, hard = len(watched.seen[0]), len(watched.seen[1])
    assert easy < hard
    mixed, _ = dopri5(lambda u, z, rows: both(u, z, 5 - rows), 0.0, 1.0, z.flip(0))
    torch.testing.assert_close(mixed.flip(0), together, atol=1e-13, rtol=1e-13)


def test_the_last_digits_of_the_drift_do_not_choose_the_steps():
    """In another batch a network's answer has other last digits: here they are drawn at random, beside a small wave that is
    shorter than the steps. Steps chosen freely end .001 to .05 apart."""

    def wavy(u: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        return pendulum(u, z, rows) + 0.01 * torch.cos(100 * column(u))

    def noisy(u: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        return wavy(u, z, rows) * (1 + 1e-15 * torch.randn_like(z))

    z = torch.randn(5, 2, dtype=torch.float64)
    expected, evaluations = dopri5(wavy, 0.0, 30.0, z, rtol=1e-3, atol=1e-3)
    for _ in range(3):
        result, count = dopri5(noisy, 0.0, 30.0, z, rtol=1e-3, atol=1e-3)
        assert count == evaluations
        torch.testing.assert_close(result, expected, atol=1e-8, rtol=0)


def test_a_norm_of_ones_own_judges_the_steps():
    """Of a fast and a slow coordinate the first decides, unless the norm does not look at it."""

    def drift(u: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        return torch.stack([40 * torch.cos(40 * u), -z[:, 1]], dim=1)

    z = torch.ones(1, 2, dtype=torch.float64)
    _, careful = dopri5(drift, 0.0, 1.0, z)
    _, blind = dopri5(drift, 0.0, 1.0, z, norm=lambda error: rms(error[:, 1:]))
    assert blind < careful / 2


@pytest.mark.parametrize("n", [0, 3])
def test_nowhere_to_go_is_reached_at_once(n):
    z = torch.randn(n, 2)
    watched = Watched(pendulum)
    result, evaluations = dopri5(watched, 1.0, 1.0, z)
    assert torch.equal(result, z)
    assert result is not z
    assert evaluations == watched.calls == 0


def test_no_rows_take_no_evaluation():
    result, evaluations = dopri5(Watched(pendulum), 0.0, 1.0, torch.zeros(0, 2))
    assert result.shape == (0, 2)
    assert evaluations == 0


def test_single_precision_stays_single_and_right():
    z = torch.tensor([[0.5, 1.0]])
    got, _ = dopri5(lambda u, z, rows: pendulum(u, z.double(), rows).float(), 0.0, 3.0, z)
    expected, _ = dopri5(pendulum, 0.0, 3.0, z.double(), rtol=1e-10, atol=1e-10)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=0)


def test_what_cannot_be_solved_is_said():
    z = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ArithmeticError, match="exceeded 5 steps"):
        dopri5(lambda u, z, rows: torch.cos(40 * u)[:, None], 0.0, 1.0, z, max_steps=5)
    with pytest.raises(ArithmeticError, match="step size underflow"):  # z = 1/(1 - u) ends at u = 1
        dopri5(lambda u, z, rows: z**2, 0.0, 2.0, z)
    with pytest.raises(ArithmeticError, match="step size underflow"):
        dopri5(lambda u, z, rows: z * math.nan, 0.0, 1.0, z)


@pytest.mark.parametrize("rate", [8.0, 15.0, 60.0])
def test_an_error_is_small_beside_the_state_at_the_end_of_its_step(rate):
    """Where steps shrink the state: the end is right to the relative tolerance, though it is e^-60 of the start."""
    rtol, z = 1e-2, torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    got, _ = dopri5(lambda u, z, rows: -rate * z, 0.0, 1.0, z, rtol=rtol, atol=1e-300)
    error = got / (z * math.exp(-rate)) - 1
    assert float(error.abs().max()) < 0.3 * rtol * rate  # a few steps a factor of e


def test_no_step_is_longer_than_the_longest():
    seen: list[float] = []

    def flat(u: Tensor, z: Tensor, rows: Tensor) -> Tensor:
        seen.append(float(u))
        return torch.zeros_like(z)

    dopri5(flat, 0.0, 10.0, torch.ones(1, 1).double(), max_step=1.0)
    at = sorted(set(seen))
    assert max(b - a for a, b in itertools.pairwise(at)) <= 0.5 and len(seen) >= 60
