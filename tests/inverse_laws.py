r"""Gaussian distributions of samplers of inverse problems, by matrices, and the exact posterior.

With data N(mu, Sigma) and an exact denoiser ``E[x | x_t] = K x_t + k``, a chain with any affine method is a sequence of affine
maps of Gaussian states, ``x <- F x + f + G n``, of which mean and covariance follow. Nothing here calls the library's
samplers, operators or solvers; ``tests.exact.moments`` measures the same two numbers from the samplers themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from genzoo.diffusion.inverse.operators import LinearOperator
from genzoo.diffusion.schedules import Schedule


class Normal(NamedTuple):
    """A mean, (D,), and a covariance, (D, D)."""

    mean: Tensor
    covariance: Tensor

    def distance(self, other: Normal) -> tuple[float, float]:
        """Largest distance of the means, in standard deviations of ``other``'s widest axis, and of the covariances."""
        scale = float(torch.linalg.matrix_norm(other.covariance, 2))
        mean = float((self.mean - other.mean).abs().max()) / max(scale, 1e-12) ** 0.5
        return mean, float((self.covariance - other.covariance).abs().max()) / max(scale, 1e-12)


class Dense(LinearOperator):
    """A matrix on vectors."""

    def __init__(self, A: Tensor):
        super().__init__((A.shape[1],), (A.shape[0],))
        self.A = A

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.A.to(x).T

    def adjoint(self, value: Tensor) -> Tensor:
        return value @ self.A.to(value)

    def solve(self, value: Tensor, a: float, b: float) -> Tensor:
        gram = a * self.A @ self.A.T + b * torch.eye(len(self.A)).double()
        return torch.linalg.solve(gram, value.double().T).T.to(value)


@dataclass
class Problem:
    """Data N(mu, Sigma) observed as ``value = A x + s n``."""

    mu: Tensor
    covariance: Tensor
    A: Tensor
    value: Tensor
    s: float

    @property
    def posterior(self) -> Normal:
        """The distribution of x given the value."""
        S, A = self.covariance, self.A
        gain = S @ A.T @ torch.linalg.inv(A @ S @ A.T + self.s**2 * torch.eye(len(A)).double())
        return Normal(self.mu + gain @ (self.value - A @ self.mu), S - gain @ A @ S)

    def prior_estimate(self, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return K and k of ``E[x | x_t] = K x_t + k``, and the covariance of x given x_t."""
        S, eye = self.covariance, torch.eye(len(self.mu)).double()
        K = alpha * S @ torch.linalg.inv(alpha**2 * S + sigma**2 * eye)
        return K, self.mu - alpha * K @ self.mu, S - alpha * K @ S

    def estimate(self, method: str, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """Return K and k of a method's ``E[x | x_t, value]``."""
        K, k, V = self.prior_estimate(alpha, sigma)
        A, noise = self.A, self.s**2 * torch.eye(len(self.A)).double()
        if method == "moment_matching":
            G = V @ A.T @ torch.linalg.inv(A @ V @ A.T + noise)
        elif method == "pigdm":
            r2 = sigma**2 / (alpha**2 + sigma**2)
            G = sigma**2 / alpha * K.T @ A.T @ torch.linalg.inv(r2 * A @ A.T + noise)
        else:
            return K, k
        return K - G @ A @ K, k + G @ (self.value - A @ k)


@dataclass
class Chain:
    """A chain sampler: ancestral ("fixedlarge"), or DDIM with ``eta``."""

    schedule: Schedule
    steps: int | None
    eta: float | None = None  # None for ancestral

    def grid(self) -> list[tuple[float, float]]:
        """List alpha and sigma along the chain, from noise to data."""
        c = self.schedule.at(self.schedule.times(self.steps))
        return list(zip(c.alpha.tolist(), c.sigma.tolist(), strict=True))

    def start(self, D: int) -> Normal:
        first = min(self.schedule.t_first, self.schedule.t_max)
        at_first = float(self.schedule.at(torch.tensor(first).double()).sigma)
        std = self.schedule.prior_std if first >= self.schedule.t_max else at_first
        return Normal(torch.zeros(D).double(), std**2 * torch.eye(D).double())

    def step(self, before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float, float]:
        """Return the coefficients a, b and std of ``x_s = a x_t + b E[x | x_t] + std n``."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = before, after
        added = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        if self.eta is None:
            a, b = alpha_t / alpha_s * sigma_s**2 / sigma_t**2, alpha_s * added / sigma_t**2
            return a, b, 0.0 if sigma_s == 0 else added**0.5
        fresh = self.eta**2 * added * sigma_s**2 / sigma_t**2
        kept = max(sigma_s**2 - fresh, 0.0) ** 0.5 / sigma_t
        return kept, alpha_s - kept * alpha_t, fresh**0.5


def law(problem: Problem, method: str, chain: Chain, zeta: float = 0.0, resamplings: int = 1, jump: int = 1) -> Normal:
    """The law that a method draws from, by propagating mean and covariance through its chain.

    Args:
        problem: the data and the observation.
        method: moment_matching, pigdm, dps (without its norm), repaint, or prior.
        chain: the sampler of the prior.
        zeta: step size of dps.
        resamplings, jump: of repaint.
    """
    eye = torch.eye(len(problem.mu)).double()
    m, P = chain.start(len(eye))
    grid = chain.grid()
    A = problem.A
    known = (A.T @ A).diagonal() > 0.5  # of inpainting
    placed = A.T @ problem.value

    def move(i: int, m: Tensor, P: Tensor) -> Normal:
        (alpha, sigma), (alpha_s, sigma_s) = grid[i], grid[i + 1]
        K, k = problem.estimate(method, alpha, sigma)
        a, b, std = chain.step(grid[i], grid[i + 1])
        F, f, Q = a * eye + b * K, b * k, std**2 * eye
        if method == "dps":
            F, f = F - 2 * zeta * K.T @ A.T @ A @ K, f + 2 * zeta * K.T @ A.T @ (problem.value - A @ k)
        m, P = F @ m + f, F @ P @ F.T + Q
        if method == "repaint":
            away = (~known).double()
            m = torch.where(known, alpha_s * placed, m)
            P = away[:, None] * P * away + sigma_s**2 * torch.diag(known.double())
        return Normal(m, P)

    last = len(grid) - 2
    for start in range(0, last, jump):
        block = range(start, min(start + jump, last))
        for u in range(resamplings):
            for i in block:
                m, P = move(i, m, P)
            if u < resamplings - 1:
                (alpha, sigma), (alpha_s, sigma_s) = grid[block[0]], grid[block[-1] + 1]
                ratio = alpha / alpha_s
                m, P = ratio * m, ratio**2 * P + (sigma**2 - ratio**2 * sigma_s**2) * eye
    return move(last, m, P)
