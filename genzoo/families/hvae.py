r"""Hierarchical variational autoencoders.

The latents have a hierarchical prior,

    p(x, z_1, ..., z_L) = p(x | z_1, ..., z_L) prod_l p(z_l | z_<l),    p(z_l | z_<l) = N(mu_l, diag s_l^2),

and a top-down posterior, q(z_l | z_<l, x) = N(m_l, diag r_l^2). The lower bound has a KL term per layer, to a learned prior
that depends on the layers above,

    log p(x) >= E_q [log p(x | z) - sum_l KL(q(z_l | z_<l, x) || p(z_l | z_<l))],                    (ELBO)

and K joint samples of all layers give the tighter bound

    log p(x) >= E log 1/K sum_k p(x, z^k) / q(z^k | x).                                              (IWAE)

The latent of an event is the noise of the priors, eps_l = (z_l - mu_l)/s_l, which is N(0, I) for any weights; decoding
standard normal noise is sampling.

References:
    Sonderby, Raiko, Maaloe, Sonderby, Winther, "Ladder Variational Autoencoders", 2016, https://arxiv.org/abs/1602.02282.
    Child, "Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images", 2021,
    https://arxiv.org/abs/2011.10650 (section 2).
    Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, https://arxiv.org/abs/1509.00519 (eq. 8).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genzoo.conditions import Condition
from genzoo.distributions.bounds import RateCost, importance_weighted
from genzoo.distributions.divergences import kl_normal
from genzoo.distributions.likelihoods import Likelihood, default_likelihood
from genzoo.event import EventSpec
from genzoo.model import (
    Bound,
    Continuous,
    Diagnostic,
    GaussianPosterior,
    Hierarchical,
    LogProb,
    Loss,
    PosteriorSample,
    Samples,
)
from genzoo.nn.ladder import Ladder
from genzoo.numerics.clamping import projected_clamp
from genzoo.numerics.random import randn


class Normal(NamedTuple):
    """A Gaussian with diagonal covariance."""

    mean: Tensor  # (B, Z, H, W)
    log_std: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor, dtype: torch.dtype) -> Normal:
        """Parameterise by a network's output of means and log standard deviations, (B, 2Z, H, W)."""
        mean, log_std = moments.to(dtype).chunk(2, dim=1)
        return cls(mean, projected_clamp(log_std, -10, 5))

    def at(self, eps: Tensor) -> Tensor:
        """Return ``mean + std eps``."""
        return self.mean + torch.exp(self.log_std) * eps

    def standardize(self, z: Tensor) -> Tensor:
        """Return ``(z - mean)/std``."""
        return (z - self.mean) * torch.exp(-self.log_std)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log density of each event, (B,), up to the constant -D/2 log 2 pi."""
        return -(0.5 * self.standardize(z).square() + self.log_std).flatten(1).sum(1)


class Layer(NamedTuple):
    """Prior, posterior and sample of one layer of a top-down pass."""

    prior: Normal
    posterior: Normal  # the prior in unconditional sampling
    z: Tensor

    def divergence(self) -> Tensor:
        """Return KL(q || p) of each latent, (B, Z, H, W)."""
        p, q = self.prior, self.posterior
        return kl_normal(q.mean, 2 * q.log_std, p.mean, 2 * p.log_std)


class HVAE(Hierarchical, GaussianPosterior):
    """A variational autoencoder with a hierarchy of latents.

    Args:
        network: factory of the network, called as ``network(in_shape, out_shape, condition)``; see ``genzoo.nn.ladder``.
        likelihood: p(x | z), parameterised by the network's output.
        event, condition: as in ``GenerativeModel``.
        beta, warmup, free_bits: weighting of the KL terms in the loss, see ``RateCost``; not used by ``log_prob``.
        sample_likelihood: whether samples are draws of p(x | z), or its mean.

    Raises:
        ValueError: for a likelihood with another number of levels than the data.
    """

    bound = Bound.LOWER

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        network: Callable[..., Ladder] = Ladder,
        likelihood: Likelihood | None = None,
        beta: float = 1.0,
        warmup: int = 0,
        free_bits: float = 0.0,
        sample_likelihood: bool = False,
    ):
        super().__init__(event, condition)
        likelihood = default_likelihood(event.levels) if likelihood is None else likelihood
        likelihood.check(event.levels)
        channels, *sides = self.shape
        self.likelihood, self.sample_likelihood = likelihood, sample_likelihood
        self.network = network(self.shape, (likelihood.num_params(channels), *sides), condition)
        self.sizes = [math.prod(shape) for shape in self.network.latents]
        self.latent = Continuous((sum(self.sizes),))
        self.cost = RateCost(beta, warmup, free_bits)
        self.diagnostics = {
            "distortion": Diagnostic("distortion", "nats", "lower"),
            "rate": Diagnostic("rate: KL of all levels", "nats"),
            **{f"rate_{i}": Diagnostic(f"KL of level {i}, the top is 0", "nats") for i in range(len(self.sizes))},
        }

    def _top_down(
        self, eps: Tensor, y: Tensor | None, activations: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Layer]]:
        """Run the top-down pass with given noise.

        Args:
            eps: noise of all layers, (B, *latent.shape).
            y: conditions.
            activations: bottom-up activations of each layer, for the posterior; None for the prior.

        Returns:
            The parameters of the likelihood, and the layers from top to bottom.
        """
        h, layers = self.network.top(len(eps)), []
        noise = [e.reshape(-1, *shape) for e, shape in zip(eps.split(self.sizes, 1), self.network.latents, strict=True)]
        for i, rung in enumerate(self.network.rungs):
            h = rung.enter(h, y)
            moments, features = rung.prior(h)
            prior = posterior = Normal.from_moments(moments, eps.dtype)
            if activations is not None:
                posterior = Normal.from_moments(rung.posterior(h, activations[i]), eps.dtype)
            z = posterior.at(noise[i])
            h = rung.merge(h + features, z)
            layers.append(Layer(prior, posterior, z))
        return self.network.output(h).to(eps.dtype), layers

    def _noise(self, n: int, rng: torch.Generator | None) -> Tensor:
        return randn((n, *self.latent.shape), rng=rng, device=self.device, dtype=self.dtype)

    @staticmethod
    def _noise_of(layers: Sequence[Layer]) -> Tensor:
        """Return the noise of these latents under the priors, (B, *latent.shape)."""
        return torch.cat([layer.prior.standardize(layer.z).flatten(1) for layer in layers], dim=1)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        activations = self.network.bottom_up(self.likelihood.encoder_input(x))
        params, layers = self._top_down(self._noise(len(x), rng), y, activations)
        distortion = -self.likelihood.log_prob(params, x).mean()
        divergences = [layer.divergence() for layer in layers]
        rates = [kl.detach().flatten(1).sum(1).mean() for kl in divergences]
        # In nats per dimension, so that one learning rate suits images of any size.
        total = (distortion + self.cost(*divergences)) / self.dim
        terms = {"distortion": distortion.detach(), "rate": torch.stack(rates).sum()}
        return Loss(total, terms | {f"rate_{i}": rate for i, rate in enumerate(rates)})

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        self.cost.count(batch_size)
        return {}

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        """Return the ELBO, or with ``num_samples > 1`` the importance-weighted bound and its standard error."""
        activations = self.network.bottom_up(self.likelihood.encoder_input(x))
        log_weights = []
        for _ in range(num_samples):
            params, layers = self._top_down(self._noise(len(x), rng), y, activations)
            log_weight = self.likelihood.log_prob(params, x)
            for layer in layers:
                if num_samples == 1:
                    log_weight = log_weight - layer.divergence().flatten(1).sum(1)
                else:
                    log_weight = log_weight + layer.prior.log_prob(layer.z) - layer.posterior.log_prob(layer.z)
            log_weights.append(log_weight)
        if num_samples == 1:
            return LogProb(log_weights[0])
        return LogProb(*importance_weighted(torch.stack(log_weights)))

    def check_compressible(self) -> None:
        self.likelihood.check_discrete()

    def _descend(
        self, n: int, y: Tensor | None, draw: Callable[[Tensor, Tensor], Tensor], x: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        activations = None if x is None else self.network.bottom_up(self.likelihood.encoder_input(x))
        h = self.network.top(n)
        for i, rung in enumerate(self.network.rungs):
            h = rung.enter(h, y)
            moments, features = rung.prior(h)
            prior = Normal.from_moments(moments, self.dtype)
            mean = log_std = torch.zeros_like(prior.mean)
            if activations is not None:
                posterior = Normal.from_moments(rung.posterior(h, activations[i]), self.dtype)
                mean, log_std = prior.standardize(posterior.mean), posterior.log_std - prior.log_std
            h = rung.merge(h + features, prior.at(draw(mean, log_std)))
        return functools.partial(self.likelihood.next_log_probs, self.network.output(h).to(self.dtype))

    def _infer(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> PosteriorSample:
        activations = self.network.bottom_up(self.likelihood.encoder_input(x))
        _, layers = self._top_down(self._noise(len(x), rng), y, activations)
        # By the change of variables from z to the noise, with the Jacobian prod s_l.
        log_q = torch.stack([q.log_prob(z) + p.log_std.flatten(1).sum(1) for p, q, z in layers]).sum(0)
        return PosteriorSample(self._noise_of(layers), log_q - 0.5 * sum(self.sizes) * math.log(2 * math.pi))

    def _divergences(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        """Return the divergences of all layers, whose priors and posteriors depend on samples of the layers above."""
        activations = self.network.bottom_up(self.likelihood.encoder_input(x))
        _, layers = self._top_down(self._noise(len(x), rng), y, activations)
        return torch.cat([layer.divergence().flatten(1) for layer in layers], dim=1)

    def _log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        return self.likelihood.log_prob(self._top_down(z, y)[0], x)

    def _generate(self, z: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        params, _ = self._top_down(z, y)
        return self.likelihood.sample(params, rng) if self.sample_likelihood else self.likelihood.mean(params)

    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the noise of the posterior means under the priors, (B, *latent.shape)."""
        zeros = torch.zeros(len(x), *self.latent.shape, device=x.device, dtype=x.dtype)
        _, layers = self._top_down(zeros, y, self.network.bottom_up(self.likelihood.encoder_input(x)))
        return self._noise_of(layers)

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the mean of p(x | z)."""
        return self.likelihood.mean(self._top_down(z, y)[0])

    def _decode_smooth(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the mean of p(x | z), not rounded to a level."""
        return self.likelihood.location(self._top_down(z, y)[0])

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        return Samples(self._generate(self._noise(n, rng), y, rng), nfe=1)
