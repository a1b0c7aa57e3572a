"""The interface of samplers, their initial noise and the noise levels of Karras et al."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from genzoo.conditions import Conditioner
from genzoo.diffusion.denoiser import Denoiser, PathModel
from genzoo.diffusion.schedules import Schedule
from genzoo.model import Samples
from genzoo.numerics.random import randn

RATIO_MAX = 80.0  # sigma/alpha beyond which the signal of data on [-1, 1] is negligible (Karras et al. 2022)

Trajectory = Iterator[tuple[Tensor, int]]  # states, (n, *shape), and network evaluations per sample so far


class Sampler(ABC):
    """A map from noise to data.

    Gradients flow through every sampler but ``AdaptiveODE`` to the weights and conditions of the denoiser, unless under
    ``torch.no_grad`` as in ``GenerativeModel.sample``.

    Args:
        steps: number of steps; None for all steps of a discrete chain.
        clip: whether to clamp estimates of images to [-1, 1].
        trajectory: whether to return all states.
    """

    stochastic: bool
    evaluates: type = Denoiser  # what is sampled from

    def __init__(self, steps: int | None = None, clip: bool = True, trajectory: bool = False):
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        self.steps, self.clip, self.trajectory = steps, clip, trajectory

    def check(self, model: PathModel) -> None:
        """Check that the sampler applies to a model.

        Raises:
            ValueError: for a flow map where denoisers are sampled, and conversely.
        """
        if not isinstance(model, self.evaluates):
            one = "denoisers" if self.evaluates is Denoiser else "flow maps, such as mean_flow and consistency"
            other = "jump" if self.evaluates is Denoiser else "heun"
            raise ValueError(
                f"{type(self).__name__} samples from {one}, and {type(model).__name__} is none: choose sampler={other}"
            )

    @abstractmethod
    def iterate(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Trajectory:
        """Yield the states from standard normal noise, (n, *shape), to data.

        Raises:
            ValueError: before the first state, for an unsupported path.
        """

    def state_times(self, denoiser: Denoiser) -> list[float] | None:
        """Return the time of each state that ``iterate`` yields, decreasing to 0; None if they differ between samples."""
        return None

    def __call__(
        self, denoiser: Denoiser, n: int, y: Tensor | None = None, rng: torch.Generator | None = None
    ) -> Samples:
        """Draw ``n`` samples.

        Args:
            denoiser: any denoiser.
            n: number of samples.
            y: conditions, (n, *condition.shape), null values included; None for the null value.
            rng: source of randomness.

        Raises:
            ValueError: for a stochastic sampler on a path with coupled noise and data, for conditions of another number,
                type or domain than the denoiser's, and where ``check`` raises.
        """
        self.check(denoiser)
        if y is not None:
            Conditioner(denoiser.condition).check(y, n, allow_null=True, synchronize=True)
        if self.stochastic and not denoiser.path.independent:
            raise ValueError(
                f"{type(self).__name__} is stochastic: a path with coupled noise and data needs an ODE sampler"
            )
        noise = randn((n, *denoiser.event.shape), rng=rng, device=denoiser.device, dtype=denoiser.dtype)
        visited = []
        for x, nfe in self.iterate(denoiser, noise, y, rng):  # noqa: B007
            if self.trajectory:
                visited.append(x)
        return Samples(x, nfe, torch.stack(visited) if self.trajectory else None)


def initial_state(schedule: Schedule, noise: Tensor, t: float) -> Tensor:
    """Scale standard normal noise to the noise level of the initial time t, or to the prior."""
    if t >= schedule.t_max:
        return schedule.prior_std * noise
    return float(schedule.at(torch.tensor(t, dtype=torch.float64)).sigma) * noise


def karras_sigmas(schedule: Schedule, steps: int, rho: float, ratio_max: float) -> Tensor:
    """Return sigma/alpha uniform in its ``rho``-th root, from t_max, at most ``ratio_max``, to t_last: (steps,).

    Karras et al. 2022, eq. 5, with rho = 7.
    """
    ends = schedule.ratio(torch.tensor([schedule.t_max, schedule.t_last], dtype=torch.float64)).clamp(max=ratio_max)
    first, last = ends ** (1 / rho)
    return (first + torch.linspace(0, 1, steps, dtype=torch.float64) * (last - first)) ** rho
