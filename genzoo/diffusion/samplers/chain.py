r"""Chain samplers: steps ``t -> s`` with ``s < t`` on a decreasing time grid, from noise to data.

Steps are written in the coefficients of the path, and so apply to strided chains and to any schedule:

    alpha_ts = alpha_t / alpha_s,      var_ts = sigma_t^2 - alpha_ts^2 sigma_s^2          (the noise added from s to t)
    q(x_s | x_t, x) = N(alpha_ts sigma_s^2/sigma_t^2 x_t + alpha_s var_ts/sigma_t^2 x,  var_ts sigma_s^2/sigma_t^2 I)

which for a variance-preserving chain is eq. 6-7 of Ho et al. 2020, and in this general form eq. 32 of Kingma et al. 2021.
The last step returns the estimate of the data.

A chain sampler implements ``step``. ``genzoo.diffusion.inverse.RePaint``, for example, replaces the known pixels after each
step of another one.

References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239 (algorithm 2).
    Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021, https://arxiv.org/abs/2107.00630 (appendix A).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.path import GaussianPath, Prediction, batch_times, cast_like, conversion_coefficients
from genzoo.diffusion.samplers.sampler import RATIO_MAX, Sampler, Trajectory, initial_state, karras_sigmas
from genzoo.diffusion.schedules import Schedule

ZERO = torch.zeros(())  # ``torch.add(ZERO, x, alpha=a)`` is faster than ``a * x``, which wraps the scalar in a tensor


def axpby(a: float, x: Tensor, b: float, y: Tensor) -> Tensor:
    """Return ``a x + b y``."""
    return torch.add(ZERO, x, alpha=a).add_(y, alpha=b)


class StepCoefficients(NamedTuple):
    """Scalar coefficients of a step ``t -> s`` of a chain."""

    i: int  # index of the step, from 0
    t: float
    s: float
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    var_ts: float  # variance of the noise between s and t
    posterior_var: float  # variance of q(x_s | x_t, x)
    d_alpha_t: float  # time derivatives at t
    d_sigma_t: float

    @property
    def last(self) -> bool:
        """Whether s = 0, the data."""
        return self.sigma_s == 0.0

    @property
    def h(self) -> float:
        """Step size in ``lambda = log(alpha/sigma)``, infinite for the last step."""
        if self.last:
            return math.inf
        return math.log(self.alpha_s / self.sigma_s) - math.log(self.alpha_t / self.sigma_t)

    def posterior_mean(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """Mean of q(x_s | x_t, x)."""
        of_x_t = self.alpha_t / self.alpha_s * self.sigma_s**2 / self.sigma_t**2
        return axpby(of_x_t, x_t, self.alpha_s * self.var_ts / self.sigma_t**2, x0)

    def eps(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """Return the noise in ``x_t = alpha_t x0 + sigma_t eps``."""
        return axpby(1 / self.sigma_t, x_t, -self.alpha_t / self.sigma_t, x0)

    def renoise(self, x_t: Tensor, x0: Tensor, std: float) -> Tensor:
        """Return ``alpha_s x0 + std eps`` with the noise of ``x_t``."""
        return axpby(std / self.sigma_t, x_t, self.alpha_s - std * self.alpha_t / self.sigma_t, x0)

    def diffuse(self, x_s: Tensor, z: Tensor) -> Tensor:
        """Sample q(x_t | x_s), from s back to t, with standard normal z."""
        return axpby(self.alpha_t / self.alpha_s, x_s, self.var_ts**0.5, z)


def chain_coefficients(path: GaussianPath, times: Tensor) -> list[StepCoefficients]:
    """Compute the coefficients of all steps of a chain, in float64."""
    alpha, sigma, d_alpha, d_sigma = (values.tolist() for values in path.schedule.at(times))
    chain, t = [], times.tolist()
    for i in range(len(t) - 1):
        var_ts = sigma[i] ** 2 - (alpha[i] / alpha[i + 1] * sigma[i + 1]) ** 2
        posterior_var = var_ts * (sigma[i + 1] / sigma[i]) ** 2
        ends = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        chain.append(StepCoefficients(i, t[i], t[i + 1], *ends, var_ts, posterior_var, d_alpha[i], d_sigma[i]))
    return chain


class Estimate(NamedTuple):
    """The estimate of the data at the start of a step."""

    x0: Tensor
    step: StepCoefficients


class CountedDenoiser:
    """A denoiser on one trajectory, which counts evaluations and keeps the last estimate for multistep methods.

    Args:
        denoiser: any denoiser.
        y: conditions of the batch, (B, *condition.shape), or None.
        clip: whether to clamp estimates of images to [-1, 1].
        chain: the steps.
        batch: a state, (B, *shape).

    Attributes:
        nfe: network evaluations per sample.
        previous: the last estimate.
    """

    def __init__(self, denoiser: Denoiser, y: Tensor | None, clip: bool, chain: list[StepCoefficients], batch: Tensor):
        self.denoiser, self.y, self.chain = denoiser, y, chain
        self.clip = clip and denoiser.event.levels is not None
        self.nfe = 0
        self.previous: Estimate | None = None
        times = [step.t for step in chain]
        self.times = dict(zip(times, batch_times(torch.tensor(times, dtype=torch.float64), batch), strict=True))

    def __call__(self, x_t: Tensor, step: StepCoefficients) -> tuple[Tensor, Prediction]:
        """Return the estimate of the data at the start of a step, and the prediction."""
        prediction = self.denoiser.predict(x_t, self.times[step.t], self.y)
        self.nfe += self.denoiser.evaluations
        if prediction.kind == "x0":
            x0 = cast_like(prediction.mean, x_t)
            x0 = x0.clamp(-1.0, 1.0) if self.clip else x0
        else:
            at_t = step.alpha_t, step.sigma_t, step.d_alpha_t, step.d_sigma_t
            of_x_t, of_mean = conversion_coefficients(prediction.kind, "x0", *at_t)
            x0 = axpby(of_x_t, x_t, of_mean, prediction.mean)
            x0 = x0.clamp_(-1.0, 1.0) if self.clip else x0
        self.previous = Estimate(x0, step)
        return x0, prediction

    def next_step(self, step: StepCoefficients) -> StepCoefficients:
        """Return the step after ``step``, which must not be the last."""
        return self.chain[step.i + 1]


class ChainSampler(Sampler):
    """A sampler on a decreasing time grid, by default that of the schedule."""

    rho: float | None = None  # if given, the grid is uniform in (sigma/alpha)^(1/rho) instead

    def times(self, schedule: Schedule) -> Tensor:
        """Return the time grid of the chain, from noise to data, float64."""
        if self.rho is None or self.steps is None:
            return schedule.times(self.steps)
        sigmas = karras_sigmas(schedule, self.steps, self.rho, RATIO_MAX)
        return torch.cat([schedule.time_of(sigmas), torch.zeros(1).double()])

    def state_times(self, denoiser: Denoiser) -> list[float]:
        return self.times(denoiser.path.schedule).tolist()

    def start(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None) -> tuple[Tensor, CountedDenoiser]:
        """Return the initial state, (n, *shape), and the denoiser on the chain of steps."""
        schedule = denoiser.path.schedule
        chain = chain_coefficients(denoiser.path, self.times(schedule))
        # The first time of a strided chain may be below t_first; it uses the noise of t_first all the same, as is common.
        x = initial_state(schedule, noise, min(schedule.t_first, schedule.t_max) if self.rho is None else chain[0].t)
        return x, CountedDenoiser(denoiser, y, self.clip, chain, noise)

    def iterate(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Trajectory:
        x, denoise = self.start(denoiser, noise, y)
        yield x, 0
        for step in denoise.chain:
            x = self.step(denoise, x, step, rng)
            yield x, denoise.nfe

    @abstractmethod
    def step(self, denoise: CountedDenoiser, x_t: Tensor, c: StepCoefficients, rng: torch.Generator | None) -> Tensor:
        """Return the state at s.

        Args:
            denoise: returns the estimate of the data and the prediction, as ``denoise(x_t, c)``.
            x_t: the state at t, (n, *shape).
            c: t, s and the coefficients of the path at both.
            rng: source of randomness.
        """
