r"""Langevin sampling of the latents of a decoder, given an observation of its output.

A decoder g with latents ``z ~ N(0, I)``, such as a VAE, a GAN or a normalising flow, and ``value = A g(z) + s n`` give

    -log p(z | value) = |z|^2/2 + |value - A g(z)|^2/(2 s^2) + const.

Each sample is the last state of a chain of its own, of the Metropolis-adjusted Langevin algorithm (MALA): the proposal

    z' = z - h grad U(z) + sqrt(2 h) n,        U = -log p(z | value),

is accepted with probability ``min(1, p(z') q(z | z') / (p(z) q(z' | z)))``, which leaves p(z | value) invariant for any step
size h. The chain starts from the prior; in the first half of the steps s falls from 1 to its value and h is adapted to each
chain, to an acceptance rate of 0.574 (Roberts, Rosenthal 1998); in the second half both are constant. Modes that are far apart
are not visited by a single chain.

A GAN or a VAE cannot match every observation exactly: noise below ``min_sigma`` is raised to it. For a VAE, g is the mean of
p(x | z), whose noise is disregarded.

References:
    Roberts, Tweedie, "Exponential Convergence of Langevin Distributions and Their Discrete Approximations", 1996,
    https://doi.org/10.2307/3318418 (section 1.4.2).
    Roberts, Rosenthal, "Optimal Scaling of Discrete Approximations to Langevin Diffusions", 1998,
    https://doi.org/10.1111/1467-9868.00123.
    Bora, Jalal, Price, Dimakis, "Compressed Sensing using Generative Models", 2017, https://arxiv.org/abs/1703.03208.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from genzoo.diffusion.inverse.operators import Observation
from genzoo.model import Continuous, Decoder, Samples
from genzoo.numerics.random import rand, randn

TARGET = 0.574  # acceptance rate of the optimal step size in high dimensions
FIRST_SIGMA, FIRST_STEP = 1.0, 0.02


class State(NamedTuple):
    """Latents, and the square of the residual with its gradient; the potential follows for any noise level."""

    z: Tensor  # (B, *latent.shape)
    square: Tensor  # (B,), |value - A g(z)|^2
    gradient: Tensor  # (B, *latent.shape), of the square

    def potential(self, sigma: float) -> Tensor:
        """Return U(z), (B,)."""
        return 0.5 * (self.z.square().flatten(1).sum(1) + self.square / sigma**2)

    def drift(self, sigma: float) -> Tensor:
        """Return grad U(z), (B, *latent.shape)."""
        return self.z + self.gradient / (2 * sigma**2)


class Langevin:
    """The Metropolis-adjusted Langevin algorithm in the latent space of a decoder.

    Args:
        observation: one value for each sample.
        steps: of each chain; the first half is discarded.
        min_sigma: smallest standard deviation of the likelihood.

    Raises:
        ValueError: for fewer than two steps, or a ``min_sigma`` that is not positive.
    """

    def __init__(self, observation: Observation, steps: int = 1000, min_sigma: float = 0.05):
        if steps < 2 or not 0 < min_sigma < math.inf:
            raise ValueError(f"steps must be at least 2 and min_sigma positive, not {steps} and {min_sigma}")
        self.observation, self.steps = observation, steps
        self.sigma = max(observation.sigma, min_sigma)

    @torch.no_grad()
    def __call__(self, model: Decoder, n: int, y: Tensor | None = None, rng: torch.Generator | None = None) -> Samples:
        """Draw a sample for each value; ``nfe`` counts evaluations of the decoder and their gradients.

        Args:
            model: with continuous latents whose prior is N(0, I).
            n: number of samples, that of values.
            y: conditions, (n, *condition.shape), of a conditional model.
            rng: source of randomness.

        Raises:
            ValueError: for discrete latents, and an observation of other events or of another number.
        """
        if not isinstance(model.latent, Continuous):
            raise ValueError(f"Langevin sampling needs continuous latents, which {type(model).__name__} lacks")
        if model.shape != self.observation.operator.event_shape or n != len(self.observation):
            raise ValueError(f"the observation is not of {n} events of shape {model.shape}")
        state = self.at(model, randn((n, *model.latent.shape), rng=rng, device=model.device, dtype=model.dtype), y)
        burn_in = self.steps // 2
        log_step = torch.full((n,), math.log(FIRST_STEP), dtype=model.dtype, device=model.device)
        for i in range(self.steps):
            heat = max(0.0, 1 - 2 * i / burn_in)  # the second half of the burn-in adapts to the final level
            sigma = self.sigma * max(FIRST_SIGMA / self.sigma, 1.0) ** heat
            h = log_step.exp().view(-1, *[1] * (state.z.ndim - 1))
            xi = randn(state.z.shape, rng=rng, device=model.device, dtype=model.dtype)
            proposed = self.at(model, state.z - h * state.drift(sigma) + (2 * h).sqrt() * xi, y)
            log_ratio = self.log_ratio(state, proposed, h, sigma)
            accepted = rand((n,), rng=rng, device=model.device, dtype=model.dtype).log() < log_ratio
            state = State(*(torch.where(expand_as(accepted, a), a, b) for a, b in zip(proposed, state, strict=True)))
            if i < burn_in:
                rate = log_ratio.clamp(max=0).exp().nan_to_num(0.0)
                log_step = log_step + (rate - TARGET) * max(0.05, 2 / math.sqrt(i + 1))
        x = model.decode(state.z, y)
        return Samples(self.observation.finish(x), nfe=2 * (self.steps + 1) + 1)

    def at(self, model: Decoder, z: Tensor, y: Tensor | None) -> State:
        """Evaluate the residual and its gradient."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            square = self.observation.residual(model.decode_smooth(z, y)).square().flatten(1).sum(1)
            (gradient,) = torch.autograd.grad(square.sum(), z)
        return State(z.detach(), square.detach(), gradient)

    @staticmethod
    def log_ratio(state: State, proposed: State, h: Tensor, sigma: float) -> Tensor:
        """Return the logarithm of the acceptance ratio, (B,)."""

        def log_q(to: State, start: State) -> Tensor:
            return -((to.z - start.z + h * start.drift(sigma)).square() / (4 * h)).flatten(1).sum(1)

        change = state.potential(sigma) - proposed.potential(sigma)
        return change + log_q(state, proposed) - log_q(proposed, state)


def expand_as(mask: Tensor, like: Tensor) -> Tensor:
    """Reshape a mask, (B,), to broadcast with (B, ...)."""
    return mask.view(-1, *[1] * (like.ndim - 1))
