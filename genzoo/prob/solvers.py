r"""An adaptive solver of ordinary differential equations, in which every sample walks at its own pace.

Dormand and Prince's pair of orders 5 and 4 takes seven evaluations a step, the last of which is the next step's first. The
difference of the two orders estimates the error; a step whose error exceeds ``atol + rtol |z|`` is rejected and
repeated with a smaller one.

A solver that takes one step for a whole batch couples the samples: what a sample becomes depends on its neighbours. Here
each row has its own variable, its own step and its own decision to accept, and leaves the batch when it has arrived.

The rule that chooses the next step is chaotic where the drift holds waves shorter than the steps, as a network's time embedding
does: what a row's drift differs by in its last digit when it is computed in another batch grows severalfold with each step,
until after some tens of them the row takes other steps and ends within the tolerance elsewhere. So step sizes are rounded
down to eighths of an octave, which forgets the last digits each time.

References:
    Dormand, Prince, "A family of embedded Runge-Kutta formulae", 1980, https://doi.org/10.1016/0771-050X(80)90013-3.
    Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", 1993, section II.4 (step sizes and the first one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Drift = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps the variable u, (n,) float64, the state z, (n, N), and the rows of the batch that these are, (n,), to dz/du."""

# Dormand and Prince's table: row i weighs the moves along slopes 0..i to the point at which slope i + 1 is taken.
_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_WEIGHTS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def rms(z: Tensor) -> Tensor:
    """Root mean square of each row, (n, N) -> (n,)."""
    return torch.linalg.vector_norm(z, dim=1) / z.shape[1] ** 0.5


def dopri5(
    drift: Drift,
    start: float,
    stop: float,
    z: Tensor,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    norm: Callable[[Tensor], Tensor] = rms,
    max_steps: int = 10_000,
) -> tuple[Tensor, int]:
    """Solve dz/du = drift(u, z) from ``u = start`` to ``u = stop``.

    Args:
        drift: see ``Drift``.
        start, stop: of the variable, in either order.
        z: states at the start, (B, N).
        rtol, atol: a step's error may be ``atol + rtol |z|``.
        norm: of the errors of each row in these units, (n, N) -> (n,).
        max_steps: of any row, rejected ones included.

    Returns:
        The states at the stop, and how often the drift was evaluated for the slowest row, rejected steps included.

    Raises:
        ArithmeticError: where a row has not arrived after ``max_steps``, or its step size vanishes.
    """
    result, sign = z.clone(), 1.0 if stop >= start else -1.0
    rows = torch.arange(len(z), device=z.device)
    u = torch.full((len(z),), start, dtype=torch.float64, device=z.device)
    nodes = torch.tensor(_NODES, dtype=torch.float64, device=z.device)[:, None]
    if start == stop or not len(z):
        return result, 0
    slope = drift(u, z, rows)
    h = _rounded(_first_step(drift, u, z, rows, slope, sign, abs(stop - start), rtol, atol, norm))
    evaluations, remaining = 2, (stop - u).abs()
    for _ in range(max_steps):
        h = torch.minimum(h, remaining)
        signed = sign * h
        step = signed.to(z.dtype)[:, None]
        ahead, moves = slope, [step * slope]
        for weights, at in zip(_WEIGHTS, torch.addcmul(u, nodes, signed), strict=True):
            point = _advanced(z, weights, moves)
            ahead = drift(at, point, rows)
            moves.append(step * ahead)
        evaluations += 6
        scale = torch.maximum(z.abs(), point.abs()).mul_(rtol).add_(atol)
        error = norm(_advanced(torch.zeros_like(z), _ERROR, moves) / scale).double()
        accepted = error <= 1
        if bool(accepted.all()):
            u, z, slope = u + signed, point, ahead
        else:
            u = torch.where(accepted, u + signed, u)
            z, slope = (torch.where(accepted[:, None], new, old) for new, old in ((point, z), (ahead, slope)))
        remaining = (stop - u).abs()
        arrived = accepted & (remaining <= 1e-12 * abs(stop - start))
        h = _rounded(h * (0.9 * error.clamp(min=1e-10) ** -0.2).clamp(0.2, 10.0))
        if not bool(((h > 1e-14 * abs(stop - start)) & (error < math.inf)).all()):
            raise ArithmeticError(
                f"the solver's step vanished near u = {float(u[h.argmin()]):.4g}: the drift is not smooth"
            )
        if bool(arrived.any()):
            result[rows[arrived]] = z[arrived]
            left = ~arrived
            rows, u, z, slope, h, remaining = (values[left] for values in (rows, u, z, slope, h, remaining))
        if not len(rows):
            return result, evaluations
    raise ArithmeticError(f"the solver has not arrived after {max_steps} steps: try larger rtol and atol")


def _advanced(z: Tensor, weights: Sequence[float], moves: Sequence[Tensor]) -> Tensor:
    """Return ``z`` and the weighted sum of some moves."""
    for weight, move in zip(weights, moves, strict=True):
        z = torch.add(z, move, alpha=weight)
    return z


def _rounded(h: Tensor) -> Tensor:
    """Round step sizes down to eighths of an octave."""
    return torch.exp2(torch.floor(8 * torch.log2(h)) / 8)


def _first_step(
    drift: Drift,
    u: Tensor,
    z: Tensor,
    rows: Tensor,
    slope: Tensor,
    sign: float,
    length: float,
    rtol: float,
    atol: float,
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """Guess a first step from the sizes of the state and of its first two derivatives, (n,) float64."""
    scale = atol + rtol * z.abs()
    d0, d1 = norm(z / scale).double(), norm(slope / scale).double()
    trial = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1.clamp(min=1e-30)).clamp(max=length)
    ahead = drift(u + sign * trial, z + (sign * trial).to(z.dtype)[:, None] * slope, rows)
    d2 = norm((ahead - slope) / scale).double() / trial
    steepest = torch.maximum(d1, d2)
    guess = torch.where(steepest <= 1e-15, (trial * 1e-3).clamp(min=1e-6), (0.01 / steepest.clamp(min=1e-30)) ** 0.2)
    return torch.minimum(100 * trial, guess).clamp(max=length)
