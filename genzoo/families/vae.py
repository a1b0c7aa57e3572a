r"""Variational autoencoders.

The decoder defines ``p(x) = int p(x | z) N(z; 0, I) dz``, and the encoder an approximate posterior
``q(z | x) = N(mu(x), diag s(x)^2)``. Training maximises the evidence lower bound

    log p(x) >= E_q log p(x | z) - KL(q(z | x) || N(0, I))                                        (ELBO)

with the reparameterisation ``z = mu + s eps``. K samples give a tighter bound,

    log p(x) >= E log 1/K sum_k p(x | z_k) N(z_k; 0, I) / q(z_k | x)                              (IWAE)

which is the ELBO at K = 1 and converges to log p(x) from below.

References:
    Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, https://arxiv.org/abs/1312.6114 (eq. 3, 10).
    Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, https://arxiv.org/abs/1509.00519 (eq. 8).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

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
from genzoo.nn import defaults
from genzoo.numerics.clamping import projected_clamp
from genzoo.numerics.random import randn


class VAE(Hierarchical, GaussianPosterior):
    """A variational autoencoder with a diagonal Gaussian posterior.

    Args:
        encoder: factory of the encoder, called as ``encoder(in_shape, out_shape, condition)``, for ``(x, y)``.
        decoder: factory of the decoder, called in the same way, for ``(z, y)``.
        likelihood: p(x | z), parameterised by the decoder's output; by default a discretised logistic, or a Gaussian for
            real vectors.
        event, condition: as in ``GenerativeModel``.
        latent_dim: dimension of z, or its shape, (C, h, w), for networks with a latent grid.
        beta, warmup, free_bits: weighting of the KL term in the loss, see ``RateCost``; not used by ``log_prob``.
        sample_likelihood: whether samples are draws of p(x | z), or its mean.

    Raises:
        ValueError: for a likelihood with another number of levels than the data.
    """

    bound = Bound.LOWER
    diagnostics: Mapping[str, Diagnostic] = {
        "distortion": Diagnostic("distortion", "nats", "lower"),
        "rate": Diagnostic("rate: KL of posterior and prior", "nats"),
    }

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        encoder: Callable[..., nn.Module] = defaults.encoder,
        decoder: Callable[..., nn.Module] = defaults.decoder,
        likelihood: Likelihood | None = None,
        latent_dim: int | Sequence[int] = 16,
        beta: float = 1.0,
        warmup: int = 0,
        free_bits: float = 0.0,
        sample_likelihood: bool = False,
    ):
        super().__init__(event, condition)
        latent = (latent_dim,) if isinstance(latent_dim, int) else tuple(latent_dim)
        if not latent or min(latent) < 1:
            raise ValueError(f"latent_dim must be at least 1, not {latent_dim}")
        likelihood = default_likelihood(event.levels) if likelihood is None else likelihood
        likelihood.check(event.levels)
        channels, *sides = self.shape
        self.latent = Continuous(latent)
        self.likelihood = likelihood
        self.encoder = encoder(self.shape, (2 * latent[0], *latent[1:]), condition)
        self.decoder = decoder(latent, (likelihood.num_params(channels), *sides), condition)
        self.cost = RateCost(beta, warmup, free_bits)
        self.sample_likelihood = sample_likelihood

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | x), each (B, *latent.shape)."""
        mean, log_var = self.encoder(self.likelihood.encoder_input(x), y).to(x.dtype).chunk(2, dim=1)
        return mean, projected_clamp(log_var, -20, 10)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        mean, log_var = self.posterior(x, y)
        z = mean + torch.exp(0.5 * log_var) * randn(mean.shape, rng=rng, device=x.device, dtype=x.dtype)
        distortion = -self.likelihood.log_prob(self.decoder(z, y).to(x.dtype), x).mean()
        divergence = kl_normal(mean, log_var)
        # In nats per dimension, so that one learning rate suits images of any size.
        total = (distortion + self.cost(divergence)) / self.dim
        return Loss(total, {"distortion": distortion.detach(), "rate": divergence.detach().flatten(1).sum(1).mean()})

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        self.cost.count(batch_size)
        return {}

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        """Return the ELBO, or with ``num_samples > 1`` the importance-weighted bound and its standard error."""
        mean, log_var = self.posterior(x, y)
        log_weights = []
        for _ in range(num_samples):
            eps = randn(mean.shape, rng=rng, device=x.device, dtype=x.dtype)
            z = mean + torch.exp(0.5 * log_var) * eps
            log_likelihood = self.likelihood.log_prob(self.decoder(z, y).to(x.dtype), x)
            if num_samples == 1:
                return LogProb(log_likelihood - kl_normal(mean, log_var).flatten(1).sum(1))
            log_prior_over_posterior = 0.5 * (eps**2 + log_var - z**2).flatten(1).sum(1)
            log_weights.append(log_likelihood + log_prior_over_posterior)
        return LogProb(*importance_weighted(torch.stack(log_weights)))

    def check_compressible(self) -> None:
        self.likelihood.check_discrete()

    def _descend(
        self, n: int, y: Tensor | None, draw: Callable[[Tensor, Tensor], Tensor], x: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        if x is None:
            mean = log_var = torch.zeros(n, *self.latent.shape, device=self.device, dtype=self.dtype)
        else:
            mean, log_var = self.posterior(x, y)
        params = self.decoder(draw(mean, 0.5 * log_var), y).to(self.dtype)
        return functools.partial(self.likelihood.next_log_probs, params)

    def _infer(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> PosteriorSample:
        mean, log_var = self.posterior(x, y)
        eps = randn(mean.shape, rng=rng, device=x.device, dtype=x.dtype)
        log_q = -0.5 * (eps**2 + log_var + math.log(2 * math.pi)).flatten(1).sum(1)
        return PosteriorSample(mean + torch.exp(0.5 * log_var) * eps, log_q)

    def _divergences(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        return kl_normal(*self.posterior(x, y))

    def _log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        return self.likelihood.log_prob(self.decoder(z, y).to(z.dtype), x)

    def _generate(self, z: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        params = self.decoder(z, y).to(z.dtype)
        return self.likelihood.sample(params, rng) if self.sample_likelihood else self.likelihood.mean(params)

    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the mean of q(z | x), (B, *latent.shape)."""
        return self.posterior(x, y)[0]

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the mean of p(x | z)."""
        return self.likelihood.mean(self.decoder(z, y).to(z.dtype))

    def _decode_smooth(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the mean of p(x | z), not rounded to a level."""
        return self.likelihood.location(self.decoder(z, y).to(z.dtype))

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        z = randn((n, *self.latent.shape), rng=rng, device=self.device, dtype=self.dtype)
        return Samples(self._generate(z, y, rng), nfe=1)
