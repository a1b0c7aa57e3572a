r"""Annealed importance sampling (AIS) of a ratio of normalisers, forward and in reverse.

Between a distribution ``p_0 = f_0/Z_0`` that can be sampled and ``p_1 = f_1/Z_1`` lie ``f_b = f_0^(1-b) f_1^b``, with inverse
temperatures ``0 = b_0 < ... < b_K = 1``. A chain starts from ``x ~ p_0`` and alternates between

    log w <- log w + log f_{b_k}(x) - log f_{b_{k-1}}(x),        x ~ T_{b_k}(x),

where T_b leaves p_b invariant. Then ``E w = Z_1/Z_0`` exactly for any number of steps, so that by Jensen's inequality

    E log(mean of n weights) <= log(Z_1/Z_0):

a lower bound in expectation, and by Markov's inequality one that is exceeded by b nats with probability at most exp(-b). The
same chain from ``x ~ p_1`` with the temperatures reversed estimates Z_0/Z_1, and minus its logarithm is an upper bound of
``log(Z_1/Z_0)`` (bidirectional Monte Carlo). The second needs exact samples of p_1.

References:
    Neal, "Annealed importance sampling", 2001, https://arxiv.org/abs/physics/9803008 (section 2).
    Grosse, Ghahramani, Adams, "Sandwiching the marginal likelihood using bidirectional Monte Carlo", 2015,
    https://arxiv.org/abs/1511.02543 (bidirectional Monte Carlo, and the sigmoidal schedule).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LogMean(NamedTuple):
    """Logarithm of a mean of weights, with its standard error."""

    value: float
    stderr: float


class Sandwich(NamedTuple):
    """Stochastic bounds of log(Z_1/Z_0) with their standard errors."""

    lower: float
    lower_stderr: float
    upper: float
    upper_stderr: float

    @property
    def midpoint(self) -> float:
        """An estimate, the mean of both bounds."""
        return 0.5 * (self.lower + self.upper)

    @property
    def stderr(self) -> float:
        """Standard error of the midpoint and half the distance of the bounds, added in quadrature."""
        return math.hypot(0.5 * (self.upper - self.lower), 0.5 * math.hypot(self.lower_stderr, self.upper_stderr))


def sigmoid_schedule(steps: int, delta: float = 4.0) -> Tensor:
    """Return inverse temperatures from 0 to 1, (steps + 1,) float64, closest at both ends (Grosse et al. 2015).

    Raises:
        ValueError: for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    b = torch.sigmoid(delta * torch.linspace(-1, 1, steps + 1, dtype=torch.float64))
    return (b - b[0]) / (b[-1] - b[0])


def annealed_log_weights(
    x: Tensor, betas: Tensor, log_ratio: Callable[[Tensor], Tensor], kernel: Callable[[Tensor, float], Tensor]
) -> tuple[Tensor, Tensor]:
    """Compute the logarithms of the weights of chains (Neal 2001, section 2).

    Args:
        x: samples of the distribution at the first inverse temperature, (B, *shape).
        betas: inverse temperatures in the order in which the chains pass them.
        log_ratio: log f_1(x) - log f_0(x), (B,).
        kernel: a step from x that leaves the distribution of an inverse temperature invariant.

    Returns:
        The log weights, (B,) float64, the mean of whose exponentials estimates the ratio of the last normaliser to the first
        without bias; and the last states.
    """
    log_w = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for before, after in itertools.pairwise(betas.tolist()):
        log_w += (after - before) * log_ratio(x).double()
        x = kernel(x, after)
    return log_w, x


def log_mean_exp(log_w: Tensor) -> LogMean:
    """Return the logarithm of the mean of exp(log_w), (B,), and its standard error by the delta method."""
    n, top = len(log_w), float(log_w.max())
    if not math.isfinite(top):
        return LogMean(top, math.nan)
    w = (log_w.double() - top).exp()
    mean = float(w.mean())
    return LogMean(top + math.log(mean), float(w.std(correction=1)) / (mean * math.sqrt(n)) if n > 1 else math.nan)


def sandwich(forward: Tensor, reverse: Tensor) -> Sandwich:
    """Bound log(Z_1/Z_0) from both sides.

    Args:
        forward: log weights of chains from p_0 to p_1, (B,).
        reverse: log weights of chains from exact samples of p_1 to p_0, (B,).
    """
    lower, upper = log_mean_exp(forward), log_mean_exp(reverse)
    return Sandwich(lower.value, lower.stderr, -upper.value, upper.stderr)
