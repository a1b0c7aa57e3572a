r"""An adaptive ODE solver with a step size per sample.

The Dormand-Prince pair of orders 5 and 4 has seven stages, the last of which is the first of the next step (FSAL). The
difference of the two orders estimates the local error; a step whose error exceeds ``atol + rtol |z|`` is rejected and
repeated with a smaller step size. z is the state at the end of the step: where a step contracts the state, as from noise to
data, the larger initial state would accept errors of the size of the result.

The error estimate is valid for steps shorter than the length scale of the drift; a longer step may have a small estimate by
coincidence. ``max_step`` bounds the steps where the length scale is known.

A step size shared by a batch would make each sample depend on the others. Here each row has its own time, step size and
acceptance, and leaves the batch when it reaches the end.

Step size control amplifies rounding errors where the drift oscillates within a step, as with a network's time embedding: a
difference in the last digit, from another batch size, grows severalfold per step, until the row takes other steps and ends
elsewhere within the tolerance. Step sizes are therefore rounded down to eighths of an octave, which removes the difference.

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
"""Maps time u, (n,) float64, state z, (n, ...), and row indices into the batch, (n,), to dz/du."""

# The Butcher tableau: row i weights slopes 0..i for stage i + 1.
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
# The tableau and the error weights, a column per slope.
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
        start, stop: limits of u, in either order.
        z: initial states, (B, ...).
        rtol, atol: error tolerance of a step, ``atol + rtol |z|``, with z at its end.
        norm: of the scaled errors of each row, (n, ...) -> (n,), homogeneous.
        max_steps: maximum number of steps of a row, rejected steps included.
        max_step: maximum step size.

    Returns:
        The final states, and the largest number of drift evaluations of a row, rejected steps included.

    Raises:
        ArithmeticError: if a row needs more than ``max_steps`` steps, or its step size underflows.
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
        # The factor 0.9 error^(-1/5), clamped to [0.2, 10], as a logarithm in eighths of an octave.
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
            raise ArithmeticError(f"step size underflow near u = {float(u[h.argmin()]):.4g}: the drift is not smooth")
        if nearest <= 1e-12 * length:
            active = left > 1e-12 * length
            result[rows[~active]] = z[~active]
            rows, u, z, slope, h, left = (values[active] for values in (rows, u, z, slope, h, left))
            stages, following = _sums(z)
        if not len(rows):
            return result, evaluations
    raise ArithmeticError(f"the solver exceeded {max_steps} steps: increase rtol and atol")


def _sums(z: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Allocate the weighted sums of slopes of the six stages and of the error; return each, and each with all later ones.

    A new slope is added to all later sums in one operation.
    """
    sums = z.new_empty(7, *z.shape)
    return sums.unbind(), [sums[i:] for i in range(7)]


def _rounded(eighths: Tensor) -> Tensor:
    """Round step sizes, given as logarithms in eighths of an octave, down to integer logarithms."""
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
    """Choose the initial step size from the norms of the state and its first two derivatives, (n,) float64."""
    scale = atol + rtol * z.abs()
    d0, d1 = norm(z / scale).double(), norm(slope / scale).double()
    trial = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1.clamp(min=1e-30)).clamp(max=length)
    ahead = drift(u + sign * trial, z + expand(sign * trial, z) * slope, rows)
    d2 = norm((ahead - slope) / scale).double() / trial
    steepest = torch.maximum(d1, d2)
    guess = torch.where(steepest <= 1e-15, (trial * 1e-3).clamp(min=1e-6), (0.01 / steepest.clamp(min=1e-30)) ** 0.2)
    return torch.minimum(100 * trial, guess).clamp(max=length)
