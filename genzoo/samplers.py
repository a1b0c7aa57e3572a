r"""Samplers: ways from noise to data along a Gaussian path, for any ``Denoiser``.

A sampler walks down the times that the denoiser's schedule lists, ``t -> s`` with ``s < t``, and every step is written in
the path's own coefficients, so that a chain may be thinned out and any schedule may be used:

    alpha_ts = alpha_t / alpha_s,      var_ts = sigma_t^2 - alpha_ts^2 sigma_s^2          (the noise added from s to t)
    q(x_s | x_t, x) = N(alpha_ts sigma_s^2/sigma_t^2 x_t + alpha_s var_ts/sigma_t^2 x,  var_ts sigma_s^2/sigma_t^2 I)

which for a variance-preserving chain is eq. 6-7 of Ho et al. 2020, and in this general form eq. 32 of Kingma et al. 2021.

References:
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, https://arxiv.org/abs/2006.11239 (algorithm 2).
    Song, Meng, Ermon, "Denoising Diffusion Implicit Models", 2021, https://arxiv.org/abs/2010.02502 (eq. 12, 16).
    Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", 2021, https://arxiv.org/abs/2107.00630 (appendix A).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from genzoo.model import Denoiser, Samples
from genzoo.prob.paths import GaussianPath, Prediction
from genzoo.prob.random import randn

Variance = Literal["fixedlarge", "fixedsmall", "learned"]


class Step(NamedTuple):
    """Coefficients of one step ``t -> s``, as numbers."""

    t: float
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float
    var_ts: float  # variance of the noise between s and t
    posterior_var: float  # variance of q(x_s | x_t, x)

    @property
    def last(self) -> bool:
        """Whether this step arrives at the data."""
        return self.sigma_s == 0.0

    def posterior_mean(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """Mean of q(x_s | x_t, x)."""
        of_x_t = self.alpha_t / self.alpha_s * self.sigma_s**2 / self.sigma_t**2
        return of_x_t * x_t + self.alpha_s * self.var_ts / self.sigma_t**2 * x0


def plan(path: GaussianPath, steps: int | None) -> list[Step]:
    """Compute all steps of a walk once, in float64."""
    times = path.schedule.times(steps)
    c = path.schedule.at(times)
    alpha, sigma = c.alpha.tolist(), c.sigma.tolist()
    walk = []
    for i, t in enumerate(times[:-1].tolist()):
        var_ts = sigma[i] ** 2 - (alpha[i] / alpha[i + 1] * sigma[i + 1]) ** 2
        posterior_var = var_ts * (sigma[i + 1] / sigma[i]) ** 2
        walk.append(Step(t, alpha[i], sigma[i], alpha[i + 1], sigma[i + 1], var_ts, posterior_var))
    return walk


class Sampler(ABC):
    """A way from noise to data.

    Args:
        steps: how many; None for all steps of a discrete chain.
        clip: whether the estimate of the data is clamped to [-1, 1] at each step where the data are images.
        trajectory: whether all states are returned too.
    """

    stochastic: bool

    def __init__(self, steps: int | None = None, clip: bool = True, trajectory: bool = False):
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        self.steps, self.clip, self.trajectory = steps, clip, trajectory

    @abstractmethod
    def step(self, x_t: Tensor, prediction: Prediction, x0: Tensor, step: Step, rng: torch.Generator | None) -> Tensor:
        """Go from ``x_t`` to ``x_s``, given what the denoiser said and its (clipped) estimate of the data."""

    @torch.no_grad()
    def __call__(
        self, denoiser: Denoiser, n: int, y: Tensor | None = None, rng: torch.Generator | None = None
    ) -> Samples:
        """Draw ``n`` samples.

        Raises:
            ValueError: for a stochastic sampler on a path whose noise is paired with its data.
        """
        path = denoiser.path
        if self.stochastic and not path.independent:
            raise ValueError(f"{type(self).__name__} is stochastic: a path with paired noise needs an ODE sampler")
        shape = (n, *denoiser.shape)
        x = path.schedule.prior_std * randn(shape, rng=rng, device=denoiser.device, dtype=denoiser.dtype)
        walk = plan(path, self.steps)
        states = [x]
        for step in walk:
            t = torch.full((n,), step.t, dtype=torch.float64, device=x.device)
            prediction = denoiser.predict(x, t, y)
            x0 = path.convert(prediction, x, t, "x0").to(x.dtype)
            if self.clip and denoiser.levels is not None:
                x0 = x0.clamp(-1, 1)
            x = self.step(x, prediction, x0, step, rng)
            if self.trajectory:
                states.append(x)
        return Samples(x, len(walk) * denoiser.evaluations, torch.stack(states) if self.trajectory else None)


class Ancestral(Sampler):
    """DDPM's sampler: draw from the reverse chain, without noise at the last step (Ho et al. 2020, algorithm 2).

    Args:
        variance: of a reverse step, "fixedlarge" for the forward variance, "fixedsmall" for the posterior's, "learned" for
            what the denoiser predicts.
        steps, clip, trajectory: as in ``Sampler``.
    """

    stochastic = True

    def __init__(
        self,
        variance: Variance = "fixedlarge",
        steps: int | None = None,
        clip: bool = True,
        trajectory: bool = False,
    ):
        super().__init__(steps, clip, trajectory)
        if variance not in ("fixedlarge", "fixedsmall", "learned"):
            raise ValueError(f"variance must be fixedlarge, fixedsmall or learned, not {variance!r}")
        self.variance = variance

    def step(self, x_t: Tensor, prediction: Prediction, x0: Tensor, step: Step, rng: torch.Generator | None) -> Tensor:
        mean = step.posterior_mean(x_t, x0)
        if step.last:
            return mean
        z = randn(mean.shape, rng=rng, device=mean.device, dtype=mean.dtype)
        if self.variance == "learned":
            if prediction.log_var is None:
                raise ValueError("this denoiser has learned no variance: use variance=fixedlarge or fixedsmall")
            return mean + torch.exp(0.5 * prediction.log_var) * z
        return mean + (step.var_ts if self.variance == "fixedlarge" else step.posterior_var) ** 0.5 * z


class DDIM(Sampler):
    """The implicit sampler: deterministic at ``eta = 0``, the ancestral one at ``eta = 1`` (Song et al. 2021, eq. 12).

    Args:
        eta: share of the posterior's standard deviation that is drawn anew at each step (eq. 16).
        steps, clip, trajectory: as in ``Sampler``.
    """

    def __init__(self, steps: int | None = 50, eta: float = 0.0, clip: bool = True, trajectory: bool = False):
        super().__init__(steps, clip, trajectory)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], not {eta}")
        self.eta = eta
        self.stochastic = eta > 0

    def step(self, x_t: Tensor, prediction: Prediction, x0: Tensor, step: Step, rng: torch.Generator | None) -> Tensor:
        # From the clipped estimate, so that x_t = alpha_t x0 + sigma_t eps stays true.
        eps = (x_t - step.alpha_t * x0) / step.sigma_t
        drawn = self.eta**2 * step.posterior_var
        x_s = step.alpha_s * x0 + max(step.sigma_s**2 - drawn, 0.0) ** 0.5 * eps
        if drawn > 0:
            x_s = x_s + drawn**0.5 * randn(x_s.shape, rng=rng, device=x_s.device, dtype=x_s.dtype)
        return x_s
