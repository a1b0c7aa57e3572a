r"""Sampling from a flow map in one or few evaluations.

One step maps noise to data. Several follow a decreasing grid of times t, s, ...: a jump along the ODE from t to a time
tau <= s, and fresh noise from tau to s,

    x_tau = X(x_t, t, tau),      x_s ~ q(x_s | x_tau),      r_tau = sqrt(1 - gamma^2) r_s,      r = sigma/alpha.

At gamma = 0 there is no noise, and exact jumps compose to one. At gamma = 1 every jump ends at the data: multistep consistency
sampling, the only choice for a consistency function. If the map is exact, each x_s has the marginal distribution of its time.

References:
    Song, Dhariwal, Chen, Sutskever, "Consistency Models", 2023, https://arxiv.org/abs/2303.01469 (algorithm 1).
    Kim et al., "Consistency Trajectory Models", 2024, https://arxiv.org/abs/2310.02279 (algorithm 3, gamma-sampling).
    Geng et al., "Mean Flows for One-step Generative Modeling", 2025, https://arxiv.org/abs/2505.13447 (algorithm 2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from genzoo.diffusion.flow_map import AnytimeFlowMap, FlowMap
from genzoo.diffusion.path import batch_times
from genzoo.diffusion.samplers.chain import axpby
from genzoo.diffusion.samplers.sampler import Sampler, Trajectory, initial_state
from genzoo.numerics.random import randn


class Jump(Sampler):
    """Jumps of a flow map, with times uniform between noise and data.

    Args:
        steps: number of jumps, each an evaluation.
        gamma: fraction of the noise of a later step that is fresh, in [0, 1]; None for 0, or for a consistency function 1.
        clip: whether to clamp images to [-1, 1] where a jump ends at the data.
        trajectory: as in ``Sampler``.
    """

    evaluates = FlowMap

    def __init__(self, steps: int = 1, gamma: float | None = None, clip: bool = True, trajectory: bool = False):
        super().__init__(steps, clip, trajectory)
        if gamma is not None and not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], or null, not {gamma}")
        self.gamma = gamma

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        """Whether fresh noise is requested."""
        return bool(self.gamma) and self.steps != 1

    def grid(self, model: FlowMap) -> list[float]:
        """Return the times of the states, from noise to data: steps + 1 values."""
        assert self.steps is not None
        data, noise = model.ends
        return torch.linspace(noise, data, self.steps + 1, dtype=torch.float64).tolist()

    def state_times(self, denoiser: Any) -> list[float]:
        return [*self.grid(denoiser)[:-1], 0.0]

    def iterate(self, denoiser: Any, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Trajectory:
        self.check(denoiser)
        gamma = self._gamma(denoiser)
        schedule, data = denoiser.path.schedule, denoiser.ends[0]
        grid = self.grid(denoiser)
        kept = math.sqrt(1 - gamma**2)
        s = torch.tensor(grid[1:], dtype=torch.float64)
        tau = s if gamma == 0 else schedule.time_of(kept * schedule.ratio(s)).clamp(min=data)
        tau[-1] = data
        alpha_s, sigma_s, alpha, sigma = (
            value.tolist() for time in (s, tau) for value in (schedule.at(time).alpha, schedule.at(time).sigma)
        )
        x = initial_state(schedule, noise, grid[0])
        yield x, 0
        times, ends = batch_times(torch.tensor(grid[:-1], dtype=torch.float64), x), batch_times(tau, x)
        for i, (t, end) in enumerate(zip(times, ends, strict=True)):
            to_data = gamma == 1 or i == len(times) - 1
            if to_data:
                x = denoiser.to_data(x, t, y)
                x = x.clamp(-1, 1) if self.clip and denoiser.event.levels is not None else x
            else:
                x = denoiser.jump(x, t, end, y)
            alpha_ts = alpha_s[i] / alpha[i]
            fresh_var = sigma_s[i] ** 2 - (alpha_ts * sigma[i]) ** 2
            if i < len(times) - 1 and gamma > 0:
                z = randn(x.shape, rng=rng, device=x.device, dtype=x.dtype)
                x = axpby(alpha_ts, x, max(fresh_var, 0.0) ** 0.5, z)
            yield x, (i + 1) * denoiser.evaluations

    def _gamma(self, model: FlowMap) -> float:
        """Return gamma for a flow map.

        Raises:
            ValueError: for a consistency function and gamma < 1.
        """
        if isinstance(model, AnytimeFlowMap):
            return self.gamma or 0.0
        if self.gamma is not None and self.gamma < 1 and self.steps != 1:
            raise ValueError(
                f"{type(model).__name__} maps to the data alone: gamma must be 1, or null, not {self.gamma}"
            )
        return 1.0
