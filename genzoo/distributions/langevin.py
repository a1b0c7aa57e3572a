r"""Langevin dynamics of a potential U, without and with a Metropolis-Hastings correction.

A step of size h from x proposes

    x' = x - h grad U(x) + sqrt(2 h) xi,    xi ~ N(0, I),

whose stationary distribution is exp(-U)/Z up to an error of order h. For ``U = x^2/(2 s^2)`` its
variance is s^2/(1 - h/(2 s^2)), and infinite from h = 2 s^2 on. Accepted with probability

    min(1, exp(U(x) - U(x')) q(x | x')/q(x' | x)),    q(x' | x) = N(x'; x - h grad U(x), 2 h I),

a step leaves exp(-U)/Z invariant for any h: the Metropolis-adjusted Langevin algorithm (MALA).

References:
    Roberts, Tweedie, "Exponential Convergence of Langevin Distributions and Their Discrete Approximations", 1996,
    https://doi.org/10.2307/3318418 (section 1.4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genzoo.numerics.random import rand, randn

Potential = Callable[[Tensor], Tensor]  # (B, *shape) -> (B,), U of each row


class Point(NamedTuple):
    """A state of a chain, with its potential and gradient."""

    x: Tensor  # (B, *shape)
    potential: Tensor  # (B,), U(x)
    gradient: Tensor  # (B, *shape), grad U(x)

    def expand(self, values: Tensor) -> Tensor:
        """Reshape a value of each row, (B,), to broadcast with (B, *shape)."""
        return values.view(-1, *[1] * (self.x.ndim - 1))

    def each(self, h: Tensor | float) -> Any:
        """Return a step size, a number or (B,), in a form that broadcasts with (B, *shape)."""
        return self.expand(h) if isinstance(h, Tensor) else h


def at(potential: Potential, x: Tensor) -> Point:
    """Evaluate a potential and its gradient, detached, in any mode of autograd."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        u = potential(x)
        (gradient,) = torch.autograd.grad(u.sum(), x)
    return Point(x.detach(), u.detach(), gradient)


def propose(point: Point, h: Tensor | float, rng: torch.Generator | None) -> Tensor:
    """Draw the proposal of a step of size ``h``, a number or (B,)."""
    h = point.each(h)
    xi = randn(point.x.shape, rng=rng, device=point.x.device, dtype=point.x.dtype)
    return point.x - h * point.gradient + (2 * h) ** 0.5 * xi


def log_ratio(point: Point, proposed: Point, h: Tensor | float) -> Tensor:
    """Return the logarithm of the Metropolis-Hastings ratio, (B,), for steps of size ``h``, a number or (B,)."""
    h = point.each(h)

    def log_q(to: Point, start: Point) -> Tensor:
        return -((to.x - start.x + h * start.gradient).square() / (4 * h)).flatten(1).sum(1)

    return point.potential - proposed.potential + log_q(point, proposed) - log_q(proposed, point)


def mala_step(
    potential: Potential,
    point: Point,
    h: Tensor | float,
    rng: torch.Generator | None,
    unadjusted: Tensor | None = None,
) -> tuple[Point, Tensor]:
    """Do a step of the Metropolis-adjusted Langevin algorithm.

    Args:
        potential: U.
        point: the present states.
        h: step size, a number or (B,).
        rng: source of randomness.
        unadjusted: chains that accept every step, (B,) bool, since far from equilibrium steep chains would reject them all.

    Returns:
        The next states, and the acceptance probabilities, (B,).
    """
    proposed = at(potential, propose(point, h, rng))
    probability = log_ratio(point, proposed, h).clamp(max=0).exp().nan_to_num(0.0)
    u = rand(probability.shape, rng=rng, device=probability.device, dtype=probability.dtype)
    accepted = u < probability if unadjusted is None else (u < probability) | unadjusted
    pairs = zip(proposed, point, strict=True)
    chosen = (torch.where(point.expand(accepted) if a.ndim > 1 else accepted, a, b) for a, b in pairs)
    return Point(*chosen), probability
