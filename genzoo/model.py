r"""The interface of every family: what a generative model is, and the abilities that it may have.

A family is a plain ``torch.nn.Module``: it needs no trainer and no configuration file.

    model = VAE((1, 28, 28), levels=256)
    loss = model.loss(x).total
    images = model.sample(16).x

A model is described by two values: its ``event``, the shape of one example and the number of its levels, and its
``condition``, see ``genzoo.conditions``. Abilities are abstract classes that a family inherits: ``isinstance(model, Density)``.
The rest of genzoo tests for nothing else; a figure that needs an ability which a family lacks is shown as ``n/a``.

Public methods check their arguments here, once; families implement the methods of the same name with a leading underscore.

Data are points of [-1, 1] where they come from images with K levels (see ``genzoo.distributions.discretization``), any real
vectors otherwise. Time of diffusion and flow models runs from ``t = 0``, data, to ``t = 1``, noise. Randomness comes from
``rng``, a ``torch.Generator``; without one from torch's global generator.
"""

from __future__ import annotations

import inspect
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Flag, auto
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from genzoo.conditions import Condition, Conditioner
from genzoo.event import EventSpec


class Loss(NamedTuple):
    """The objective of a training step."""

    total: Tensor  # (), minimised
    terms: dict[str, Tensor]  # name -> (), detached; logged as train/<name>
    aux: dict[str, Tensor] = {}  # noqa: RUF012  # detached, for ``after_step``


class Diagnostic(NamedTuple):
    """How a term of the loss is shown: label, unit, and which direction is better."""

    label: str
    unit: str
    better: Literal["lower", "higher"] | None = None  # None where neither is


class LogProb(NamedTuple):
    """Log density of each event in nats, with respect to Lebesgue measure on the data."""

    value: Tensor  # (B,)
    stderr: Tensor | None = None  # (B,), where the value is an estimate


class Samples(NamedTuple):
    """Samples and their cost."""

    x: Tensor  # (n, *shape)
    nfe: int  # evaluations of the network for each sample, those of guidance and rejected steps included
    trajectory: Tensor | None = None  # (steps, n, *shape), where requested


class Bound(Flag):
    """What ``Density.log_prob`` returns; a model made of parts may be LOWER and an ESTIMATE at once."""

    EXACT = 0
    LOWER = auto()  # a lower bound of the log density
    ESTIMATE = auto()  # an unbiased estimate of the log density

    @property
    def suffix(self) -> str:
        """The end of a metric's name: a lower bound of log p bounds bits/dim from above."""
        return ("_upper" if Bound.LOWER in self else "") + ("_estimate" if Bound.ESTIMATE in self else "")


class Continuous(NamedTuple):
    """A latent space of real vectors with a standard normal prior."""

    shape: tuple[int, ...]


class Discrete(NamedTuple):
    """A latent space of integers in 0..levels-1."""

    shape: tuple[int, ...]
    levels: int


class Stage(NamedTuple):
    """One part of a training that goes in stages."""

    name: str
    module: GenerativeModel  # whose loss is minimised and whose weights move
    share: float  # of the budget; the shares of all stages sum to 1


class _EventFirst(ABCMeta):
    """Lets ``Model((1, 28, 28), levels=256)`` stand for ``Model(EventSpec((1, 28, 28), levels=256))``."""

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of ``__init__``, for whoever inspects the class."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Sequence):
            args = EventSpec(tuple(args[0]), kwargs.pop("levels", None)), *args[1:]
        return super().__call__(*args, **kwargs)


class GenerativeModel(nn.Module, ABC, metaclass=_EventFirst):
    """A model that can be trained on data and sampled from.

    Args:
        event: of the data; a shape may be given in its place, with ``levels=`` as a keyword.
        condition: what the model is conditioned on, None for nothing.
        condition_dropout: how often training replaces a condition by the null value, for classifier-free guidance.
    """

    diagnostics: Mapping[str, Diagnostic] = {}  # of terms of the loss, by their names
    eager: tuple[str, ...] = ()  # networks that torch.compile cannot take as a whole

    def __init__(self, event: EventSpec, condition: Condition | None = None, condition_dropout: float = 0.0):
        super().__init__()
        self.event, self.condition = event, condition
        self.conditioner = Conditioner(condition, condition_dropout)
        # Of no elements: it has the device and dtype of the model, which may have no weights.
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
        """Compute the objective of a training step; it changes no state of the model.

        Args:
            x: a batch of data, (B, *shape).
            y: conditions, (B, *condition.shape), of a conditional model.
            rng: source of all noise.

        Raises:
            ValueError: conditions given to an unconditional model, missing for a conditional one, or out of their domain.
        """
        self.conditioner.check(y, len(x))
        return self._loss(x, y, rng)

    @abstractmethod
    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        """Compute the objective, see ``loss``."""

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Samples:
        """Draw ``n`` events.

        Args:
            n: number of samples.
            y: conditions, (n, *condition.shape); without them a conditional model draws conditions as often as in training.
            rng: source of all noise.

        Raises:
            ValueError: conditions given to an unconditional model, or out of their domain.
        """
        return self._sample(n, self.conditioner.draw(n, y, rng), rng)

    @abstractmethod
    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        """Draw events, see ``sample``; without gradients."""

    @torch.no_grad()
    def initialize(self, x: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> None:
        """Initialise from the first training batch, such as activation norms; called once, before the first step.

        Args:
            x, y, rng: as in ``loss``; the noise is that of the first step.
        """
        self.conditioner.check(y, len(x))
        self._initialize(x, y, rng)

    def _initialize(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> None:
        """Initialise from the first batch, see ``initialize``; by default nothing."""

    @torch.no_grad()
    def after_step(
        self, aux: Mapping[str, Tensor], batch_size: int, *, rng: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Update what training changes without a gradient, such as codebooks; called after each optimiser step.

        Args:
            aux: of the step's ``Loss``.
            batch_size: examples of the step, on all ranks.
            rng: source of noise, the one that the step's ``loss`` has drawn from.

        Returns:
            Further terms to log, as in ``Loss``.
        """
        return {}


class Density(GenerativeModel):
    """A model with a log density, or a bound or an estimate of it."""

    bound: Bound
    num_samples: int = 1  # by default, of a bound or an estimate

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
            num_samples: draws that an estimate or a bound uses for each event, not used where it is exact; None for
                the family's default.
            rng: source of these draws.

        Raises:
            ValueError: for wrong conditions, as in ``loss``, and for ``num_samples`` below 1.
        """
        self.conditioner.check(y, len(x))
        num_samples = self.num_samples if num_samples is None else num_samples
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, not {num_samples}")
        return self._log_prob(x, y, num_samples, rng)

    @abstractmethod
    def _log_prob(self, x: Tensor, y: Tensor | None, num_samples: int, rng: torch.Generator | None) -> LogProb:
        """Compute the log density, see ``log_prob``."""


class Decoder(GenerativeModel):
    """A model that maps a latent to an event."""

    latent: Continuous | Discrete

    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Decode latents, (B, *latent.shape) -> (B, *shape)."""
        self.conditioner.check(y, len(z))
        return self._decode(z, y)

    @abstractmethod
    def _decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Decode latents, see ``decode``."""


class Codec(Decoder):
    """A decoder with an encoder."""

    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Encode events, (B, *shape) -> (B, *latent.shape)."""
        self.conditioner.check(y, len(x))
        return self._encode(x, y)

    @abstractmethod
    def _encode(self, x: Tensor, y: Tensor | None) -> Tensor:
        """Encode events, see ``encode``."""


class Inferred(NamedTuple):
    """A latent drawn from q(z | x)."""

    z: Tensor  # (B, *latent.shape)
    log_q: Tensor  # (B,), log q(z | x); zero where q is a point mass


class LatentVariable(Codec):
    """A codec with distributions q(z | x) and p(x | z), so that any prior p(z) gives a bound:

    log p(x) >= E_q[log p(x | z) + log p(z) - log q(z | x)].
    """

    def infer(self, x: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Inferred:
        """Draw a latent of each event, (B, *shape), from q(z | x)."""
        self.conditioner.check(y, len(x))
        return self._infer(x, y, rng)

    @abstractmethod
    def _infer(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Inferred:
        """Draw latents, see ``infer``."""

    def log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute log p(x | z) in nats, (B,)."""
        self.conditioner.check(y, len(z))
        return self._log_likelihood(x, z, y)

    @abstractmethod
    def _log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        """Compute log p(x | z), see ``log_likelihood``."""

    def generate(self, z: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Tensor:
        """Return an event of p(x | z) for each latent, (B, *shape), as ``sample`` does: a draw of it, or its mean."""
        self.conditioner.check(y, len(z))
        return self._generate(z, y, rng)

    @abstractmethod
    def _generate(self, z: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        """Return events of p(x | z), see ``generate``."""


class Bijective(Codec):
    """A codec without loss: ``decode(encode(x))`` is ``x``."""

    diagnostics: Mapping[str, Diagnostic] = {  # of flows that are trained on their likelihood
        "log_det_min": Diagnostic("least log |det dz/dx| in a batch", "nats/dim"),
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
    """A model whose networks minimise different losses in turns."""

    @abstractmethod
    def players(self) -> dict[str, nn.Module]:
        """Return the networks that are trained in turns, by name; they share no weights."""

    @abstractmethod
    def turn(self, step: int) -> str:
        """Return the name of the network that is trained at a step, counted from 0."""

    def loss(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        turn: str | None = None,
        rng: torch.Generator | None = None,
    ) -> Loss:
        """Compute the objective of one network.

        Args:
            x, y, rng: as in ``GenerativeModel``.
            turn: the network, one of ``players()``; by default that of the first step.

        Raises:
            ValueError: for another name, or wrong conditions.
        """
        self.conditioner.check(y, len(x))
        turn = self.turn(0) if turn is None else turn
        if turn not in self.players():
            raise ValueError(f"turn must be one of {', '.join(self.players())}, not {turn!r}")
        return self._loss(x, y, rng, turn)

    @abstractmethod
    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None, turn: str = "") -> Loss:
        """Compute the objective of one network, see ``loss``."""


class Staged(GenerativeModel):
    """A model whose parts are trained one after another."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """Return the stages in their order; a stage does not change the weights of earlier ones."""


class Precomputed(GenerativeModel):
    """A model whose loss uses tensors that are computed once, before the first step.

    They follow from the model's arguments alone and are not part of its weights, nor of the average of these. A trainer
    computes them before its clock starts and keeps them beside its checkpoints.
    """

    @abstractmethod
    def precomputed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors; empty where the loss needs none."""

    @abstractmethod
    def precompute(self) -> dict[str, Tensor]:
        """Compute the tensors, unless they are there, and return them by name.

        Of several processes that train together each computes a part, and all of them return all.
        """

    @abstractmethod
    def set_precomputed(self, tensors: Mapping[str, Tensor]) -> None:
        """Set tensors of these names and shapes, which ``precompute`` returned in another process.

        Raises:
            ValueError: for values that it cannot have returned.
        """


class Composite(GenerativeModel):
    """A model that maps samples of another one, its prior, whose sampler may be exchanged."""

    prior: GenerativeModel


def frozen(model: GenerativeModel) -> GenerativeModel:
    """Exclude the weights of a finished model from training; others may build on them."""
    return model.requires_grad_(False)


def reconstruct(codec: Codec, x: Tensor, y: Tensor | None = None) -> Tensor:
    """Encode and decode a batch, (B, *shape) -> (B, *shape)."""
    return codec.decode(codec.encode(x, y), y)


def interpolate(decoder: Decoder, start: Tensor, end: Tensor, steps: int, y: Tensor | None = None) -> Tensor:
    """Decode points on the great circle between pairs of continuous latents.

    A straight line between two draws of a high-dimensional normal law leaves the shell where its mass is.

    Args:
        decoder: a decoder with a continuous latent.
        start, end: (B, *latent.shape).
        steps: how many points, both ends included.
        y: classes, (B,), for a conditional model.

    Returns:
        (steps, B, *shape).

    Raises:
        ValueError: for a discrete latent.

    References:
        White, "Sampling Generative Networks", 2016, https://arxiv.org/abs/1609.04468 (section 2.1, slerp).
    """
    if not isinstance(decoder.latent, Continuous):
        raise ValueError("interpolation needs a continuous latent")
    a, b = start.flatten(1), end.flatten(1)
    cosine = nn.functional.cosine_similarity(a, b, dim=1, eps=1e-12).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.arccos().unsqueeze(1)
    points = []
    for w in torch.linspace(0, 1, steps, device=start.device, dtype=start.dtype):
        z = (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)
        points.append(decoder.decode(z.view_as(start), y))
    return torch.stack(points)
