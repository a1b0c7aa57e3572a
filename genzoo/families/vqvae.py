r"""Vector-quantised variational autoencoders (VQ-VAE): codecs with discrete latents.

An encoder maps an event to a grid of vectors, each of which is replaced by the nearest of K codes; a decoder maps the grid of
codes ``k`` to the parameters of ``p(x | k)``. Training minimises

    L = -log p(x | e_k)/D + beta mean |z - sg[e_k]|^2

with the straight-through gradient from ``e_k`` to ``z``. The second term is the commitment loss; the codebook loss, the third
term of eq. 3, is replaced by exponential moving averages (``genzoo.nn.quantize``).

**Residual quantisation** (RQ-VAE) describes a vector by ``depth`` codes, each of what the codes before it have left.

**Finite scalar quantisation** (FSQ) rounds each of a few dimensions of the vector to a fixed grid. Its loss is the distortion
alone: there is no codebook to be learned, and no code dies.

The posterior is a point mass, so that any prior over the codes bounds the density of events,

    log p(x) >= log P(k(x)) + log p(x | k(x)).

Without a prior, samples use independent codes from their empirical distribution. ``genzoo.families.latent`` trains a prior
in a second stage.

References:
    van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, https://arxiv.org/abs/1711.00937
    (eq. 3, sections 3.2 and 3.3).
    Lee, Kim, Kim, Cho, Han, "Autoregressive Image Generation using Residual Quantization", 2022,
    https://arxiv.org/abs/2203.01941 (section 3.1).
    Mentzer, Minnen, Agustsson, Tschannen, "Finite Scalar Quantization: VQ-VAE Made Simple", 2023,
    https://arxiv.org/abs/2309.15505 (section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.distributions.discretization import to_bin_centers
from genzoo.distributions.likelihoods import Likelihood, default_likelihood
from genzoo.event import EventSpec
from genzoo.model import Diagnostic, Discrete, LatentVariable, Loss, PosteriorSample, Samples
from genzoo.nn import defaults
from genzoo.nn.grid import latent_grid
from genzoo.nn.quantize import (
    FiniteScalarQuantizer,
    Quantization,
    Quantizer,
    ResidualQuantizer,
    VectorQuantizer,
    perplexity,
)
from genzoo.numerics.precision import cumulative_sum
from genzoo.numerics.random import rand


class QuantizedAutoencoder(LatentVariable):
    """An autoencoder whose latents are a grid of codes.

    Args:
        event, condition: as in ``GenerativeModel``.
        quantizer: of the vectors of the encoder.
        encoder: factory of the encoder, called as ``encoder(in_shape, out_shape, condition)``, for ``(x, y)``.
        decoder: factory of the decoder, called in the same way, for ``(e, y)``.
        likelihood: p(x | z), parameterised by the decoder's output.
        downsampling: for images, the downsampling factor of the latent grid.
        tokens: for vectors, the number of codes.
        sample_likelihood: whether samples are draws of p(x | z), or its mean.
        commitment: weight beta of the commitment loss, for a learned codebook.

    Raises:
        ValueError: for images whose sides ``downsampling`` does not divide.
    """

    latent: Discrete

    diagnostics: Mapping[str, Diagnostic] = {
        "perplexity": Diagnostic("code perplexity", "codes per batch", "higher"),
        "usage": Diagnostic("codebook usage in a batch", "fraction", "higher"),
    }

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None,
        quantizer: Quantizer,
        encoder: Callable[..., nn.Module],
        decoder: Callable[..., nn.Module],
        likelihood: Likelihood | None,
        downsampling: int,
        tokens: int,
        sample_likelihood: bool,
        commitment: float = 0.25,
    ):
        super().__init__(event, condition)
        if commitment < 0:
            raise ValueError(f"commitment must not be negative, not {commitment}")
        channels, *sides = self.shape
        grid = latent_grid(sides, downsampling, tokens)
        self.latent = Discrete((1, *quantizer.grid(grid)), quantizer.codebook_size)
        self.quantizer = quantizer
        self.likelihood = default_likelihood(event.levels) if likelihood is None else likelihood
        self.encoder = encoder(self.shape, (quantizer.in_dim, *grid), condition)
        params = self.likelihood.num_params(channels)
        self.decoder = decoder((quantizer.out_dim, *grid), (params, *sides), condition)
        self.sample_likelihood, self.commitment = sample_likelihood, commitment

    def _vectors(self, x: Tensor, y: Tensor | None) -> Tensor:
        x = x if self.levels is None else to_bin_centers(x, self.levels)
        return self.encoder(x, y).to(x.dtype)

    def _params(self, z: Tensor, y: Tensor | None) -> Tensor:
        e = self.quantizer.lookup(z[:, 0])
        return self.decoder(e, y).to(e.dtype)

    def quantize(self, x: Tensor, y: Tensor | None) -> tuple[Quantization, Tensor]:
        """Encode, quantise and decode events, for training; return the codes and the parameters of p(x | k)."""
        quantization = self.quantizer(self._vectors(x, y))
        return quantization, self.decoder(quantization.e, y).to(x.dtype)

    def loss_terms(self, x: Tensor, quantization: Quantization, params: Tensor) -> tuple[Tensor, Loss]:
        """Return the mean distortion -log p(x | k) in nats per dimension, (), with its gradient, and the loss of training."""
        _, k, commitment, z = quantization
        distortion = -self.likelihood.log_prob(params, x).mean()
        exponential, usage = self._usage(k)
        # In nats per dimension, so that one commitment weight suits images of any size.
        per_dim = distortion / self.dim
        total, terms = per_dim, {"distortion": distortion.detach()}
        if self.quantizer.learned:
            total = total + self.commitment * commitment
            terms["commitment"] = commitment.detach()
        terms |= {"perplexity": exponential, "usage": usage}
        return per_dim, Loss(total, terms, {"z": z.detach(), "k": k})

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        return self.loss_terms(x, *self.quantize(x, y))[1]

    def _usage(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return the perplexity of codes, (B, h, w), and the fraction of them that is used, means over codebooks."""
        columns = self.quantizer.split(k)
        pairs = [torch.stack(perplexity(column, self.latent.levels, self.training)) for column in columns]
        exponential, usage = torch.stack(pairs).mean(0).unbind()
        return exponential, usage

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        dead = self.quantizer.update(aux["z"], aux["k"], rng)
        return {"dead": dead} if self.quantizer.learned else {}

    def _infer(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> PosteriorSample:
        """Return the codes of each event, (B, 1, h, w), with log q = 0 for a point mass."""
        return PosteriorSample(self._encode(x, y), x.new_zeros(len(x)))

    def _log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        return self.likelihood.log_prob(self._params(z, y), x)

    def _generate(self, z: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        params = self._params(z, y)
        return self.likelihood.sample(params, rng) if self.sample_likelihood else self.likelihood.mean(params)

    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the index of the code at each position of the grid, (B, 1, h, w) int64."""
        return self.quantizer.nearest(self._vectors(x, y)).unsqueeze(1)

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Return the mean of p(x | z)."""
        return self.likelihood.mean(self._params(z, y))

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Decode independent codes from their empirical distribution."""
        u = rand((n, *self.latent.shape), rng=rng, device=self.device).double()
        columns = []
        for column, probs in zip(self.quantizer.split(u[:, 0]), self.quantizer.marginals.double(), strict=True):
            cdf = cumulative_sum(probs, 0)
            columns.append(torch.searchsorted(cdf, column.contiguous() * cdf[-1], right=True))
        z = self.quantizer.join(columns).clamp_(max=self.latent.levels - 1).unsqueeze(1)
        return Samples(self._generate(z, y, rng), nfe=1)


class VQVAE(QuantizedAutoencoder):
    """A vector-quantised variational autoencoder.

    Args:
        event, condition, encoder, decoder, likelihood: as in ``QuantizedAutoencoder``.
        codebook_size: K.
        embedding_dim: dimension of a code.
        downsampling, tokens: as in ``QuantizedAutoencoder``.
        commitment: weight beta of the commitment loss.
        decay: of the moving averages of the codebook.
        revival: codes used less than this fraction of the mean usage are replaced; 0 for never.
        depth: codes of a position, for more than one those of a residual quantiser.
        sample_likelihood: as in ``QuantizedAutoencoder``.

    Raises:
        ValueError: for images whose sides ``downsampling`` does not divide.
    """

    diagnostics: Mapping[str, Diagnostic] = {
        **QuantizedAutoencoder.diagnostics,
        "dead": Diagnostic("revived dead codes", "codes per step", "lower"),
        "commitment": Diagnostic("commitment loss", "squared distance", "lower"),
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
        commitment: float = 0.25,
        decay: float = 0.99,
        revival: float = 0.1,
        depth: int = 1,
        sample_likelihood: bool = False,
    ):
        quantizer: Quantizer
        if depth == 1:
            quantizer = VectorQuantizer(codebook_size, embedding_dim, decay, revival=revival)
        else:
            quantizer = ResidualQuantizer(codebook_size, embedding_dim, depth, decay, revival=revival)
        parts = encoder, decoder, likelihood
        super().__init__(event, condition, quantizer, *parts, downsampling, tokens, sample_likelihood, commitment)


class FSQVAE(QuantizedAutoencoder):
    """An autoencoder with finite scalar quantisation.

    Args:
        event, condition, encoder, decoder, likelihood: as in ``QuantizedAutoencoder``.
        code_levels: values of a code in each dimension; their product is the number of codes.
        downsampling, tokens: as in ``QuantizedAutoencoder``.
        decay: of the moving averages of the frequencies of codes, from which samples without a prior are drawn.
        sample_likelihood: as in ``QuantizedAutoencoder``.

    Raises:
        ValueError: for images whose sides ``downsampling`` does not divide, and less than 3 values in a dimension.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        encoder: Callable[..., nn.Module] = defaults.grid_encoder,
        decoder: Callable[..., nn.Module] = defaults.grid_decoder,
        likelihood: Likelihood | None = None,
        code_levels: Sequence[int] = (8, 8, 8),
        downsampling: int = 4,
        tokens: int = 2,
        decay: float = 0.99,
        sample_likelihood: bool = False,
    ):
        quantizer = FiniteScalarQuantizer(code_levels, decay)
        parts = encoder, decoder, likelihood
        super().__init__(event, condition, quantizer, *parts, downsampling, tokens, sample_likelihood)
