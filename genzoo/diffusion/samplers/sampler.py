"""What all samplers share: the call, and the random noise that a trajectory starts from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from genzoo.conditions import Conditioner
from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.schedules import Schedule
from genzoo.model import Samples
from genzoo.numerics.random import randn

RATIO_MAX = 80.0  # of noise to data: beyond it data on [-1, 1] have vanished (Karras et al. 2022)

Trajectory = Iterator[tuple[Tensor, int]]  # states, (n, *shape), and the network evaluations for each sample so far


class Sampler(ABC):
    """A map from noise to data.

    Gradients flow through every sampler but ``AdaptiveODE`` to the denoiser's weights and conditions, unless it is called under
    ``torch.no_grad``, as ``GenerativeModel.sample`` does.

    Args:
        steps: of the trajectory; None for all steps of a discrete chain.
        clip: whether estimates of the data are clamped to [-1, 1] where the data are images.
        trajectory: whether all states are returned too.
    """

    stochastic: bool

    def __init__(self, steps: int | None = None, clip: bool = True, trajectory: bool = False):
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        self.steps, self.clip, self.trajectory = steps, clip, trajectory

    @abstractmethod
    def iterate(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Trajectory:
        """Yield the states from standard normal noise, (n, *shape), to data.

        Raises:
            ValueError: for a path that this sampler does not support, before the first state.
        """

    def __call__(
        self, denoiser: Denoiser, n: int, y: Tensor | None = None, rng: torch.Generator | None = None
    ) -> Samples:
        """Draw ``n`` samples.

        Args:
            denoiser: any, trained or wrapped.
            n: number of samples.
            y: conditions, (n, *condition.shape), null values included; None for the null value.
            rng: source of all noise.

        Raises:
            ValueError: for a stochastic sampler on a path whose noise is paired with its data, and for conditions of another
                number, type or domain than the denoiser's.
        """
        if y is not None:
            Conditioner(denoiser.condition).check(y, n, allow_null=True, wait=True)
        if self.stochastic and not denoiser.path.independent:
            raise ValueError(f"{type(self).__name__} is stochastic: a path with paired noise needs an ODE sampler")
        noise = randn((n, *denoiser.event.shape), rng=rng, device=denoiser.device, dtype=denoiser.dtype)
        visited = []
        for x, nfe in self.iterate(denoiser, noise, y, rng):  # noqa: B007
            if self.trajectory:
                visited.append(x)
        return Samples(x, nfe, torch.stack(visited) if self.trajectory else None)


def initial_state(schedule: Schedule, noise: Tensor, t: float) -> Tensor:
    """Scale standard normal noise to the start of a trajectory: the prior, or the noise of a time before the last."""
    if t >= schedule.t_max:
        return schedule.prior_std * noise
    return float(schedule.at(torch.tensor(t, dtype=torch.float64)).sigma) * noise


def karras_sigmas(schedule: Schedule, steps: int, rho: float, ratio_max: float) -> Tensor:
    """Spread sigma/alpha evenly over its ``rho``-th root, from the first, at most ``ratio_max``, to the last: (steps,).

    Karras et al. 2022, eq. 5, with rho = 7.
    """
    ends = schedule.ratio(torch.tensor([schedule.t_max, schedule.t_last], dtype=torch.float64)).clamp(max=ratio_max)
    first, last = ends ** (1 / rho)
    return (first + torch.linspace(0, 1, steps, dtype=torch.float64) * (last - first)) ** rho
