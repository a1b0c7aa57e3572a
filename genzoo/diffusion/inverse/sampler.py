r"""Samplers of the posterior p(x | value) of an inverse problem, built on a sampler of the prior.

With ``value = A x + sigma n`` the score of the noisy posterior and, by Tweedie's formula, its denoiser are

    grad log p(x_t | value) = grad log p(x_t) + grad log p(value | x_t)
    E[x | x_t, value] = E[x | x_t] + sigma_t^2/alpha_t grad log p(value | x_t).

The likelihood of x_t is intractable, and methods differ in its approximation. Those that define it as a function of x_t are
denoisers themselves, for any sampler of fixed time steps; the others modify the steps of a chain.

References:
    Daras et al., "A Survey on Diffusion Models for Inverse Problems", 2024, https://arxiv.org/abs/2410.00083.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from genzoo.diffusion.denoiser import Denoiser, DenoiserWrapper
from genzoo.diffusion.inverse.operators import Observation
from genzoo.diffusion.path import Prediction
from genzoo.diffusion.samplers.ode import AdaptiveODE
from genzoo.diffusion.samplers.sampler import Sampler, Trajectory


class InverseSampler(Sampler):
    """A sampler of the posterior; sample i has the i-th value of the observation. No gradient flows through it.

    Args:
        observation: as many values as samples will be drawn.
        sampler: of the prior.

    Raises:
        ValueError: for a sampler with a step size per sample.
    """

    def __init__(self, observation: Observation, sampler: Sampler):
        super().__init__(sampler.steps, sampler.clip, sampler.trajectory)
        if isinstance(sampler, AdaptiveODE):
            raise ValueError("inverse problems need a sampler of fixed steps, such as ddim or heun, not ode")
        self.observation, self.sampler, self.stochastic = observation, sampler, sampler.stochastic

    def iterate(self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Trajectory:
        if not denoiser.path.independent:
            raise ValueError("inverse problems need a path with independent noise and data, which this model lacks")
        if denoiser.event.shape != self.observation.operator.event_shape or len(noise) != len(self.observation):
            raise ValueError(
                f"the observation is of {len(self.observation)} events of shape {self.observation.operator.event_shape}, "
                f"not {len(noise)} of shape {denoiser.event.shape}"
            )
        with torch.no_grad():
            states = self.iterate_posterior(denoiser, noise, y, rng)
            x, nfe = next(states)
            for following in states:
                yield x, nfe
                x, nfe = following
            yield self.observation.finish(x), nfe

    @abstractmethod
    def iterate_posterior(
        self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None
    ) -> Trajectory:
        """Yield the states, as ``iterate``; known coordinates are put back into the last one by the caller."""


class PosteriorDenoiser(DenoiserWrapper):
    """A denoiser that predicts E[x | x_t, value].

    All samples of a batch share their time. A vector-Jacobian product of the network counts as one evaluation.

    Args:
        denoiser: predicts E[x | x_t].
        observation: one value for each sample of a batch.
        correction: the method, called as ``correction(x0, vjp, observation, alpha_t, sigma_t)`` with
            x0 = E[x | x_t], (B, *shape), and ``vjp(u) = (d x0/d x_t)' u``; returns E[x | x_t, value] - x0 and the number of
            vector-Jacobian products.
    """

    def __init__(self, denoiser: Denoiser, observation: Observation, correction: Correction):
        super().__init__(denoiser)
        self.observation, self.correction = observation, correction
        self._evaluations = denoiser.evaluations

    @property
    def evaluations(self) -> int:  # type: ignore[override]
        """Network evaluations and vector-Jacobian products in the latest ``predict``."""
        return self._evaluations

    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        path = self.path
        t = path.well_conditioned_time("x0", "eps", path.well_conditioned_time("eps", "x0", t))
        assert bool((t == t.flatten()[0]).all()), "samples of one batch have one time"
        alpha, sigma, *_ = (float(c.flatten()[0]) for c in path.schedule.at(t))
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_()
            prediction = self.denoiser.predict(x_t, t, y)
            x0 = path.combine(prediction, x_t, t, "x0")

        def vjp(u: Tensor) -> Tensor:
            return torch.autograd.grad(x0, x_t, u, retain_graph=True)[0]

        mean = x0.detach()
        correction, products = self.correction(mean, vjp, self.observation, alpha, sigma)
        self._evaluations = self.denoiser.evaluations * (1 + products)
        weight = prediction.variance_weight
        return Prediction("x0", mean + correction, None if weight is None else weight.detach())


Correction = Callable[[Tensor, Callable[[Tensor], Tensor], Observation, float, float], tuple[Tensor, int]]


class PosteriorMeanSampler(InverseSampler):
    """A sampler of the prior with the denoiser E[x | x_t, value] in place of E[x | x_t]."""

    @abstractmethod
    def correction(
        self, x0: Tensor, vjp: Callable[[Tensor], Tensor], observation: Observation, alpha: float, sigma: float
    ) -> tuple[Tensor, int]:
        """Return E[x | x_t, value] - E[x | x_t], see ``PosteriorDenoiser``."""

    def iterate_posterior(
        self, denoiser: Denoiser, noise: Tensor, y: Tensor | None, rng: torch.Generator | None
    ) -> Trajectory:
        yield from self.sampler.iterate(PosteriorDenoiser(denoiser, self.observation, self.correction), noise, y, rng)
