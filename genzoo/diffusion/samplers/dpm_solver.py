"""DPM-Solver++.

References:
    Lu et al., "DPM-Solver++", 2022, https://arxiv.org/abs/2211.01095 (algorithm 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genzoo.diffusion.samplers.chain import ChainSampler, CountedDenoiser, StepCoefficients, axpby


class DPMSolver(ChainSampler):
    """DPM-Solver++(2M): a second-order multistep solver for x0-prediction in ``lambda = log(alpha/sigma)``.

        x_s = sigma_s/sigma_t x_t - alpha_s (e^{-h} - 1) D,    D = x0_t + h/(2 h') (x0_t - x0_t'),    h = lambda_s - lambda_t

    with ``t', h'`` of the previous step (Lu et al. 2022, algorithm 2). The first step is of first order; the last, where h
    is infinite, returns the estimate of the data. Steps uniform in the time of a diffusion path are very uneven in lambda near
    the data, where a second-order method is worse than DDIM.

    Args:
        rho: steps are uniform in (sigma/alpha)^(1/rho); None for the time grid of the schedule.
        steps, clip, trajectory: as in ``Sampler``.
    """

    stochastic = False

    def __init__(self, steps: int = 20, rho: float | None = 7.0, clip: bool = True, trajectory: bool = False):
        super().__init__(steps, clip, trajectory)
        if rho is not None and rho < 1:
            raise ValueError(f"rho must be at least 1, or null for the time grid of the schedule, not {rho}")
        self.rho = rho

    def step(self, denoise: CountedDenoiser, x_t: Tensor, c: StepCoefficients, rng: torch.Generator | None) -> Tensor:
        before = denoise.previous
        x0, _ = denoise(x_t, c)
        if c.last:
            return x0
        D = x0 if before is None else torch.lerp(before.x0, x0, 1 + c.h / (2 * before.step.h))
        return axpby(c.sigma_s / c.sigma_t, x_t, -c.alpha_s * math.expm1(-c.h), D)
