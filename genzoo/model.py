r"""The interface of generative models, and the abstract classes of their abilities.

A family is a plain ``torch.nn.Module``, usable without a trainer or a configuration file.

    model = VAE((1, 28, 28), levels=256)
    loss = model.loss(x).total
    images = model.sample(16).x

A model has an ``event``, the shape and number of levels of one example, and a ``condition``, see ``genzoo.conditions``.
Abilities are abstract classes that a family inherits, tested by ``isinstance(model, Density)`` and in no other way; a metric
whose ability a family lacks is reported as ``n/a``.

Public methods validate their arguments; families implement the methods of the same name with a leading underscore.

Images with K levels are dequantised to [-1, 1] (see ``genzoo.distributions.discretization``); other data are real vectors.
Time of diffusion and flow models runs from data, ``t = 0``, to noise, ``t = 1``. All randomness is drawn from ``rng``, a
``torch.Generator``; None for torch's global generator.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Flag, auto
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition, Conditioner, DropRate
from genzoo.event import EventSpec


class AbilityError(ValueError):
    """A model without a needed ability; the message is one line and names families that have it."""

    exit_code = 2  # of the command line


class Loss(NamedTuple):
    """The objective of a training step."""

    total: Tensor  # (), minimised
    terms: dict[str, Tensor]  # name -> (), detached; logged as train/<name>
    aux: dict[str, Tensor] = {}  # noqa: RUF012  # detached, for ``after_step``


class Diagnostic(NamedTuple):
    """Label, unit and direction of a logged term of the loss."""

    label: str
    unit: str
    better: Literal["lower", "higher"] | None = None


class LogProb(NamedTuple):
    """Log density of each event in nats, with respect to Lebesgue measure on the data."""

    value: Tensor  # (B,)
    stderr: Tensor | None = None  # (B,), of an estimate


class Samples(NamedTuple):
    """Samples and their number of function evaluations."""

    x: Tensor  # (n, *shape)
    nfe: int  # network evaluations per sample, including guidance and rejected steps
    trajectory: Tensor | None = None  # (steps, n, *shape), if requested


class Bound(Flag):
    """Relation of ``Density.log_prob`` to the log density; a composite model may be both LOWER and ESTIMATE."""

    EXACT = 0
    LOWER = auto()  # a lower bound of the log density
    ESTIMATE = auto()  # an unbiased estimate of the log density

    @property
    def suffix(self) -> str:
        """Suffix of a metric's name; a lower bound of log p bounds bits/dim from above."""
        return ("_upper" if Bound.LOWER in self else "") + ("_estimate" if Bound.ESTIMATE in self else "")


class Continuous(NamedTuple):
    """A latent space of real vectors with a standard normal prior."""

    shape: tuple[int, ...]


class Discrete(NamedTuple):
    """A latent space of integers in 0..levels-1."""

    shape: tuple[int, ...]
    levels: int


class Stage(NamedTuple):
    """One stage of a multi-stage training."""

    name: str
    module: TrainableModel  # the part that is trained
    fraction: float  # of the training budget; the fractions of all stages sum to 1


class _EventFirst(ABCMeta):
    """Accept ``Model((1, 28, 28), levels=256)`` for ``Model(EventSpec((1, 28, 28), levels=256))``."""

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of ``__init__``."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Sequence):
            args = EventSpec(tuple(args[0]), kwargs.pop("levels", None)), *args[1:]
        return super().__call__(*args, **kwargs)


class TrainableModel(nn.Module, ABC, metaclass=_EventFirst):
    """A model with a training loss on data.

    Args:
        event: shape and levels of the data; a shape with the keyword ``levels=`` is accepted too.
        condition: the conditioning variable, None for an unconditional model.
        condition_dropout: probability of replacing a condition by the null value, for classifier-free guidance; for several
            conditions also one for each.
    """

    diagnostics: Mapping[str, Diagnostic] = {}  # by the name of the term of the loss
    eager: tuple[str, ...] = ()  # networks that torch.compile cannot capture in one graph

    def __init__(self, event: EventSpec, condition: Condition | None = None, condition_dropout: DropRate = 0.0):
        super().__init__()
        self.event, self.condition = event, condition
        self.conditioner = Conditioner(condition, condition_dropout)
        # Empty; tracks the device and dtype of a model without parameters.
        self.register_buffer("_placement", torch.empty(0), persistent=False)

    _placement: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        return self.event.shape

    @property
    def levels(self) -> int | None:
        """Number of levels of integer images, None for real vectors."""
        return self.event.levels

    @property
    def dim(self) -> int:
        """Number of dimensions of one event."""
        return self.event.dim

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._placement.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the model."""
        return self._placement.dtype

    def loss(self, x: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Loss:
        """Compute the training loss, without side effects.

        Args:
            x: a batch of data, (B, *shape).
            y: conditions, (B, *condition.shape), of a conditional model.
            rng: source of randomness.

        Raises:
            ValueError: for missing, unexpected or out-of-domain conditions.
        """
        self.conditioner.check(y, len(x))
        return self._loss(x, y, rng)

    @abstractmethod
    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        """Compute the training loss, see ``loss``."""

    @torch.no_grad()
    def initialize(self, x: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> None:
        """Data-dependent initialisation, such as of activation norms; called once, before the first step.

        Args:
            x, y, rng: those of the first call of ``loss``.
        """
        self.conditioner.check(y, len(x))
        self._initialize(x, y, rng)

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        """Data-dependent initialisation, see ``initialize``; none by default."""

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Update gradient-free state, such as codebooks; called after each optimiser step.

        Args:
            aux: ``Loss.aux`` of the step.
            batch_size: global batch size, over all ranks.
            rng: source of randomness, shared with the step's ``loss``.

        Returns:
            Further terms to log, as in ``Loss``.
        """
        return {}


class SharedEmbedding(TrainableModel):
    """A model that embeds events and their conditions, such as images and captions, on one unit sphere.

    Attributes:
        embedding_dim: d.
    """

    embedding_dim: int

    @property
    @abstractmethod
    def scale(self) -> Tensor:
        """Factor kappa of a cosine in the logit of a pair, ()."""

    def embed_image(self, x: Tensor) -> Tensor:
        """Embed events, (B, *shape) -> (B, d), of norm 1."""
        return self._embed_image(x)

    @abstractmethod
    def _embed_image(self, x: Tensor) -> Tensor:
        """Embed events, see ``embed_image``."""

    def embed_text(self, y: Tensor) -> Tensor:
        """Embed conditions, (B, *condition.shape) -> (B, d), of norm 1."""
        self.conditioner.check(y, len(y))
        return self._embed_text(y)

    @abstractmethod
    def _embed_text(self, y: Tensor) -> Tensor:
        """Embed conditions, see ``embed_text``."""

    def similarity(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the cosine of each event and its condition, (B,)."""
        return (self.embed_image(x) * self.embed_text(y)).sum(1)


class GenerativeModel(TrainableModel):
    """A model that can be trained on data and sampled from."""

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Samples:
        """Draw ``n`` events.

        Args:
            n: number of samples.
            y: conditions, (n, *condition.shape); None to draw them from the training distribution.
            rng: source of randomness.

        Raises:
            ValueError: for unexpected or out-of-domain conditions.
        """
        return self._sample(n, self.conditioner.draw(n, y, rng), rng)

    @abstractmethod
    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Draw events, see ``sample``; without gradients."""


class Density(GenerativeModel):
    """A model with an exact, bounded or estimated log density."""

    bound: Bound
    num_samples: int = 1  # default number of Monte Carlo samples of a bound or an estimate

    def log_prob(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        num_samples: int | None = None,
        rng: torch.Generator | None = None,
    ) -> LogProb:
        """Compute the log density in nats.

        Args:
            x: (B, *shape).
            y: conditions, (B, *condition.shape), of a conditional model.
            num_samples: Monte Carlo samples per event of a bound or an estimate; None for the family's default.
            rng: source of randomness.

        Raises:
            ValueError: for invalid conditions, as in ``loss``, and for ``num_samples`` below 1.
        """
        self.conditioner.check(y, len(x))
        num_samples = self.num_samples if num_samples is None else num_samples
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        return self._log_prob(x, y, num_samples, rng)

    @abstractmethod
    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        """Compute the log density, see ``log_prob``."""


class Unnormalised(GenerativeModel):
    """A model of an energy, with p(x | y) = exp(-E(x, y)/T)/Z(y) at temperature T, whose normaliser Z is unknown.

    ``genzoo.evaluation.partition.log_partition`` estimates log Z between two stochastic bounds.

    Attributes:
        temperature: T, of the distribution that is trained and sampled.
        reference_std: standard deviation of the normal distribution about zero from which chains start.
    """

    temperature: float
    reference_std: float

    def energy(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the energy E(x, y) of events, (B, *shape) -> (B,), in units of T nats; differentiable.

        Args:
            x: (B, *shape).
            y: conditions, (B, *condition.shape), of a conditional model.

        Raises:
            ValueError: for invalid conditions, as in ``loss``.
        """
        self.conditioner.check(y, len(x))
        return self._energy(x, y)

    @abstractmethod
    def _energy(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Compute the energy, see ``energy``."""

    def score(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute grad log p(x | y) = -grad E(x, y)/T, (B, *shape) -> (B, *shape), detached; arguments as in ``energy``."""
        self.conditioner.check(y, len(x))
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self._energy(x, y).sum(), x)
        return -gradient / self.temperature

    @abstractmethod
    def chain_settings(self) -> dict[str, Any]:
        """Describe the chains that ``sample`` draws from, for cards: name, steps and temperature, and further settings."""


class Classifier(TrainableModel):
    """A model of the class of an event, p(y | x)."""

    def class_log_probs(self, x: Tensor) -> Tensor:
        """Compute log p(y | x) of every class, (B, *shape) -> (B, n)."""
        return self._class_log_probs(x)

    @abstractmethod
    def _class_log_probs(self, x: Tensor) -> Tensor:
        """Compute the log probabilities, see ``class_log_probs``."""


class Decoder(GenerativeModel):
    """A model with a deterministic map from latents to events."""

    latent: Continuous | Discrete

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Decode latents, (B, *latent.shape) -> (B, *shape)."""
        self.conditioner.check(y, len(z))
        return self._decode(z, y)

    @abstractmethod
    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Decode latents, see ``decode``."""

    def decode_smooth(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Decode continuous latents, (B, *latent.shape) -> (B, *shape), without rounding: differentiable in z."""
        self.conditioner.check(y, len(z))
        return self._decode_smooth(z, y)

    def _decode_smooth(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Decode latents without rounding, see ``decode_smooth``; by default like ``decode``."""
        return self._decode(z, y)


class Codec(Decoder):
    """A model with an encoder and a decoder."""

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Encode events, (B, *shape) -> (B, *latent.shape)."""
        self.conditioner.check(y, len(x))
        return self._encode(x, y)

    @abstractmethod
    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Encode events, see ``encode``."""


class PosteriorSample(NamedTuple):
    """A sample of the posterior q(z | x), with its log density."""

    z: Tensor  # (B, *latent.shape)
    log_q: Tensor  # (B,), log q(z | x); zero where q is a point mass


class LatentVariable(Codec):
    """A codec with an approximate posterior q(z | x) and a likelihood p(x | z), so that any prior p(z) gives a bound:

    log p(x) >= E_q[log p(x | z) + log p(z) - log q(z | x)].
    """

    def infer(self, x: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> PosteriorSample:
        """Sample the posterior q(z | x) of each event, (B, *shape)."""
        self.conditioner.check(y, len(x))
        return self._infer(x, y, rng)

    @abstractmethod
    def _infer(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> PosteriorSample:
        """Sample the posterior, see ``infer``."""

    def log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute log p(x | z) in nats, (B,)."""
        self.conditioner.check(y, len(z))
        return self._log_likelihood(x, z, y)

    @abstractmethod
    def _log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        """Compute log p(x | z), see ``log_likelihood``."""

    def generate(self, z: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Tensor:
        """Return a sample or the mean of p(x | z) for each latent, (B, *shape), whichever ``sample`` uses."""
        self.conditioner.check(y, len(z))
        return self._generate(z, y, rng)

    @abstractmethod
    def _generate(self, z: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        """Return a sample or the mean of p(x | z), see ``generate``."""


class GaussianPosterior(LatentVariable):
    """A latent-variable codec whose posterior is normal with independent coordinates."""

    def divergences(self, x: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Tensor:
        """Compute KL(q(z_i | x) || p(z_i)) of each latent in nats, (B, *latent.shape); the sum is the rate."""
        self.conditioner.check(y, len(x))
        return self._divergences(x, y, rng)

    @abstractmethod
    def _divergences(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        """Compute the divergence of each latent, see ``divergences``."""


class Bijective(Codec):
    """An invertible codec, ``decode(encode(x)) = x``."""

    diagnostics: Mapping[str, Diagnostic] = {  # of flows trained by maximum likelihood
        "log_det_min": Diagnostic("smallest log |det dz/dx| in a batch", "nats/dim"),
        "log_det_max": Diagnostic("largest log |det dz/dx| in a batch", "nats/dim"),
    }

    def forward_and_log_det(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the latent, (B, *latent.shape), and log |det dz/dx|, (B,)."""
        self.conditioner.check(y, len(x))
        return self._forward_and_log_det(x, y)

    @abstractmethod
    def _forward_and_log_det(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return latent and log determinant, see ``forward_and_log_det``."""

    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        return self._forward_and_log_det(x, y)[0]


class Adversarial(GenerativeModel):
    """A model of networks trained alternately on different losses."""

    @abstractmethod
    def networks(self) -> dict[str, nn.Module]:
        """Return the alternately trained networks, by name; they share no parameters."""

    @abstractmethod
    def turn(self, step: int) -> str:
        """Return the name of the network that is updated at a step, counted from 0."""

    def loss(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        turn: str | None = None,
        rng: torch.Generator | None = None,
    ) -> Loss:
        """Compute the loss of one network.

        Args:
            x, y, rng: as in ``GenerativeModel``.
            turn: name of the network, one of ``networks()``; by default the one updated first.

        Raises:
            ValueError: for an unknown name or invalid conditions.
        """
        self.conditioner.check(y, len(x))
        turn = self.turn(0) if turn is None else turn
        if turn not in self.networks():
            raise ValueError(f"turn must be one of {', '.join(self.networks())}, not {turn!r}")
        return self._loss(x, y, rng, turn)

    @abstractmethod
    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None, turn: str = "") -> Loss:
        """Compute the loss of one network, see ``loss``."""


class Staged(GenerativeModel):
    """A model whose parts are trained in successive stages."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """Return the stages in order; a stage does not change the weights of earlier ones."""


class Causal(GenerativeModel):
    """A model that samples the coordinates of an event in a fixed order, each given all preceding ones."""

    @abstractmethod
    def order(self) -> Tensor:
        """Return the place of each coordinate in the order, int64 (*shape); coordinates of one place are drawn at once."""

    @torch.no_grad()
    def complete(
        self, x: Tensor, known: int, y: Tensor | None = None, *, rng: torch.Generator | None = None
    ) -> Samples:
        """Draw the coordinates from place ``known`` on, given those before it: exact draws of a conditional distribution.

        Args:
            x: events whose first coordinates are known, (B, *shape); the others are ignored.
            known: number of known places.
            y: conditions, (B, *condition.shape), of a conditional model.
            rng: source of randomness.

        Raises:
            ValueError: for invalid conditions, as in ``loss``.
        """
        self.conditioner.check(y, len(x))
        return self._complete(x, known, y, rng)

    @abstractmethod
    def _complete(self, x: Tensor, known: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Draw the coordinates from a place on, see ``complete``."""


class Compressible(Density):
    """A density of integers whose factors can be tabulated, for lossless compression (see ``genzoo.compression``)."""

    @abstractmethod
    def check_compressible(self) -> None:
        """Check that the density is one of integers, with these options.

        Raises:
            ValueError: otherwise.
        """


class Factorized(Compressible):
    """A product of conditional probabilities, of one coordinate at a time given those before it."""

    @torch.no_grad()
    def factorize(
        self, n: int, y: Tensor | None, draw: Callable[[Tensor, Tensor], Tensor], *, rng: torch.Generator | None = None
    ) -> None:
        """Visit every coordinate of ``n`` events once.

        Args:
            n: number of events.
            y: conditions, (n, *condition.shape), of a conditional model.
            draw: called as ``draw(log_probs, index)`` with the log probabilities of the K levels of a coordinate, (n, K), and
                its index in each flattened event, (n,) int64; returns its levels, (n,) int64.
            rng: of the order, where it is random.
        """
        self.conditioner.check(y, n)
        self._factorize(n, y, draw, rng)

    @abstractmethod
    def _factorize(
        self, n: int, y: Tensor | None, draw: Callable[[Tensor, Tensor], Tensor], rng: torch.Generator | None
    ) -> None:
        """Visit every coordinate, see ``factorize``."""


class Hierarchical(Compressible):
    """A density of integers given latents, whose noise eps_l is N(0, I) a priori and has independent normal posteriors."""

    @torch.no_grad()
    def descend(
        self, n: int, y: Tensor | None, draw: Callable[[Tensor, Tensor], Tensor], x: Tensor | None = None
    ) -> Callable[[Tensor], Tensor]:
        """Visit the layers of latents from top to bottom.

        Args:
            n: number of events.
            y: conditions, (n, *condition.shape), of a conditional model.
            draw: called as ``draw(mean, log_std)`` with the moments of the noise of a layer given the layers above, and given
                ``x``, (n, ...) each; returns the noise.
            x: events, (n, *shape); None for the prior, whose moments are zeros.

        Returns:
            A function from the values of the first c channels, (n, c, ...), to the log probabilities of the levels of the
            next one given the latents, (n, K, ...).
        """
        self.conditioner.check(y, n)
        return self._descend(n, y, draw, x)

    @abstractmethod
    def _descend(
        self, n: int, y: Tensor | None, draw: Callable[[Tensor, Tensor], Tensor], x: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        """Visit the layers of latents, see ``descend``."""


class Markov(Compressible):
    """A chain of states from data, x_0, to noise, x_T, with normal steps in both directions.

    Attributes:
        chain_length: T.
    """

    chain_length: int

    @abstractmethod
    def forward_step(self, i: int) -> tuple[float, float]:
        """Return scale a and standard deviation s of q(x_{i+1} | x_i) = N(a x_i, s^2 I)."""

    @abstractmethod
    def backward_step(self, i: int, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and log standard deviation of p(x_i | x_{i+1}), (n, *shape) each, at x_{i+1}, for i > 0."""

    @abstractmethod
    def level_log_probs(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Return the log probabilities of the levels of x_0 given x_1, (n, K, *shape)."""


class Precomputed(GenerativeModel):
    """A model whose loss uses tensors that are computed once, before the first step.

    They depend on the model's arguments alone and are part neither of its weights nor of their EMA. A trainer computes them
    outside the timed budget and stores them beside its checkpoints.
    """

    @abstractmethod
    def precomputed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors; empty if the loss needs none."""

    @abstractmethod
    def precompute(self) -> dict[str, Tensor]:
        """Return the tensors by name, computed on the first call.

        In distributed training each rank computes a part, and all ranks return all tensors.
        """

    @abstractmethod
    def set_precomputed(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the tensors returned by ``precompute`` in another process.

        Raises:
            ValueError: for values outside their domain.
        """


class Composite(GenerativeModel):
    """A model that maps samples of a prior, another generative model with an exchangeable sampler.

    The prior may depend on samples of further parts: then it is the last that is sampled.
    """

    prior: GenerativeModel

    def parts(self) -> list[GenerativeModel]:
        """Return all models that are sampled, the prior first."""
        return [self.prior]

    @abstractmethod
    def from_prior(self, event: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        """Map events of the prior, (B, *prior.shape) -> (B, *shape), as ``sample`` does."""


class Augmented(Composite):
    """A composite model whose later parts are conditioned on samples of earlier ones with noise.

    References:
        Ho et al., "Cascaded Diffusion Models for High Fidelity Image Generation", 2022, https://arxiv.org/abs/2106.15282
        (section 4: conditioning augmentation).
    """

    augmentation: float  # noise level of sampling, in [0, 1]
    max_augmentation: float  # of training

    def check_augmentation(self, augmentation: float) -> None:
        """Check that a noise level is among those of training.

        Raises:
            ValueError: otherwise.
        """
        if not 0 <= augmentation <= self.max_augmentation:
            raise ValueError(
                f"augmentation={augmentation}: must be in [0, {self.max_augmentation}], the noise levels of training"
            )


class ImageEmbedding(GenerativeModel):
    """A model that draws events of a given embedding, in a space in which conditions have embeddings, too.

    Attributes:
        embedding_dim: d.
        prior_guidance: scale of the guidance of the embeddings that ``sample`` draws.

    References:
        Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents", 2022,
        https://arxiv.org/abs/2204.06125 (section 3).
    """

    embedding_dim: int
    prior_guidance: float

    def embed_image(self, x: Tensor) -> Tensor:
        """Embed events, (B, *shape) -> (B, d), of norm 1."""
        return self._embed_image(x)

    @abstractmethod
    def _embed_image(self, x: Tensor) -> Tensor:
        """Embed events, see ``embed_image``."""

    def embed_text(self, y: Tensor) -> Tensor:
        """Embed conditions, (B, *condition.shape) -> (B, d), of norm 1."""
        self.conditioner.check(y, len(y))
        return self._embed_text(y)

    @abstractmethod
    def _embed_text(self, y: Tensor) -> Tensor:
        """Embed conditions, see ``embed_text``."""

    @torch.no_grad()
    def from_embedding(
        self,
        e: Tensor,
        y: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        rng: torch.Generator | None = None,
    ) -> Samples:
        """Draw events of embeddings.

        Args:
            e: embeddings of events, (B, d), of norm 1.
            y: conditions, (B, *condition.shape); None for those of the embedding alone.
            noise: latent noise of each event, (B, *shape), from ``invert``; None to draw it.
            rng: source of randomness.

        Raises:
            ValueError: for embeddings of another shape, and invalid conditions.
            AbilityError: for noise of a model without a deterministic map from noise to events.
        """
        if e.ndim != 2 or e.shape[1] != self.embedding_dim:
            raise ValueError(f"e must be (B, {self.embedding_dim}), not {tuple(e.shape)}")
        if y is not None:
            self.conditioner.check(y, len(e))
        return self._from_embedding(e, y, noise, rng)

    @abstractmethod
    def _from_embedding(
        self, e: Tensor, y: Tensor | None, noise: Tensor | None, rng: torch.Generator | None
    ) -> Samples:
        """Draw events of embeddings, see ``from_embedding``."""

    @torch.no_grad()
    def invert(self, x: Tensor, e: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the noise, (B, *shape), from which ``from_embedding`` restores events.

        Args:
            x: events, (B, *shape).
            e: their embeddings, (B, d).
            y: conditions, (B, *condition.shape); None for those of the embedding alone.

        Raises:
            AbilityError: for a model without a deterministic map from noise to events.
        """
        return self._invert(x, e, y)

    @abstractmethod
    def _invert(self, x: Tensor, e: Tensor, y: Tensor | None) -> Tensor:
        """Return the noise of events, see ``invert``."""

    @abstractmethod
    def check_prior_guidance(self, scale: float) -> None:
        """Check a scale of ``prior_guidance``.

        Raises:
            ValueError: for a prior that cannot be guided.
        """


class LogitGuided(GenerativeModel):
    """A model that draws values step by step from predicted probabilities, which guidance can sharpen.

    Conditional log probabilities c and unconditional ones u are combined to ``u + s (c - u)``, and normalised.

    References:
        Gafni et al., "Make-A-Scene", 2022, https://arxiv.org/abs/2203.13131 (section 3.4).
    """

    guidance_scale: float = 1.0  # s; 1 for the model itself

    @abstractmethod
    def check_guidance(self) -> None:
        """Check that the model can be guided.

        Raises:
            ValueError: for an unconditional model, one without dropped conditions, and values without probabilities.
        """


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set a model to evaluation mode in this context: no dropout, no updates of running statistics."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def frozen(model: TrainableModel) -> TrainableModel:
    """Freeze the weights of a pretrained model."""
    return model.requires_grad_(False)


def reconstruct(codec: Codec, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Encode and decode a batch, (B, *shape) -> (B, *shape)."""
    return codec.decode(codec.encode(x, y), y)
