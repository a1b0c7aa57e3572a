r"""unCLIP (DALL-E 2): draw the embedding of an image given a text, then an image given its embedding.

A contrastive network embeds images x to f(x) and texts c to g(c) on one sphere. Since f(x) is a function of x,

    p(x | c) = p(x, f(x) | c) = p(f(x) | c) p(x | f(x), c),

with two models, trained one after the other while the contrastive network is frozen:

    prior      p(e | g(c), c)     of the embeddings, standardised per coordinate by the moments of the first batch
    decoder    p(x | e, c)

Both are any generative models; by default diffusion, whose prior predicts the embedding itself. In the training of the decoder
the embedding and the text are dropped independently of each other, so that it also draws images of an embedding alone.

To sample, the prior draws some embeddings, of which the one with the largest cosine to g(c) is decoded. This selection, like
guidance, trades diversity for agreement with the text; with one embedding the samples are those of the joint model.

An image is varied by decoding its own embedding with new noise, or other embeddings with the noise of the image, found by
integrating the decoder's probability-flow ODE backwards: great circles between two images, and from an image towards the
difference of two texts, ``(g(c1) - g(c0))/|g(c1) - g(c0)|``.

References:
    Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents", 2022, https://arxiv.org/abs/2204.06125
    (section 2.1: dropping; 2.2: the prior, the better of two embeddings; 3: variations, interpolations, differences of texts).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition, Joint, Vector
from genzoo.diffusion.denoiser import Denoiser
from genzoo.diffusion.guidance import ClassifierFreeGuidance, guide
from genzoo.diffusion.probability_flow import ode_decode, ode_encode
from genzoo.distributions.discretization import to_bin_centers
from genzoo.event import EventSpec
from genzoo.model import (
    AbilityError,
    Adversarial,
    Composite,
    GenerativeModel,
    ImageEmbedding,
    Loss,
    Samples,
    SharedEmbedding,
    Stage,
    Staged,
)
from genzoo.numerics import distributed

TOLERANCE = 1e-4  # of the ODE of the decoder


class Standardisation(nn.Module):
    """Standardisation of vectors per coordinate, (B, d), by the moments of a first batch; initially the identity."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def forward(self, e: Tensor) -> Tensor:
        return (e - self.mean) / self.std

    def inverse(self, z: Tensor) -> Tensor:
        """Return the vectors of standardised ones."""
        return z * self.std + self.mean

    @torch.no_grad()
    def init_statistics(self, e: Tensor) -> None:
        """Estimate the moments from a batch, over all processes."""
        variance, mean = distributed.pooled_moments(*torch.var_mean(e, dim=0, correction=0))
        self.std.copy_(variance.sqrt().clamp(min=1e-4))
        self.mean.copy_(mean)


class UnCLIP(ImageEmbedding, Composite, Staged):
    """A contrastive network, a prior over embeddings of images, and a decoder.

    Args:
        event, condition: as in ``GenerativeModel``; the condition is that of the texts.
        encoder: factory of the contrastive network, called as ``encoder(event, condition)``; or a pretrained one, which has no
            training stage.
        prior: factory of the model of embeddings, called as ``prior(event, condition)`` with a vector of the embedding's
            dimension and the joint condition of the text's embedding and the text.
        decoder: factory of the model of images, called as ``decoder(event, condition)`` with the joint condition of the
            embedding and the text, which are dropped independently with ``condition_dropout=[0.1, 0.5]``.
        candidates: number of embeddings that the prior draws for each sample, of which one is decoded.
        prior_guidance: scale of the prior's classifier-free guidance.
        encoder_fraction: fraction of the training budget for the contrastive network, if it is trained.
        prior_fraction: fraction of the rest for the prior.

    Attributes:
        prior: the decoder, whose sampler, path and guidance are those of the model; see ``Composite``.
        embedding_prior: the model of embeddings.

    Raises:
        ValueError: for data without conditions, and parts that do not fit.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        encoder: nn.Module | Callable[..., SharedEmbedding],
        prior: Callable[..., GenerativeModel],
        decoder: Callable[..., GenerativeModel],
        candidates: int = 2,
        prior_guidance: float = 1.0,
        encoder_fraction: float = 0.2,
        prior_fraction: float = 0.25,
    ):
        super().__init__(event, condition)
        if condition is None:
            raise ValueError("unclip needs data with captions or classes; set data.conditional=true")
        if candidates < 1:
            raise ValueError(f"candidates must be at least 1, not {candidates}")
        for name, fraction in (("encoder_fraction", encoder_fraction), ("prior_fraction", prior_fraction)):
            if not 0 < fraction < 1:
                raise ValueError(f"{name} must be between 0 and 1, not {fraction}")
        built = encoder if isinstance(encoder, nn.Module) else encoder(event, condition)
        if not isinstance(built, SharedEmbedding):
            raise ValueError(f"encoder: {type(built).__name__} is no contrastive network; choose a run of model=clip")
        if (built.event, built.condition) != (event, condition):
            raise ValueError(f"encoder: is for {built.event}, {built.condition}, the data are {event}, {condition}")
        self.encoder, self.embedding_dim = built, built.embedding_dim
        joint = Joint((Vector(built.embedding_dim), condition))
        self.joint, self.candidates = joint, candidates
        self.embedding_prior = prior(EventSpec((built.embedding_dim,)), joint)
        self.prior = decoder(event, joint)
        for part in self.parts():
            if isinstance(part, Adversarial | Staged):
                raise ValueError(f"{type(part).__name__} has no single training loss; choose another family")
        self.transform = Standardisation(built.embedding_dim)
        trained = any(p.requires_grad for p in built.parameters())
        self.fractions = (encoder_fraction if trained else 0.0, prior_fraction)
        self.prior_guidance = prior_guidance
        self.check_prior_guidance(prior_guidance)

    def parts(self) -> list[GenerativeModel]:
        return [self.prior, self.embedding_prior]

    def stages(self) -> list[Stage]:
        of_encoder, of_prior = self.fractions
        stages = [
            Stage("prior", PriorStage(self), (1 - of_encoder) * of_prior),
            Stage("decoder", DecoderStage(self), (1 - of_encoder) * (1 - of_prior)),
        ]
        return [Stage("contrastive", self.encoder, of_encoder), *stages] if of_encoder else stages

    # Training

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        """Return the loss of the decoder's stage, the last one."""
        return self.stages()[-1].module._loss(x, y, rng)

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        """Initialise the decoder's stage, the last one."""
        self.stages()[-1].module._initialize(x, y, rng)

    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return self.stages()[-1].module.after_step(aux, batch_size, rng=rng)

    # Embeddings

    def _embed_image(self, x: Tensor) -> Tensor:
        with _frozen(self.encoder):
            return self.encoder._embed_image(x)

    def _embed_text(self, y: Tensor) -> Tensor:
        with _frozen(self.encoder):
            return self.encoder._embed_text(y)

    def check_prior_guidance(self, scale: float) -> None:
        if scale != 1:
            self._guided_prior(scale)

    def _guided_prior(self, scale: float) -> GenerativeModel:
        try:
            return guide(self.embedding_prior, functools.partial(ClassifierFreeGuidance, scale=scale))
        except ValueError as error:
            raise ValueError(f"prior_guidance={scale}: {error}") from error

    # Sampling

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        assert y is not None
        z, nfe, _ = self.draw_embeddings(y, rng)
        x, evaluations, trajectory = self.prior._sample(n, self.joint.join(z, y), rng)
        return Samples(x, nfe + evaluations, trajectory)

    def draw_embeddings(self, y: Tensor, rng: torch.Generator | None) -> Samples:
        """Draw standardised embeddings of images for texts: of several the one nearest to the text, (n, d)."""
        text = self._embed_text(y)
        prior = self.embedding_prior if self.prior_guidance == 1 else self._guided_prior(self.prior_guidance)
        given, nfe, drawn, cosines = self.joint.join(self.transform(text), y), 0, list[Tensor](), list[Tensor]()
        for _ in range(self.candidates):
            z, evaluations, _ = prior._sample(len(y), given, rng)
            nfe += evaluations
            drawn.append(z)
            cosines.append(torch.cosine_similarity(self.transform.inverse(z), text, dim=1))
        best = torch.stack(cosines).argmax(0)
        return Samples(torch.stack(drawn)[best, torch.arange(len(y), device=y.device)], nfe)

    def from_prior(self, event: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        return event

    def _condition_of(self, e: Tensor, y: Tensor | None) -> Tensor:
        """Return the decoder's condition for embeddings on the sphere and texts, None for the null text."""
        if y is None:
            y = self.joint.parts[1].missing(len(e), e.device, e.dtype)
        return self.joint.join(self.transform(e), y)

    def _from_embedding(
        self, e: Tensor, y: Tensor | None, noise: Tensor | None, rng: torch.Generator | None
    ) -> Samples:
        given = self._condition_of(e, y)
        if noise is None:
            return self.prior._sample(len(e), given, rng)
        return Samples(ode_decode(self._decoder_of_noise(), noise, given, TOLERANCE, TOLERANCE), 0)

    def _invert(self, x: Tensor, e: Tensor, y: Tensor | None) -> Tensor:
        return ode_encode(self._decoder_of_noise(), x, self._condition_of(e, y), TOLERANCE, TOLERANCE)

    def _decoder_of_noise(self) -> Denoiser:
        """Return the decoder as a denoiser, whose ODE maps noise to images.

        Raises:
            AbilityError: for another decoder.
        """
        if not isinstance(self.prior, Denoiser):
            raise AbilityError(
                f"{type(self.prior).__name__} has no noise to be found: choose ddpm, score_sde or flow_matching as decoder"
            )
        return self.prior


@contextlib.contextmanager
def _frozen(encoder: nn.Module) -> Iterator[None]:
    """Set a network to evaluation mode: no dropout, no updates of running statistics."""
    training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(training)


class _UnCLIPStage(GenerativeModel):
    """A training stage of a part; the frozen encoder and the whole are no submodules."""

    def __init__(self, whole: UnCLIP, part: GenerativeModel):
        super().__init__(whole.event, whole.condition)
        self.transform, self.part = whole.transform, part
        self.diagnostics = part.diagnostics
        self._whole = (whole,)  # a tuple hides it from ``parameters()``

    @torch.no_grad()
    def _embeddings(self, x: Tensor) -> Tensor:
        """Embed a training batch, without the noise of dequantisation."""
        (whole,) = self._whole
        return whole._embed_image(x if self.levels is None else to_bin_centers(x, self.levels))

    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return self.part.after_step(aux, batch_size, rng=rng)

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Sample the whole model."""
        (whole,) = self._whole
        return whole._sample(n, y, rng)


class PriorStage(_UnCLIPStage):
    """The stage of the prior: its loss on embeddings of images, given those of their texts, and the texts."""

    def __init__(self, whole: UnCLIP):
        super().__init__(whole, whole.embedding_prior)

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        e = self._embeddings(x)
        self.transform.init_statistics(e)
        self.part._initialize(self.transform(e), self._texts(y), rng)

    @torch.no_grad()
    def _texts(self, y: Tensor | None) -> Tensor:
        (whole,) = self._whole
        assert y is not None
        return whole.joint.join(self.transform(whole._embed_text(y)), y)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        return self.part._loss(self.transform(self._embeddings(x)), self._texts(y), rng)


class DecoderStage(_UnCLIPStage):
    """The stage of the decoder: its loss on images, given their embeddings and texts."""

    def __init__(self, whole: UnCLIP):
        super().__init__(whole, whole.prior)

    def _given(self, x: Tensor, y: Tensor | None) -> Tensor:
        (whole,) = self._whole
        assert y is not None
        return whole.joint.join(self.transform(self._embeddings(x)), y)

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        self.part._initialize(x, self._given(x, y), rng)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        return self.part._loss(x, self._given(x, y), rng)
