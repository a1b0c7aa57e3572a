r"""Two-stage latent models: a learned prior over the latents of a codec.

The codec is trained first; then another generative model, the prior, is trained on ``z ~ q(z | x)``. Samples are decoded
samples of the prior. If the codec has a posterior and a likelihood and the prior a density, the pair bounds the density of
events,

    log p(x) >= E_q[log p(x | z) + log p(z) - log q(z | x)].

With the prior N(0, I) this is the bound of a variational autoencoder; a learned prior can only raise it.

The prior is any generative model of data:

- Real latents are standardised, ``(z - m)/s`` per channel, by the moments of the first batch of the prior's stage (the scale
  factor of latent diffusion). By the change of variables ``log p(z) = log p((z - m)/s) - sum log s``.
- Codes are integers in 0..K-1, dequantised like images with K levels (see ``genzoo.distributions.discretization``). Discrete
  families map them to bin centers; the density of a continuous family bounds the probability of the codes. In both cases
  ``log P(k) >= E log p(z) - D log(K/2)``.

References:
    van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, https://arxiv.org/abs/1711.00937
    (section 3.3: a prior over codes).
    Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, https://arxiv.org/abs/2112.10752
    (section 3; appendix G: the scale of the latents).
    Theis, van den Oord, Bethge, "A note on the evaluation of generative models", 2016, https://arxiv.org/abs/1511.01844
    (section 3.1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.distributions.discretization import dequantize, quantize
from genzoo.event import EventSpec
from genzoo.model import (
    Adversarial,
    Bound,
    Codec,
    Composite,
    Continuous,
    Density,
    Discrete,
    GenerativeModel,
    LatentVariable,
    LogProb,
    Loss,
    Samples,
    Stage,
    Staged,
    eval_mode,
)
from genzoo.numerics import distributed


class LatentTransform(nn.Module, ABC):
    """An invertible map from latents of the codec to events of the prior."""

    @abstractmethod
    def forward(self, z: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Return the prior's event of each latent, (B, *latent.shape)."""

    @abstractmethod
    def inverse(self, event: Tensor) -> Tensor:
        """Return the latent of each event of the prior."""

    @abstractmethod
    def log_det(self) -> Tensor | float:
        """Return log p(z) - log p(event), equal for all latents."""

    def init_statistics(self, z: Tensor) -> None:
        """Estimate the moments of the latents from the first batch; a no-op by default."""


class Dequantized(LatentTransform):
    """Uniform dequantisation of integers in 0..levels-1 to [-1, 1]."""

    def __init__(self, latent: Discrete):
        super().__init__()
        self.levels, self.dim = latent.levels, math.prod(latent.shape)

    def forward(self, z: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return dequantize(z, self.levels, rng)

    def inverse(self, event: Tensor) -> Tensor:
        return quantize(event, self.levels)

    def log_det(self) -> float:
        return -self.dim * math.log(self.levels / 2)


class Standardized(LatentTransform):
    """Standardisation of real latents per channel, by the moments of the first batch; initially the identity."""

    mean: Tensor
    std: Tensor

    def __init__(self, latent: Continuous):
        super().__init__()
        per_channel = (latent.shape[0], *[1] * (len(latent.shape) - 1))
        self.positions = math.prod(latent.shape[1:])  # per channel
        self.register_buffer("mean", torch.zeros(per_channel))
        self.register_buffer("std", torch.ones(per_channel))

    def forward(self, z: Tensor, rng: torch.Generator | None = None) -> Tensor:
        return (z - self.mean) / self.std

    def inverse(self, event: Tensor) -> Tensor:
        return event * self.std + self.mean

    def log_det(self) -> Tensor:
        return -self.positions * self.std.log().sum()

    @torch.no_grad()
    def init_statistics(self, z: Tensor) -> None:
        rows = z.transpose(0, 1).flatten(1)
        std, mean = torch.std_mean(rows, dim=1, correction=0)
        if distributed.world_size() > 1:
            variance, mean = distributed.pooled_moments(std.square(), mean)
            std = variance.sqrt()
        self.std.copy_(std.clamp(min=1e-4).view(self.std.shape))
        self.mean.copy_(mean.view(self.mean.shape))


class _Latent(Codec, Composite, Staged):
    """Common base of latent models: a codec, a prior over its latents, and the transform between them.

    A latent model is itself a codec; its real latents are the standardised ones of the prior.
    """

    def __init__(self, codec: Codec, prior: GenerativeModel, codec_share: float):
        super().__init__(codec.event, prior.condition)
        self.codec, self.prior, self.latent = codec, prior, codec.latent
        self.transform = Dequantized(codec.latent) if isinstance(codec.latent, Discrete) else Standardized(codec.latent)
        # A codec without trainable weights has no stage.
        self.codec_share = codec_share if any(p.requires_grad for p in codec.parameters()) else 0.0

    def stages(self) -> list[Stage]:
        prior = PriorStage(self.codec, self.transform, self.prior)
        if not self.codec_share:
            return [Stage("prior", prior, 1.0)]
        return [Stage("codec", self.codec, self.codec_share), Stage("prior", prior, 1 - self.codec_share)]

    def _codec_condition(self, y: Tensor | None) -> Tensor | None:
        """Return y for a conditional codec, None for an unconditional one."""
        return y if self.codec.condition else None

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        """Return the loss of the prior's stage, the last one."""
        return self.stages()[-1].module._loss(x, y, rng)

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        """Initialise the prior's stage, the last one."""
        self.stages()[-1].module._initialize(x, y, rng)

    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return self.stages()[-1].module.after_step(aux, batch_size, rng=rng)

    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        z = self.codec._encode(x, self._codec_condition(y))
        return z if isinstance(self.latent, Discrete) else self.transform(z)

    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        z = z if isinstance(self.latent, Discrete) else self.transform.inverse(z)
        return self.codec._decode(z, self._codec_condition(y))

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        event, nfe, _ = self.prior._sample(n, y, rng)
        return Samples(self.from_prior(event, y, rng), nfe + 1)

    def from_prior(self, event: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        z, c, codec = self.transform.inverse(event), self._codec_condition(y), self.codec
        return codec._generate(z, c, rng) if isinstance(codec, LatentVariable) else codec._decode(z, c)


class LatentModel(_Latent):
    """A latent model without a density, since its codec or its prior lacks one."""


class LatentDensity(_Latent, Density):
    """A latent model with a lower bound of its density: a latent-variable codec with a density as its prior."""

    codec: LatentVariable
    prior: Density

    def __init__(self, codec: LatentVariable, prior: Density, codec_share: float):
        super().__init__(codec, prior, codec_share)
        self.bound, self.num_samples = Bound.LOWER | prior.bound, prior.num_samples

    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        """Return the bound with one posterior sample per event.

        The standard error is None, since the variance over latents cannot be estimated from one sample.

        Args:
            x, y, rng: as in ``Density``.
            num_samples: Monte Carlo samples of the prior's density per latent.
        """
        c = self._codec_condition(y)
        z, log_q = self.codec._infer(x, c, rng)
        event = self.transform(z, rng).to(x.dtype)
        value = self.prior._log_prob(event, y, num_samples, rng).value
        log_likelihood = self.codec._log_likelihood(x, z, c)
        return LogProb(log_likelihood + value + self.transform.log_det() - log_q)


class PriorStage(GenerativeModel):
    """The prior's training stage: its loss on the latents of data. The frozen codec is not a submodule."""

    def __init__(self, codec: Codec, transform: LatentTransform, prior: GenerativeModel):
        super().__init__(codec.event, prior.condition)
        self.transform, self.prior = transform, prior
        self.diagnostics = prior.diagnostics
        self._codec = (codec,)  # a tuple hides it from ``parameters()``

    def _latents(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        (codec,) = self._codec
        c = y if codec.condition else None
        with torch.no_grad(), eval_mode(codec):
            return codec._infer(x, c, rng).z if isinstance(codec, LatentVariable) else codec._encode(x, c)

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        z = self._latents(x, y, rng)
        self.transform.init_statistics(z)
        self.prior._initialize(self.transform(z, rng).to(x.dtype), y, rng)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        z = self._latents(x, y, rng)
        with torch.no_grad():
            event = self.transform(z, rng).to(x.dtype)
        return self.prior._loss(event, y, rng)

    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return self.prior.after_step(aux, batch_size, rng=rng)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Decode samples of the prior to the mean of p(x | z)."""
        (codec,) = self._codec
        event, nfe, _ = self.prior._sample(n, y, rng)
        return Samples(codec._decode(self.transform.inverse(event), y if codec.condition else None), nfe + 1)


def latent(
    event: EventSpec,
    condition: Condition | None = None,
    *,
    codec: GenerativeModel | Callable[..., GenerativeModel],
    prior: Callable[..., GenerativeModel],
    codec_share: float = 0.5,
    conditional_codec: bool = True,
) -> LatentModel | LatentDensity:
    """Build a latent model from a codec and a prior.

    Args:
        event, condition: as in ``GenerativeModel``; a pretrained codec may be unconditional.
        codec: factory of the codec, called as ``codec(event, condition)``; or a pretrained codec, or a latent model whose
            codec is used. A codec without trainable weights has no training stage.
        conditional_codec: whether the factory of the codec is given the condition.
        prior: factory of the prior, called as ``prior(event, condition)`` with the event of the latents.
        codec_share: fraction of the training budget for the codec; the rest is for the prior.

    Raises:
        ValueError: for an incompatible codec or prior.
    """
    if not isinstance(codec, nn.Module):
        codec = codec(event, condition if conditional_codec else None)
    if isinstance(codec, _Latent):
        codec = codec.codec
    if not isinstance(codec, Codec):
        raise ValueError(f"codec: {type(codec).__name__} has no encoder; choose a codec such as vae or vqvae")
    if codec.event != event:
        raise ValueError(f"codec: models {codec.event}, not {event}")
    if codec.condition not in (None, condition):
        raise ValueError(f"codec: its condition is {codec.condition}, that of the model {condition}")
    if not 0 < codec_share < 1:
        raise ValueError(f"codec_share must be between 0 and 1, not {codec_share}")
    space = codec.latent
    codes = space.levels if isinstance(space, Discrete) else None
    try:
        built = prior(EventSpec(space.shape, codes), condition)
    except ValueError as error:
        what = "real numbers" if codes is None else f"{codes} codes"
        raise ValueError(f"prior: incompatible with latents of shape {list(space.shape)} of {what}: {error}") from error
    if isinstance(built, Adversarial | Staged):
        raise ValueError(f"prior: {type(built).__name__} has no single training loss; choose another family")
    if isinstance(codec, LatentVariable) and isinstance(built, Density):
        return LatentDensity(codec, built, codec_share)
    return LatentModel(codec, built, codec_share)
