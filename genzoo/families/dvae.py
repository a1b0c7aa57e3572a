r"""Discrete variational autoencoders (dVAE), trained by the Gumbel-softmax relaxation.

The latents are a grid of N codes with K values, uniform a priori. The encoder predicts the logits of the posterior, which is
independent at each position, and the decoder maps the vectors of the codes to the parameters of ``p(x | z)``:

    log p(x) >= E_q log p(x | z) - KL(q(z | x) || p(z)),    KL = sum_n [log K - H(q_n)]               (ELBO)

The KL is exact. The gradient of the first term to the encoder is that of relaxed samples ``y = softmax((l + g)/tau)``, whose
vectors are ``sum_k y_k e_k`` (``genzoo.distributions.gumbel``); the temperature tau is annealed towards 0, where samples are
one-hot. Training minimises, in nats per dimension,

    L = (E_y[-log p(x | y)] + beta KL)/D

with beta raised linearly from 0. Reported bounds use one-hot samples and beta = 1, and S samples give the tighter bound

    log p(x) >= E log 1/S sum_s p(x | z_s) K^-N / q(z_s | x).                                         (IWAE)

The uniform prior makes it a density by itself, whose samples are decoded independent codes. A learned prior over the codes
(``genzoo.families.latent``) can only raise the bound.

References:
    Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, https://arxiv.org/abs/2102.12092 (section 2.1; appendix A.2:
    temperature from 1 to 1/16 by a cosine, beta from 0 to 6.6).
    Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", 2017, https://arxiv.org/abs/1611.01144.
    Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016, https://arxiv.org/abs/1509.00519 (eq. 8).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.distributions.bounds import RateCost, importance_weighted
from genzoo.distributions.gumbel import Temperature, gumbel_softmax
from genzoo.distributions.likelihoods import Likelihood, default_likelihood, draw_index
from genzoo.event import EventSpec
from genzoo.model import Bound, Density, Diagnostic, Discrete, LatentVariable, LogProb, Loss, PosteriorSample, Samples
from genzoo.nn import defaults
from genzoo.nn.grid import latent_grid
from genzoo.nn.quantize import perplexity
from genzoo.numerics.random import rand, randint


class DVAE(Density, LatentVariable):
    """A discrete variational autoencoder with a uniform prior.

    Args:
        encoder: factory of the encoder, called as ``encoder(in_shape, out_shape, condition)``, for ``(x, y)``; its output
            are logits.
        decoder: factory of the decoder, called in the same way, for ``(e, y)``.
        likelihood: p(x | z), parameterised by the decoder's output; by default a discretised logistic, or a Gaussian for
            real vectors.
        event, condition: as in ``GenerativeModel``.
        codebook_size: K.
        embedding_dim: dimension of the vector of a code.
        downsampling: for images, the downsampling factor of the latent grid.
        tokens: for vectors, the number of codes.
        beta, warmup: weight of the KL term in the loss, and images over which it is raised, see ``RateCost``.
        temperature, final_temperature, annealing: of the relaxation, and images over which it is annealed, see
            ``Temperature``.
        sample_likelihood: whether samples are draws of p(x | z), or its mean.

    Raises:
        ValueError: for images whose sides ``downsampling`` does not divide, and a likelihood with another number of levels.
    """

    latent: Discrete
    bound = Bound.LOWER

    diagnostics: Mapping[str, Diagnostic] = {
        "distortion": Diagnostic("distortion", "nats", "lower"),
        "rate": Diagnostic("rate: KL of posterior and uniform prior", "nats"),
        "temperature": Diagnostic("temperature of the relaxation", "ratio"),
        "perplexity": Diagnostic("code perplexity", "codes per batch", "higher"),
        "usage": Diagnostic("codebook usage in a batch", "fraction", "higher"),
    }

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        encoder: Callable[..., nn.Module] = defaults.grid_encoder,
        decoder: Callable[..., nn.Module] = defaults.grid_decoder,
        likelihood: Likelihood | None = None,
        codebook_size: int = 512,
        embedding_dim: int = 64,
        downsampling: int = 4,
        tokens: int = 2,
        beta: float = 1.0,
        warmup: int = 0,
        temperature: float = 1.0,
        final_temperature: float = 1 / 16,
        annealing: int = 50_000,
        sample_likelihood: bool = False,
    ):
        super().__init__(event, condition)
        if codebook_size < 2 or embedding_dim < 1:
            raise ValueError(
                f"a codebook needs at least 2 codes of at least 1 dimension, not {codebook_size} of {embedding_dim}"
            )
        likelihood = default_likelihood(event.levels) if likelihood is None else likelihood
        likelihood.check(event.levels)
        channels, *sides = self.shape
        grid = latent_grid(sides, downsampling, tokens)
        self.latent = Discrete((1, *grid), codebook_size)
        self.likelihood = likelihood
        self.encoder = encoder(self.shape, (codebook_size, *grid), condition)
        self.codes = nn.Parameter(torch.randn(codebook_size, embedding_dim))
        self.decoder = decoder((embedding_dim, *grid), (likelihood.num_params(channels), *sides), condition)
        self.cost = RateCost(beta, warmup)
        self.temperature = Temperature(temperature, final_temperature, annealing)
        self.sample_likelihood = sample_likelihood

    def posterior(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return log q(z_n = k | x) of each position, (B, K, h, w)."""
        return self.encoder(self.likelihood.encoder_input(x), y).to(x.dtype).log_softmax(1)

    def _divergence(self, log_q: Tensor) -> Tensor:
        """Return KL(q || uniform) of each position in nats, (B, K, h, w) -> (B, 1, h, w)."""
        return math.log(self.latent.levels) + (log_q.exp() * log_q).sum(1, keepdim=True)

    def _draw(self, log_q: Tensor, rng: torch.Generator | None) -> PosteriorSample:
        """Draw one-hot samples of the posterior, (B, K, h, w) -> (B, 1, h, w), and their log probabilities, (B,)."""
        B, _, h, w = log_q.shape
        z = draw_index(log_q, rand((B, 1, h, w), rng=rng, device=log_q.device))
        return PosteriorSample(z, log_q.gather(1, z).flatten(1).sum(1))

    def _params(self, z: Tensor, y: Tensor | None) -> Tensor:
        e = F.embedding(z[:, 0], self.codes).movedim(-1, 1).contiguous()
        return self.decoder(e, y).to(e.dtype)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        log_q = self.posterior(x, y)
        temperature = self.temperature().to(x.dtype)
        relaxed = gumbel_softmax(log_q, temperature, rng)
        e = F.conv2d(relaxed, self.codes.T[:, :, None, None])
        distortion = -self.likelihood.log_prob(self.decoder(e, y).to(x.dtype), x).mean()
        divergence = self._divergence(log_q)
        # In nats per dimension, so that one learning rate suits images of any size.
        total = (distortion + self.cost(divergence)) / self.dim
        exponential, usage = perplexity(log_q.detach().argmax(1), self.latent.levels, self.training)
        terms = {"distortion": distortion.detach(), "rate": divergence.detach().flatten(1).sum(1).mean()}
        terms |= {"temperature": temperature, "perplexity": exponential, "usage": usage}
        return Loss(total, terms)

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        self.cost.count(batch_size)
        self.temperature.count(batch_size)
        return {}

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        """Return the ELBO, or with ``num_samples > 1`` the importance-weighted bound and its standard error."""
        log_q = self.posterior(x, y)
        log_weights = []
        for _ in range(num_samples):
            z, log_q_z = self._draw(log_q, rng)
            log_likelihood = self._log_likelihood(x, z, y)
            if num_samples == 1:
                return LogProb(log_likelihood - self._divergence(log_q).flatten(1).sum(1))
            log_prior = -z[0].numel() * math.log(self.latent.levels)
            log_weights.append(log_likelihood + log_prior - log_q_z)
        return LogProb(*importance_weighted(torch.stack(log_weights)))

    def _infer(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> PosteriorSample:
        return self._draw(self.posterior(x, y), rng)

    def _log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        return self.likelihood.log_prob(self._params(z, y), x)

    def _generate(self, z: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        params = self._params(z, y)
        return self.likelihood.sample(params, rng) if self.sample_likelihood else self.likelihood.mean(params)

    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the most probable code at each position of the grid, (B, 1, h, w) int64."""
        return self.posterior(x, y).argmax(1, keepdim=True)

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the mean of p(x | z)."""
        return self.likelihood.mean(self._params(z, y))

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Decode independent uniform codes."""
        z = randint(self.latent.levels, (n, *self.latent.shape), rng=rng, device=self.device)
        return Samples(self._generate(z, y, rng), nfe=1)
