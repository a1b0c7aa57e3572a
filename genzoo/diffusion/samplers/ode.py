"""Samplers that solve the probability-flow ODE, by methods of fixed and of adaptive steps.

They integrate in its natural coordinates, see ``genzoo.diffusion.probability_flow``: in time for flow matching, in the ratio
r = sigma/alpha for diffusion, where steps are spread evenly over ``r^{1/rho}``.

References:
    Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
    https://arxiv.org/abs/2206.00364 (algorithm 1, eq. 5).
"""

from __future__ import annotations

import itertools
from abc import abstractmethod

import torch
from torch import Tensor

from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.probability_flow import ProbabilityFlowODE
from genzoo.diffusion.samplers.sampler import RATIO_MAX, Sampler, Trajectory, initial_state, karras_sigmas


class Solver(Sampler):
    """A sampler that integrates the probability-flow ODE in steps of a fixed method.

    In time coordinates steps are equal. In the ratio r = sigma/alpha they are spread evenly over ``r^{1/rho}`` from the
    prior's, but at most ``ratio_max``, down to the schedule's last, from where Euler's step to r = 0 takes the estimate of
    the data (Karras et al. 2022, eq. 5).

    Args:
        steps: how many.
        rho: see above; 7 as Karras et al. found best.
        ratio_max: where to start; beyond 80 data on [-1, 1] have vanished in the noise.
        clip: whether the result is clamped to [-1, 1] where the data are images; the ODE on the way is left smooth.
        trajectory: as in ``Sampler``.
    """

    stochastic = False
    halfway = False  # whether a step asks for the drift halfway too

    def __init__(
        self,
        steps: int = 18,
        rho: float = 7.0,
        ratio_max: float = RATIO_MAX,
        clip: bool = True,
        trajectory: bool = False,
    ):
        super().__init__(steps, clip, trajectory)
        if rho < 1 or ratio_max <= 0:
            raise ValueError(f"rho must be at least 1 and ratio_max positive, not {rho} and {ratio_max}")
        self.rho, self.ratio_max = rho, ratio_max

    def grid(self, ode: ProbabilityFlowODE) -> list[float]:
        """List the values of the ODE's variable, from noise to data, steps + 1 numbers ending at 0."""
        assert self.steps is not None
        if ode.in_time:
            return torch.linspace(1, 0, self.steps + 1, dtype=torch.float64).tolist()
        return [*karras_sigmas(ode.schedule, self.steps, self.rho, self.ratio_max).tolist(), 0.0]

    def iterate(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Trajectory:
        ode = ProbabilityFlowODE(denoiser, y)
        grid = self.grid(ode)
        halfway = [(u + v) / 2 for u, v in itertools.pairwise(grid)] if self.halfway else []
        scales = ode.visit([*grid, *halfway], noise)
        x = initial_state(denoiser.path.schedule, noise, ode.time_at(grid[0]))
        yield x, 0
        z = x / scales[0]
        for (u, v), scale in zip(itertools.pairwise(grid), scales[1:], strict=False):
            z = self.step(ode, z, u, v)
            x = z if ode.in_time else scale * z
            if v == 0 and self.clip and denoiser.event.levels is not None:
                x = x.clamp(-1, 1)
            yield x, ode.nfe

    @abstractmethod
    def step(self, ode: ProbabilityFlowODE, z: Tensor, u: float, v: float) -> Tensor:
        """Go from the variable's value u to v."""


class Euler(Solver):
    """Euler's method, of first order; on a diffusion's path its steps are DDIM's."""

    def step(self, ode: ProbabilityFlowODE, z: Tensor, u: float, v: float) -> Tensor:
        return torch.add(z, ode.drift(u, z), alpha=v - u)


class Midpoint(Solver):
    """The midpoint method, of second order: two evaluations a step."""

    halfway = True

    def step(self, ode: ProbabilityFlowODE, z: Tensor, u: float, v: float) -> Tensor:
        slope = ode.drift(u, z)
        if v == 0 and not ode.in_time:
            return torch.add(z, slope, alpha=v - u)
        middle = torch.add(z, slope, alpha=(v - u) / 2)
        return torch.add(z, ode.drift((u + v) / 2, middle), alpha=v - u)


class Heun(Solver):
    """Heun's method, the trapezoidal rule with Euler's predictor, of second order: two evaluations a step.

    In the ratio's coordinates the last step, to r = 0, is Euler's, so that N steps take 2N - 1 evaluations (Karras et al.
    2022, algorithm 1).
    """

    def step(self, ode: ProbabilityFlowODE, z: Tensor, u: float, v: float) -> Tensor:
        slope = ode.drift(u, z)
        ahead = torch.add(z, slope, alpha=v - u)
        if v == 0 and not ode.in_time:
            return ahead
        return torch.add(z, slope + ode.drift(v, ahead), alpha=(v - u) / 2)


class AdaptiveODE(Sampler):
    """The probability-flow ODE to a tolerance, by Dormand and Prince's method, each sample at its own pace.

    Rejected steps count as evaluations; what is reported is the count of the slowest sample of the batch. On a
    diffusion's path the ODE ends at the schedule's last time, and the estimate of the data is taken there. No gradient flows
    through it.

    Args:
        rtol, atol: of the solver.
        clip: whether the result is clamped to [-1, 1] where the data are images.
        trajectory: whether the first and the last state are returned too.
        steps: taken so that a grid of samplers and steps may hold this one; it chooses its own, and nothing depends on it.
    """

    stochastic = False

    def __init__(
        self,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        clip: bool = True,
        trajectory: bool = False,
        steps: int | None = None,
    ):
        super().__init__(None, clip, trajectory)
        if rtol <= 0 or atol <= 0:
            raise ValueError(f"rtol and atol must be positive, not {rtol} and {atol}")
        self.rtol, self.atol = rtol, atol

    def iterate(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Trajectory:
        ode = ProbabilityFlowODE(denoiser, y)
        first = ode.ends[1]
        x = initial_state(denoiser.path.schedule, noise, ode.time_at(first))
        yield x, 0
        x = self._solve(ode, x / ode.scales([first])[0], first)
        yield (x.clamp(-1, 1) if self.clip and denoiser.event.levels is not None else x), ode.nfe

    @torch.no_grad()
    def _solve(self, ode: ProbabilityFlowODE, z: Tensor, first: float) -> Tensor:
        """Follow the ODE from its first value to the data; a gradient of the last evaluation alone would be a wrong one."""
        last = 0.0 if ode.in_time else ode.variable(ode.schedule.t_last)
        z = ode.solve(z, first, last, self.rtol, self.atol)
        return z if ode.in_time else z - last * ode.drift(last, z)  # at r = 0 the state is x itself
