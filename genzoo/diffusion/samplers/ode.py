"""ODE samplers: solvers of the probability-flow ODE with fixed and with adaptive step sizes.

They integrate in its natural coordinates, see ``genzoo.diffusion.probability_flow``: in time for flow matching, in the ratio
r = sigma/alpha for diffusion, with steps uniform in ``r^{1/rho}``.

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
    """A fixed-grid solver of the probability-flow ODE.

    In time, steps are uniform. In the ratio r = sigma/alpha they are uniform in ``r^{1/rho}``, from the ratio of the prior, at
    most ``ratio_max``, to that of ``t_last``; a final Euler step to r = 0 returns the estimate of the data (Karras et al. 2022,
    eq. 5).

    Args:
        steps: number of steps.
        rho: see above; 7 in Karras et al.
        ratio_max: largest initial ratio; beyond 80 the signal of data on [-1, 1] is negligible.
        clip: whether to clamp samples of images to [-1, 1]; the ODE itself is not clipped.
        trajectory: as in ``Sampler``.
    """

    stochastic = False
    uses_midpoint = False  # whether a step evaluates the drift at its midpoint

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
        """Return the grid of u, from noise to data, steps + 1 values ending at 0."""
        assert self.steps is not None
        if ode.in_time:
            return torch.linspace(1, 0, self.steps + 1, dtype=torch.float64).tolist()
        return [*karras_sigmas(ode.schedule, self.steps, self.rho, self.ratio_max).tolist(), 0.0]

    def state_times(self, denoiser: Denoiser) -> list[float]:
        ode = ProbabilityFlowODE(denoiser)
        return [ode.time_at(u) for u in self.grid(ode)]

    def iterate(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Trajectory:
        ode = ProbabilityFlowODE(denoiser, y)
        grid = self.grid(ode)
        midpoints = [(u + v) / 2 for u, v in itertools.pairwise(grid)] if self.uses_midpoint else []
        scales = ode.cache_grid([*grid, *midpoints], noise)
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
        """Integrate from u to v."""


class Euler(Solver):
    """Euler's method, first order; on a diffusion path it is DDIM."""

    def step(self, ode: ProbabilityFlowODE, z: Tensor, u: float, v: float) -> Tensor:
        return torch.add(z, ode.drift(u, z), alpha=v - u)


class Midpoint(Solver):
    """The midpoint method, second order, two evaluations per step."""

    uses_midpoint = True

    def step(self, ode: ProbabilityFlowODE, z: Tensor, u: float, v: float) -> Tensor:
        slope = ode.drift(u, z)
        if v == 0 and not ode.in_time:
            return torch.add(z, slope, alpha=v - u)
        middle = torch.add(z, slope, alpha=(v - u) / 2)
        return torch.add(z, ode.drift((u + v) / 2, middle), alpha=v - u)


class Heun(Solver):
    """Heun's method, the explicit trapezoidal rule, second order, two evaluations per step.

    In the ratio the last step, to r = 0, is an Euler step: N steps take 2N - 1 evaluations (Karras et al. 2022, algorithm 1).
    """

    def step(self, ode: ProbabilityFlowODE, z: Tensor, u: float, v: float) -> Tensor:
        slope = ode.drift(u, z)
        ahead = torch.add(z, slope, alpha=v - u)
        if v == 0 and not ode.in_time:
            return ahead
        return torch.add(z, slope + ode.drift(v, ahead), alpha=(v - u) / 2)


class AdaptiveODE(Sampler):
    """Dormand-Prince with an adaptive step size per sample.

    The reported NFE is the largest of the batch, rejected steps included. On a diffusion path the ODE ends at ``t_last``,
    where the estimate of the data is returned. No gradient flows through it.

    Args:
        rtol, atol: tolerances of the solver.
        clip: whether to clamp samples of images to [-1, 1].
        trajectory: whether to return the initial and the final state too.
        steps: ignored; for sweeps over samplers and steps.
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
        """Solve the ODE from ``first`` to the data, without the gradient, which would be that of the last evaluation alone."""
        last = 0.0 if ode.in_time else ode.variable_at(ode.schedule.t_last)
        z = ode.solve(z, first, last, self.rtol, self.atol)
        return z if ode.in_time else z - last * ode.drift(last, z)  # at r = 0, z = x
