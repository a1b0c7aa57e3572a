r"""Schedules of a Gaussian path: how much data, ``alpha(t)``, and how much noise, ``sigma(t)``, at each time.

The clock of this project runs from data to noise, ``t = 0`` is data and ``t = 1`` is noise:

    x_t = alpha(t) x + sigma(t) eps,   eps ~ N(0, I),   alpha(0) = 1, sigma(0) = 0.

A schedule computes in float64 whatever it is given; who uses its numbers casts them down.

References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239 (section 4).
    Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, https://arxiv.org/abs/2102.09672
    (eq. 17).
    Lipman et al., "Flow Matching for Generative Modeling", 2023, https://arxiv.org/abs/2210.02747 (eq. 20, optimal
    transport).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """Values of a schedule at some times, each of the shape of ``t``, float64."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor  # time derivative of alpha
    d_sigma: Tensor  # time derivative of sigma, inf where it has no limit


class Schedule(ABC):
    """A pair of smooth functions ``alpha(t)`` and ``sigma(t)`` on [0, 1]."""

    t_min: float = 1e-5  # the least time at which every quantity is well-conditioned in float32
    t_max: float = 1.0 - 1e-5  # the greatest

    @abstractmethod
    def at(self, t: Tensor) -> Coefficients:
        """Evaluate the schedule.

        Args:
            t: times in [0, 1], any shape.
        """

    def times(self, steps: int | None = None) -> Tensor:
        """List the times that a sampler visits, from noise to data: (steps + 1,) float64, ending at t = 0."""
        if steps is None or steps < 1:
            raise ValueError(f"a schedule in continuous time needs steps >= 1, not {steps}")
        return torch.cat([torch.linspace(self.t_max, self.t_min, steps, dtype=torch.float64), torch.zeros(1).double()])

    @property
    def prior_std(self) -> float:
        """Standard deviation of the noise that sampling starts from."""
        return float(self.at(torch.ones(())).sigma)


class VariancePreserving(Schedule):
    """A schedule with ``alpha^2 + sigma^2 = 1``, given by ``log alpha(t)``."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``log alpha(t)`` and its time derivative, float64."""

    def at(self, t: Tensor) -> Coefficients:
        log_alpha, slope = self.log_alpha(t.double())
        alpha = log_alpha.exp()
        sigma = torch.expm1(2 * log_alpha).abs().sqrt()  # 1 - alpha^2, and +0 rather than -0 at the data
        return Coefficients(alpha, sigma, alpha * slope, -(alpha**2) * slope / sigma)

    @property
    def prior_std(self) -> float:
        """One: the chain ends as good as in N(0, I), and sampling starts from exactly that."""
        return 1.0


class DiscreteSchedule(VariancePreserving):
    r"""The variance-preserving schedule of a chain of T steps with variances ``beta_0 .. beta_{T-1}``.

    Index ``i`` of the chain is the time ``t = (i + 1)/T``, where ``alpha^2 = prod_{j <= i} (1 - beta_j)`` exactly;
    between two steps ``log alpha`` is linear in ``t``, so that solvers in continuous time may stop anywhere.

    Args:
        betas: (T,), each in (0, 1).
    """

    def __init__(self, betas: Tensor):
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be a vector of numbers in (0, 1)")
        self.num_steps = len(betas)
        self.t_min = 1.0 / self.num_steps
        self.t_max = 1.0
        self.betas = betas.double()
        steps = 0.5 * torch.log1p(-self.betas)
        self._log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])

    def log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self._log_alpha.to(t.device)
        position = t * self.num_steps
        # The table answers exactly on the grid: (i + 1)/T times T may miss an integer by one rounding.
        nearest = position.round()
        position = torch.where((position - nearest).abs() < 1e-9, nearest, position)
        left = position.floor().long().clamp_(0, self.num_steps - 1)
        step = table[left + 1] - table[left]
        return table[left] + (position - left) * step, step * self.num_steps

    def times(self, steps: int | None = None) -> Tensor:
        """Visit the whole chain, or the indices 0, T/steps, 2T/steps, ... of it (rounded down), and then t = 0."""
        steps = self.num_steps if steps is None else steps
        if not 1 <= steps <= self.num_steps:
            raise ValueError(f"steps must be in 1..{self.num_steps}, the length of the chain, not {steps}")
        indices = torch.arange(steps).flip(0) * self.num_steps // steps
        return torch.cat([(indices + 1).double() / self.num_steps, torch.zeros(1).double()])


class LinearSchedule(DiscreteSchedule):
    """DDPM's schedule: betas rise linearly from 1e-4 to 2e-2 at T = 1000, and scale by 1000/T otherwise."""

    def __init__(self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2):
        if num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, not {num_steps}")
        scale = 1000 / num_steps
        betas = torch.linspace(beta_start * scale, beta_end * scale, num_steps, dtype=torch.float64)
        super().__init__(betas.clamp(max=0.999))


class CosineSchedule(DiscreteSchedule):
    """Improved DDPM's schedule: ``abar(t) = cos^2((t + s)/(1 + s) pi/2)``, betas capped at 0.999."""

    def __init__(self, num_steps: int = 1000, s: float = 0.008):
        if num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, not {num_steps}")
        t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        abar = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
        super().__init__((1 - abar[1:] / abar[:-1]).clamp(max=0.999))
