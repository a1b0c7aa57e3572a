r"""Moment matching posterior sampling: a Gaussian likelihood with the covariance of the data given x_t,

    p(x | x_t) = N(E[x | x_t], V),      V = sigma_t^2/alpha_t J                           (Tweedie's covariance)
    E[x | x_t, value] = E[x | x_t] + V A' (A V A' + sigma^2 I)^-1 (value - A E[x | x_t])

with the Jacobian J of the denoiser in x_t, which is symmetric for an exact denoiser. The linear system is solved by conjugate
gradients, one vector-Jacobian product per iteration. It is exact for Gaussian data once the solver has converged.

References:
    Rozet, Andry, Lanusse, Louppe, "Learning Diffusion Priors from Observations by Expectation Maximization", 2024,
    https://arxiv.org/abs/2405.13712 (section 4.2 and algorithm 3: MMPS).
    Boys et al., "Tweedie Moment Projected Diffusions for Inverse Problems", 2023, https://arxiv.org/abs/2310.06721 (eq. 9).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genzoo.diffusion.inverse.operators import Observation
from genzoo.diffusion.inverse.sampler import PosteriorMeanSampler
from genzoo.diffusion.path import expand
from genzoo.diffusion.samplers.sampler import Sampler


class MomentMatching(PosteriorMeanSampler):
    """Moment matching posterior sampling; one vector-Jacobian product per iteration and one more per evaluation.

    Args:
        observation, sampler: as in ``InverseSampler``.
        iterations: most iterations of conjugate gradients; as many as values for an exact solution.
        rtol: relative residual at which the iteration of a sample ends.
    """

    def __init__(self, observation: Observation, sampler: Sampler, iterations: int = 3, rtol: float = 1e-4):
        super().__init__(observation, sampler)
        if iterations < 1 or not rtol >= 0:
            raise ValueError(f"iterations must be at least 1 and rtol at least 0, not {iterations} and {rtol}")
        self.iterations, self.rtol = iterations, rtol

    def correction(
        self, x0: Tensor, vjp: Callable[[Tensor], Tensor], observation: Observation, alpha: float, sigma: float
    ) -> tuple[Tensor, int]:
        operator, scale = observation.operator, sigma**2 / alpha

        def gram(u: Tensor) -> Tensor:
            return scale * operator(vjp(operator.adjoint(u))) + observation.sigma**2 * u

        weighted, products = conjugate_gradients(gram, observation.residual(x0), self.iterations, self.rtol)
        return scale * vjp(operator.adjoint(weighted)), products + 1


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], b: Tensor, iterations: int, rtol: float
) -> tuple[Tensor, int]:
    """Solve ``M x = b`` for a batch of positive definite systems.

    A system ends at a relative residual of ``rtol`` or, where a network's Jacobian makes M indefinite, at a direction of
    non-positive curvature; its solution does not depend on the others.

    Args:
        apply: M, (B, ...) -> (B, ...).
        b: (B, ...).
        iterations: largest number of iterations.
        rtol: see above.

    Returns:
        The solutions, (B, ...), and the number of products with M.
    """

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1)

    x, r, p = torch.zeros_like(b), b, b
    rr = dot(r, r)
    limit, active = rtol**2 * rr, torch.ones_like(rr, dtype=torch.bool)
    for i in range(iterations):
        active = active & (rr > limit)
        if not bool(active.any()):
            return x, i
        Mp = apply(p)
        curvature = dot(p, Mp)
        active = active & (curvature > 0)
        step = expand(torch.where(active, rr / curvature, 0.0), b)
        x, r = x + step * p, r - step * Mp
        previous, rr = rr, dot(r, r)
        p = r + expand(torch.where(active, rr / previous, 0.0), b) * p
    return x, iterations
