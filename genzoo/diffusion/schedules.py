r"""Noise schedules: the coefficients ``alpha(t)`` and ``sigma(t)`` of a Gaussian path.

Time runs from data, ``t = 0``, to noise, ``t = 1``:

    x_t = alpha(t) x + sigma(t) eps,   eps ~ N(0, I),   alpha(0) = 1, sigma(0) = 0.

All computations are in float64; callers cast the results.

References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239 (section 4).
    Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, https://arxiv.org/abs/2102.09672
    (eq. 17).
    Song et al., "Score-Based Generative Modeling through SDEs", 2021, https://arxiv.org/abs/2011.13456 (eq. 9, 11 and
    appendix B, C: VE, VP and sub-VP).
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364 (table 1, eq. 5).
    Lipman et al., "Flow Matching for Generative Modeling", 2023, https://arxiv.org/abs/2210.02747 (eq. 20, optimal
    transport).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class Coefficients(NamedTuple):
    """Values of a schedule at times ``t``, each of the shape of ``t``, float64."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor  # time derivative of alpha
    d_sigma: Tensor  # time derivative of sigma, inf where it diverges


class Schedule(nn.Module, ABC):
    """Smooth functions ``alpha(t)`` and ``sigma(t)`` on [0, 1] with a strictly increasing ratio ``sigma/alpha``.

    ``coordinates`` is the integration variable of the probability-flow ODE: the time if velocities are finite at both ends,
    otherwise the noise-to-data ratio ``sigma/alpha``, see ``genzoo.diffusion.probability_flow``.
    """

    t_min: float = 1e-5  # smallest time at which all conversions are well-conditioned in float32
    t_max: float = 1.0 - 1e-5  # largest such time
    t_first: float = 1.0  # first time of a sampling chain, at most t_max
    t_last: float = 1e-5  # last time before the final denoising step to t = 0
    coordinates: Literal["time", "ratio"] = "ratio"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Schedule:
        """Move buffers with the model without casting them: a schedule is float64 in a model of any precision."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @abstractmethod
    def at(self, t: Tensor) -> Coefficients:
        """Evaluate the schedule.

        Args:
            t: times in [0, 1], any shape.
        """

    @abstractmethod
    def time_of(self, ratio: Tensor) -> Tensor:
        """Return the time at which ``sigma/alpha`` equals ``ratio``, float64, clamped to the range of the schedule."""

    def ratio(self, t: Tensor) -> Tensor:
        """Return ``sigma/alpha``, float64: the noise level of ``x_t/alpha``."""
        c = self.at(t)
        return c.sigma / c.alpha

    def times(self, steps: int | None = None) -> Tensor:
        """Return the time grid of a sampler, from noise to data: (steps + 1,) float64, ending at t = 0."""
        if steps is None or steps < 1:
            raise ValueError(f"a schedule in continuous time needs steps >= 1, not {steps}")
        first = min(self.t_first, self.t_max)
        return torch.cat([torch.linspace(first, self.t_last, steps, dtype=torch.float64), torch.zeros(1).double()])

    @property
    def prior_std(self) -> float:
        """Standard deviation of the prior, the initial noise of sampling."""
        return float(self.at(torch.ones(())).sigma)


class CondOT(Schedule):
    """The straight path of flow matching, ``alpha = 1 - t``, ``sigma = t`` (Lipman et al. 2023, eq. 20, sigma_min = 0)."""

    coordinates = "time"
    t_first = 80 / 81  # where sigma/alpha is 80: its SDE, unlike its ODE, is singular at t = 1
    t_last = 1e-3

    def at(self, t: Tensor) -> Coefficients:
        t = t.double()
        one = torch.ones_like(t)
        return Coefficients(1 - t, t, -one, one)

    def time_of(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio.double())

    @property
    def prior_std(self) -> float:
        """1: the path ends in N(0, I)."""
        return 1.0


class VESchedule(Schedule):
    """The variance-exploding SDE: ``alpha = 1``, ``sigma^2 = sigma_min^2 (r^{2t} - 1)``, ``r = sigma_max/sigma_min``.

    The transition variance of the SDE (Song et al. 2021, eq. 29-30); often written without the -1, with noise at t = 0. Except
    for the smallest noise levels, ``log sigma`` is affine in t.
    """

    t_max = 1.0

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        super().__init__()
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min must lie between 0 and sigma_max, not {sigma_min} and {sigma_max}")
        self.sigma_min, self.rate = sigma_min, math.log(sigma_max / sigma_min)

    def at(self, t: Tensor) -> Coefficients:
        t = t.double()
        sigma = self.sigma_min * torch.expm1(2 * self.rate * t).sqrt()
        d_sigma = self.sigma_min**2 * self.rate * torch.exp(2 * self.rate * t) / sigma
        return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), d_sigma)

    def time_of(self, ratio: Tensor) -> Tensor:
        return (torch.log1p((ratio.double() / self.sigma_min) ** 2) / (2 * self.rate)).clamp(max=1.0)


class EDMSchedule(Schedule):
    """The EDM schedule of Karras et al.: ``alpha = 1``, ``sigma = sigma_max t^rho``.

    Times are uniform in ``sigma^{1/rho}``, as are the steps of their sampler (eq. 5).
    """

    t_max = 1.0

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        super().__init__()
        if not 0 < sigma_min < sigma_max or rho < 1:
            raise ValueError(
                f"sigma_min must lie between 0 and sigma_max, and rho be at least 1, not {sigma_min}, {sigma_max}, {rho}"
            )
        self.sigma_max, self.rho = sigma_max, rho
        self.t_min = self.t_last = (sigma_min / sigma_max) ** (1 / rho)

    def at(self, t: Tensor) -> Coefficients:
        t = t.double()
        sigma, d_sigma = self.sigma_max * t**self.rho, self.sigma_max * self.rho * t ** (self.rho - 1)
        return Coefficients(torch.ones_like(t), sigma, torch.zeros_like(t), d_sigma)

    def time_of(self, ratio: Tensor) -> Tensor:
        return ((ratio.double() / self.sigma_max) ** (1 / self.rho)).clamp(max=1.0)


class LogAlphaSchedule(Schedule):
    """A schedule defined by ``log alpha(t)``."""

    @abstractmethod
    def log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``log alpha(t)`` and its time derivative, float64."""

    @abstractmethod
    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """Return the time at which ``log alpha`` has a given value, float64, clamped to the range of the schedule."""

    @property
    def prior_std(self) -> float:
        """1: the path ends approximately in N(0, I), the prior of sampling."""
        return 1.0


class VariancePreserving(LogAlphaSchedule):
    """A schedule with ``alpha^2 + sigma^2 = 1``."""

    def at(self, t: Tensor) -> Coefficients:
        log_alpha, slope = self.log_alpha(t.double())
        alpha = log_alpha.exp()
        sigma = torch.expm1(2 * log_alpha).abs().sqrt()  # 1 - alpha^2, and +0 rather than -0 at t = 0
        d_alpha = alpha * slope
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def time_of(self, ratio: Tensor) -> Tensor:
        return self.time_of_log_alpha(-0.5 * torch.log1p(ratio.double() ** 2))


class _LinearBeta(LogAlphaSchedule):
    """``log alpha(t) = -1/2 int_0^t beta``, with beta linear from ``beta_min`` to ``beta_max``."""

    t_max = 1.0
    t_last = 1e-3  # Song et al. 2021, appendix C

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        super().__init__()
        if not 0 < beta_min < beta_max:
            raise ValueError(f"beta_min must lie between 0 and beta_max, not {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        rise = self.beta_max - self.beta_min
        return -0.5 * t * (self.beta_min + 0.5 * rise * t), -0.5 * (self.beta_min + rise * t)

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        # The positive root of rise/2 t^2 + beta_min t + 2 log alpha = 0, in the form without cancellation near t = 0.
        integral, rise = -2 * log_alpha, self.beta_max - self.beta_min
        return (2 * integral / (self.beta_min + (self.beta_min**2 + 2 * rise * integral).sqrt())).clamp(max=1.0)


class VPSchedule(_LinearBeta, VariancePreserving):
    """The variance-preserving SDE (Song et al. 2021, eq. 11), the limit of DDPM as T goes to infinity."""


class SubVPSchedule(_LinearBeta):
    """The sub-VP SDE: alpha of VP, and ``sigma = 1 - alpha^2`` (Song et al. 2021, eq. 13, 29)."""

    t_min = 1e-4  # sigma is 1e-5 here, close to the float32 resolution of the data

    def at(self, t: Tensor) -> Coefficients:
        log_alpha, slope = self.log_alpha(t.double())
        alpha = log_alpha.exp()
        return Coefficients(alpha, -torch.expm1(2 * log_alpha), alpha * slope, -2 * alpha**2 * slope)

    def time_of(self, ratio: Tensor) -> Tensor:
        # ratio = 1/alpha - alpha = 2 sinh(-log alpha)
        return self.time_of_log_alpha(-torch.asinh(ratio.double() / 2))


class DiscreteSchedule(VariancePreserving):
    r"""The variance-preserving schedule of a chain of T steps with variances ``beta_0 .. beta_{T-1}``.

    Index ``i`` of the chain is the time ``t = (i + 1)/T``, where ``alpha^2 = prod_{j <= i} (1 - beta_j)`` exactly. Between
    two indices ``log alpha`` is linear in ``t``, for solvers in continuous time.

    Args:
        betas: (T,), each in (0, 1).
    """

    betas: Tensor
    _log_alpha: Tensor
    _steps: Tensor

    def __init__(self, betas: Tensor):
        super().__init__()
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be a vector of numbers in (0, 1)")
        self.num_steps = len(betas)
        self.t_min = self.t_last = 1.0 / self.num_steps
        self.t_max = 1.0
        self.register_buffer("betas", betas.double(), persistent=False)
        steps = 0.5 * torch.log1p(-self.betas)
        log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        self.register_buffer("_log_alpha", log_alpha, persistent=False)
        self.register_buffer("_steps", log_alpha.diff(), persistent=False)

    def log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        position = t * self.num_steps
        # Exact on the grid: (i + 1)/T times T may differ from an integer by rounding.
        nearest = position.round()
        position = torch.where((position - nearest).abs() < 1e-9, nearest, position)
        left = position.floor().long().clamp_(0, self.num_steps - 1)
        step = self._steps.to(t.device)[left]
        return self._log_alpha.to(t.device)[left] + (position - left) * step, step * self.num_steps

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        table = self._log_alpha.to(log_alpha.device)
        left = (torch.searchsorted(-table, -log_alpha, right=True) - 1).clamp_(0, self.num_steps - 1)
        fraction = (log_alpha - table[left]) / (table[left + 1] - table[left])
        return (left + fraction.clamp(max=1.0)) / self.num_steps

    def times(self, steps: int | None = None) -> Tensor:
        """Return the full chain, or its indices 0, T/steps, 2T/steps, ... (rounded down), followed by t = 0."""
        steps = self.num_steps if steps is None else steps
        if not 1 <= steps <= self.num_steps:
            raise ValueError(f"steps must be in 1..{self.num_steps}, the length of the chain, not {steps}")
        indices = torch.arange(steps).flip(0) * self.num_steps // steps
        return torch.cat([(indices + 1).double() / self.num_steps, torch.zeros(1).double()])


class LinearSchedule(DiscreteSchedule):
    """The linear schedule of DDPM: betas from 1e-4 to 2e-2 at T = 1000, scaled by 1000/T otherwise."""

    def __init__(self, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 2e-2):
        if num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, not {num_steps}")
        scale = 1000 / num_steps
        betas = torch.linspace(beta_start * scale, beta_end * scale, num_steps, dtype=torch.float64)
        super().__init__(betas.clamp(max=0.999))


class CosineSchedule(DiscreteSchedule):
    """The cosine schedule of Improved DDPM: ``abar(t) = cos^2((t + s)/(1 + s) pi/2)``, betas capped at 0.999."""

    def __init__(self, num_steps: int = 1000, s: float = 0.008):
        if num_steps < 2:
            raise ValueError(f"num_steps must be at least 2, not {num_steps}")
        t = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        abar = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
        super().__init__((1 - abar[1:] / abar[:-1]).clamp(max=0.999))
