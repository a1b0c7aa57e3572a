r"""Distributions of training times, which weight the noise levels of the denoising loss.

References:
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364 (table 1: log-normal noise).
    Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", 2024,
    https://arxiv.org/abs/2403.03206 (section 3.1: logit-normal times).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from genzoo.diffusion.schedules import Schedule
from genzoo.numerics.random import rand, randn


class NoiseLevels(ABC):
    """A distribution of training times."""

    @abstractmethod
    def sample(self, n: int, schedule: Schedule, rng: torch.Generator | None, device: torch.device) -> Tensor:
        """Draw ``n`` times in [t_min, t_max] of the schedule, (n,) float64."""


class UniformTime(NoiseLevels):
    """Uniform times on [t_min, t_max]."""

    def sample(self, n: int, schedule: Schedule, rng: torch.Generator | None, device: torch.device) -> Tensor:
        u = rand((n,), rng=rng, device=device, dtype=torch.float64)
        return schedule.t_min + (schedule.t_max - schedule.t_min) * u


class LogitNormalTime(NoiseLevels):
    """Logit-normal times, ``logit t ~ N(mean, std^2)``, concentrated in the middle of the path."""

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        if std <= 0:
            raise ValueError(f"std must be positive, not {std}")
        self.mean, self.std = mean, std

    def sample(self, n: int, schedule: Schedule, rng: torch.Generator | None, device: torch.device) -> Tensor:
        z = randn((n,), rng=rng, device=device, dtype=torch.float64)
        return torch.sigmoid(self.mean + self.std * z).clamp(schedule.t_min, schedule.t_max)


class LogNormalRatio(NoiseLevels):
    """Log-normal noise levels, ``log(sigma/alpha) ~ N(mean, std^2)``; P_mean and P_std of Karras et al."""

    def __init__(self, mean: float = -1.2, std: float = 1.2):
        if std <= 0:
            raise ValueError(f"std must be positive, not {std}")
        self.mean, self.std = mean, std

    def sample(self, n: int, schedule: Schedule, rng: torch.Generator | None, device: torch.device) -> Tensor:
        z = randn((n,), rng=rng, device=device, dtype=torch.float64)
        return schedule.time_of(torch.exp(self.mean + self.std * z)).clamp(schedule.t_min, schedule.t_max)
