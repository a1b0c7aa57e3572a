r"""Variational autoencoders.

A latent ``z ~ N(0, I)`` explains an event through a decoder, ``p(x) = int p(x | z) N(z; 0, I) dz``, and an encoder
approximates who might have made it, ``q(z | x) = N(mu(x), diag s(x)^2)``. Training maximises the evidence lower bound

    log p(x) >= E_q log p(x | z) - KL(q(z | x) || N(0, I))                                        (ELBO)

by differentiating through ``z = mu + s eps``. With K draws a tighter bound holds,

    log p(x) >= E log 1/K sum_k p(x | z_k) N(z_k; 0, I) / q(z_k | x)                              (IWAE)

which is the ELBO at K = 1 and rises to log p(x).

References:
    Kingma, Welling, "Auto-Encoding Variational Bayes", 2014, https://arxiv.org/abs/1312.6114 (eq. 3, 10).
    Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, https://arxiv.org/abs/1509.00519 (eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from genzoo.distributions.bounds import RateCost, importance_weighted
from genzoo.distributions.divergences import kl_normal
from genzoo.distributions.likelihoods import Likelihood
from genzoo.model import Bound, Continuous, Density, Diagnostic, Inferred, LatentVariable, LogProb, Loss, Samples
from genzoo.numerics.clamping import projected_clamp
from genzoo.numerics.random import randn


class VAE(Density, LatentVariable):
    """A variational autoencoder with a diagonal normal posterior.

    Args:
        encoder: builds the encoder, called as ``encoder(in_shape, out_shape, num_classes)``, for ``(x, y)``.
        decoder: builds the decoder, in the same way, for ``(z, y)``.
        likelihood: p(x | z) given the decoder's output.
        shape, levels, num_classes: of the data, as in ``GenerativeModel``.
        latent_dim: size of z, or its shape, (C, h, w), for networks that keep a grid.
        beta, warmup, free_bits: what the loss charges for the KL term, see ``RateCost``; the bound that ``log_prob``
            reports uses none of them.
        sample_likelihood: whether samples are draws of p(x | z), noise of each pixel included, or its mean.

    Raises:
        ValueError: for a likelihood of other data.
    """

    bound = Bound.LOWER
    diagnostics: Mapping[str, Diagnostic] = {
        "distortion": Diagnostic("distortion", "nats", "lower"),
        "rate": Diagnostic("rate: KL of posterior and prior", "nats"),
    }

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module],
        likelihood: Likelihood,
        shape: Sequence[int],
        levels: int | None = None,
        num_classes: int = 0,
        latent_dim: int | Sequence[int] = 16,
        beta: float = 1.0,
        warmup: int = 0,
        free_bits: float = 0.0,
        sample_likelihood: bool = False,
    ):
        super().__init__(shape, levels, num_classes)
        latent = (latent_dim,) if isinstance(latent_dim, int) else tuple(latent_dim)
        if not latent or min(latent) < 1:
            raise ValueError(f"latent_dim must be at least 1, not {latent_dim}")
        likelihood.check(levels)
        channels, *sides = self.shape
        self.latent = Continuous(latent)
        self.likelihood = likelihood
        self.encoder = encoder(self.shape, (2 * latent[0], *latent[1:]), num_classes)
        self.decoder = decoder(latent, (likelihood.num_params(channels), *sides), num_classes)
        self.cost = RateCost(beta, warmup, free_bits)
        self.sample_likelihood = sample_likelihood

    def posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | x), each (B, *latent.shape)."""
        mean, log_var = self.encoder(self.likelihood.init_statistics(x), y).to(x.dtype).chunk(2, dim=1)
        return mean, projected_clamp(log_var, -20, 10)

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, turn: str | None = None, rng: torch.Generator | None = None
    ) -> Loss:
        self.check_labels(y, len(x))
        mean, log_var = self.posterior(x, y)
        z = mean + torch.exp(0.5 * log_var) * randn(mean.shape, rng=rng, device=x.device, dtype=x.dtype)
        distortion = -self.likelihood.log_prob(self.decoder(z, y).to(x.dtype), x).mean()
        divergence = kl_normal(mean, log_var)
        # In nats a dimension, so that one learning rate serves small and large images.
        total = (distortion + self.cost(divergence)) / self.dim
        return Loss(total, {"distortion": distortion.detach(), "rate": divergence.detach().flatten(1).sum(1).mean()})

    def log_prob(
        self, x: Tensor, y: Tensor | None = None, *, num_samples: int = 1, rng: torch.Generator | None = None
    ) -> LogProb:
        """Return the ELBO, or with ``num_samples > 1`` the tighter importance-weighted bound.

        Its standard error is known with more than one draw.
        """
        self.check_labels(y, len(x))
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
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

    def infer(self, x: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Inferred:
        self.check_labels(y, len(x))
        mean, log_var = self.posterior(x, y)
        eps = randn(mean.shape, rng=rng, device=x.device, dtype=x.dtype)
        log_q = -0.5 * (eps**2 + log_var + math.log(2 * math.pi)).flatten(1).sum(1)
        return Inferred(mean + torch.exp(0.5 * log_var) * eps, log_q)

    def log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        self.check_labels(y, len(z))
        return self.likelihood.log_prob(self.decoder(z, y).to(z.dtype), x)

    def generate(self, z: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Tensor:
        self.check_labels(y, len(z))
        params = self.decoder(z, y).to(z.dtype)
        return self.likelihood.sample(params, rng) if self.sample_likelihood else self.likelihood.mean(params)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the mean of q(z | x), (B, *latent.shape)."""
        self.check_labels(y, len(x))
        return self.posterior(x, y)[0]

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the mean of p(x | z)."""
        self.check_labels(y, len(z))
        return self.likelihood.mean(self.decoder(z, y).to(z.dtype))

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Samples:
        y = self.draw_labels(n, y, rng)
        z = randn((n, *self.latent.shape), rng=rng, device=self.device, dtype=self.dtype)
        return Samples(self.generate(z, y, rng=rng), nfe=1)
