r"""An adaptive solver of ordinary differential equations, in which every sample walks at its own pace.

Dormand and Prince's pair of orders 5 and 4 takes seven evaluations a step, the last of which is the next step's first. The
difference of the two orders estimates the error; a step whose error exceeds ``atol + rtol |z|`` is rejected and
repeated with a smaller one. Here z is the state at the end of the step, which keeps the error: where a step shrinks the state,
as from noise to data, the larger state at its start would excuse an error as large as what is left.

The estimate is right for steps shorter than what the drift varies over. A longer one may be far off and have an estimate that
happens to be small; ``max_step`` keeps steps below that length where it is known.

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
from collections.abc import Callable

import torch
from torch import Tensor

from genzoo.diffusion.path import expand

Drift = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps the variable u, (n,) float64, the state z, (n, ...), and the rows of the batch that these are, (n,), to dz/du."""

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
# The rows of both, and a column for each slope.
_TABLE = [[*row, *[0.0] * (7 - len(row))] for row in (*_WEIGHTS, _ERROR)]


def rms(z: Tensor) -> Tensor:
    """Root mean square of each row, (n, ...) -> (n,)."""
    z = z.flatten(1)
    return torch.linalg.vector_norm(z, dim=1) / z.shape[1] ** 0.5


@torch.no_grad()
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
    max_step: float = math.inf,
) -> tuple[Tensor, int]:
    """Solve dz/du = drift(u, z) from ``u = start`` to ``u = stop``; no gradient flows through the solution.

    Args:
        drift: see ``Drift``.
        start, stop: of the variable, in either order.
        z: states at the start, (B, ...).
        rtol, atol: a step's error may be ``atol + rtol |z|``, with z at its end.
        norm: of the errors of each row in these units, (n, ...) -> (n,), in proportion to their size.
        max_steps: of any row, rejected ones included.
        max_step: longest step of the variable.

    Returns:
        The states at the stop, and how often the drift was evaluated for the slowest row, rejected steps included.

    Raises:
        ArithmeticError: where a row has not arrived after ``max_steps``, or its step size vanishes.
    """
    result, sign, length = z.clone(), 1.0 if stop >= start else -1.0, abs(stop - start)
    if start == stop or not len(z):
        return result, 0
    rows = torch.arange(len(z), device=z.device)
    u = torch.full((len(z),), start, dtype=torch.float64, device=z.device)
    left = torch.full_like(u, length)
    nodes = sign * torch.tensor(_NODES, dtype=torch.float64, device=z.device)[:, None]
    table = sign * torch.tensor(_TABLE, dtype=z.dtype, device=z.device).view(7, 7, *[1] * z.ndim)
    columns = [table[i:, i] for i in range(7)]
    stages, following = _sums(z)
    floor, trailing = torch.tensor(atol, dtype=z.dtype, device=z.device), [1] * (z.ndim - 1)
    safety = torch.tensor(8 * math.log2(0.9), dtype=torch.float64, device=z.device)
    slope = drift(u, z, rows)
    h = _rounded(8 * _first_step(drift, u, z, rows, slope, sign, length, rtol, atol, norm).log2())
    evaluations = 2
    for _ in range(max_steps):
        h = torch.minimum(h.clamp_(max=max_step), left)
        step, times = h.to(z.dtype).view(-1, *trailing), torch.addcmul(u, nodes, h).unbind()
        torch.mul(columns[0], slope, out=following[0])
        for i, at in enumerate(times):
            point = torch.addcmul(z, step, stages[i])
            ahead = drift(at, point, rows)
            following[i + 1].addcmul_(columns[i + 1], ahead)
        evaluations += 6
        scale = torch.add(floor, point.abs(), alpha=rtol)
        error, rest = h * norm(stages[6] / scale), left - h
        # By 0.9 error^(-1/5), but at least to a fifth and at most tenfold: in eighths of an octave.
        growth = torch.add(safety, error.log2(), alpha=-8 / 5).clamp_(8 * math.log2(0.2), 8 * math.log2(10))
        h = _rounded(growth.add_(h.log2(), alpha=8))
        largest, smallest, nearest = torch.stack([error.max(), h.min(), rest.min()]).tolist()
        if largest <= 1:
            u, z, slope, left = at, point, ahead, rest
        else:
            accepted = error <= 1
            u, left = torch.where(accepted, at, u), torch.where(accepted, rest, left)
            chosen = accepted.view(step.shape)
            z, slope = torch.where(chosen, point, z), torch.where(chosen, ahead, slope)
        if not (smallest > 1e-14 * length and largest < math.inf):
            raise ArithmeticError(
                f"the solver's step vanished near u = {float(u[h.argmin()]):.4g}: the drift is not smooth"
            )
        if nearest <= 1e-12 * length:
            walking = left > 1e-12 * length
            result[rows[~walking]] = z[~walking]
            rows, u, z, slope, h, left = (values[walking] for values in (rows, u, z, slope, h, left))
            stages, following = _sums(z)
        if not len(rows):
            return result, evaluations
    raise ArithmeticError(f"the solver has not arrived after {max_steps} steps: try larger rtol and atol")


def _sums(z: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Make room for the weighted sums of slopes at the six stages and in the error, each alone and with all that follow.

    They grow together, so that a new slope is added to all that follow at once.
    """
    sums = z.new_empty(7, *z.shape)
    return sums.unbind(), [sums[i:] for i in range(7)]


def _rounded(eighths: Tensor) -> Tensor:
    """Round step sizes, given by their logarithms in eighths of an octave, down to whole ones."""
    return eighths.floor().mul_(1 / 8).exp2_()


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
    ahead = drift(u + sign * trial, z + expand(sign * trial, z) * slope, rows)
    d2 = norm((ahead - slope) / scale).double() / trial
    steepest = torch.maximum(d1, d2)
    guess = torch.where(steepest <= 1e-15, (trial * 1e-3).clamp(min=1e-6), (0.01 / steepest.clamp(min=1e-30)) ** 0.2)
    return torch.minimum(100 * trial, guess).clamp(max=length)
