r"""The interface of every family: what a generative model is, and the abilities that it may honestly have.

A family is a plain ``torch.nn.Module``: it needs no trainer and no configuration file.

    model = VAE(...)
    loss, terms = model.loss(x)
    images = model.sample(16).x

What a family can do beyond that is said by the abstract classes that it inherits: ``isinstance(model, Density)`` is the
only question that the rest of genzoo asks. What a family cannot do it does not inherit, and is shown as ``n/a``.

Data are points of [-1, 1] where they come from images with K levels (see ``genzoo.distributions.discretization``), any
real vectors
otherwise. The clock of noising families runs from ``t = 0``, data, to ``t = 1``, noise. Randomness comes from ``rng``, a
``torch.Generator``; without one from torch's global generator.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from enum import Flag, auto
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from genzoo.diffusion.path import GaussianPath, Parameterization, Prediction, cast_like
from genzoo.numerics.random import categorical

_LABELS_CHECKED: ContextVar[bool] = ContextVar("labels_checked", default=False)


@contextlib.contextmanager
def labels_checked() -> Iterator[None]:
    """Take the values of classes as checked in this context, for calls from one model to another."""
    token = _LABELS_CHECKED.set(True)
    try:
        yield
    finally:
        _LABELS_CHECKED.reset(token)


class Loss(NamedTuple):
    """What a training step minimises."""

    total: Tensor  # (), has a gradient
    terms: dict[str, Tensor]  # name -> (), detached; logged as train/<name>


class Diagnostic(NamedTuple):
    """What a term of the loss says of the health of a training, for pages that know no family."""

    label: str
    unit: str
    better: Literal["lower", "higher"] | None = None  # None where neither is


class LogProb(NamedTuple):
    """Log density of each event in nats, on the measure of the data."""

    value: Tensor  # (B,)
    stderr: Tensor | None = None  # (B,), where the value is an estimate


class Samples(NamedTuple):
    """What a sampler made, and what it cost."""

    x: Tensor  # (n, *shape)
    nfe: int  # evaluations of the network for each sample; guidance and rejected steps count
    trajectory: Tensor | None = None  # (steps, n, *shape), where it was asked for


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


class GenerativeModel(nn.Module, ABC):
    """A model that can be trained on data and sampled from.

    Args:
        shape: of one event, (channels, height, width) or (2,).
        levels: how many levels the data have where they are integer images on [-1, 1]; None for other vectors.
        num_classes: how many classes the model is conditioned on, 0 for none.
    """

    class_probs: Tensor
    diagnostics: Mapping[str, Diagnostic] = {}  # of terms of the loss, by their names
    eager: tuple[str, ...] = ()  # networks of its own that torch.compile cannot take as a whole

    def __init__(self, shape: Sequence[int], levels: int | None = None, num_classes: int = 0):
        super().__init__()
        if not shape or any(side < 1 for side in shape):
            raise ValueError(f"shape must hold positive sizes, not {tuple(shape)}")
        if levels is not None and levels < 2:
            raise ValueError(f"levels must be at least 2, or null for data that are no integers, not {levels}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be 0 (unconditional) or more, not {num_classes}")
        self.shape = tuple(shape)
        self.levels = levels
        self.num_classes = num_classes
        # How often each class occurs in training; the trainer fills it in.
        self.register_buffer("class_probs", torch.full((num_classes,), 1 / max(num_classes, 1)))

    @property
    def dim(self) -> int:
        """Number of dimensions of one event."""
        return int(torch.Size(self.shape).numel())

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.class_probs.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its numbers."""
        return self.class_probs.dtype

    @abstractmethod
    def loss(
        self, x: Tensor, y: Tensor | None = None, *, turn: str | None = None, rng: torch.Generator | None = None
    ) -> Loss:
        """Return what a training step minimises.

        Args:
            x: a batch of data, (B, *shape).
            y: classes, (B,) int64, for a conditional model.
            turn: whose step it is, one of ``players()``, in adversarial families; None in others.
            rng: source of all noise.

        Raises:
            ValueError: classes given to an unconditional model, or missing for a conditional one.
        """

    @abstractmethod
    def sample(self, n: int, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Samples:
        """Draw ``n`` events.

        Args:
            n: how many.
            y: classes wanted, (n,) int64; without them a conditional model draws classes as often as in training.
            rng: source of all noise.

        Raises:
            ValueError: classes given to an unconditional model.
        """

    def check_labels(self, y: Tensor | None, n: int, *, wait: bool = False) -> None:
        """Refuse classes where there are none, and missing or impossible ones where there are.

        In training on a GPU, values are checked by an assertion on the device, which ends the process's use of the GPU: to read
        them would stall each step. Whoever trains checks them once on the host, as ``GenerativeModule`` does.

        Args:
            y: classes.
            n: how many there must be.
            wait: whether to read values in training on a GPU too.

        Raises:
            ValueError: saying which of these it was.
        """
        if self.num_classes == 0:
            if y is not None:
                raise ValueError("this model is unconditional: y must be None")
            return
        if y is None:
            raise ValueError(f"this model is conditional: y must hold {n} classes in 0..{self.num_classes - 1}")
        valid = y.shape == (n,) and y.dtype == torch.int64
        if valid and n and not _LABELS_CHECKED.get():
            if y.device.type == "cuda" and self.training and not wait:
                exist = ((y >= 0) & (y < self.num_classes)).all()
                torch._assert_async(exist, f"y must be in 0..{self.num_classes - 1}")
            else:
                low, high = torch.stack(y.aminmax()).tolist()
                valid = 0 <= low <= high < self.num_classes
        if not valid:
            raise ValueError(f"y must be ({n},) int64 in 0..{self.num_classes - 1}, not {tuple(y.shape)} {y.dtype}")

    def draw_labels(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Tensor | None:
        """Return the classes to sample: those wanted, or else drawn by their frequency in training."""
        if self.num_classes and y is None:
            return categorical(self.class_probs, n, rng=rng)
        self.check_labels(y, n, wait=True)
        return y


class Density(GenerativeModel):
    """A model that knows the log density of an event, or bounds or estimates it."""

    bound: Bound

    @abstractmethod
    def log_prob(
        self, x: Tensor, y: Tensor | None = None, *, num_samples: int = 1, rng: torch.Generator | None = None
    ) -> LogProb:
        """Return the log density in nats on the measure of the data.

        Args:
            x: (B, *shape).
            y: classes, (B,) int64, for a conditional model.
            num_samples: how many draws an estimate or a bound may use for each event; ignored where it is exact.
            rng: source of these draws.

        Raises:
            ValueError: wrong classes, as for ``loss``.
        """


class Decoder(GenerativeModel):
    """A model that turns a latent into an event."""

    latent: Continuous | Discrete

    @abstractmethod
    def decode(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the event of each latent, (B, *latent.shape) -> (B, *shape)."""


class Codec(Decoder):
    """A decoder with a way back."""

    @abstractmethod
    def encode(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the latent of each event, (B, *shape) -> (B, *latent.shape)."""


class Inferred(NamedTuple):
    """A latent drawn from q(z | x)."""

    z: Tensor  # (B, *latent.shape)
    log_q: Tensor  # (B,), log q(z | x); zero where one latent is certain


class LatentVariable(Codec):
    """A codec with a law each way, q(z | x) and p(x | z), so that any prior p(z) bounds the density of an event:

    log p(x) >= E_q[log p(x | z) + log p(z) - log q(z | x)].
    """

    @abstractmethod
    def infer(self, x: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Inferred:
        """Draw a latent of each event, (B, *shape), from q(z | x)."""

    @abstractmethod
    def log_likelihood(self, x: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Return log p(x | z) in nats on the measure of the data, (B,)."""

    @abstractmethod
    def generate(self, z: Tensor, y: Tensor | None = None, *, rng: torch.Generator | None = None) -> Tensor:
        """Return an event of p(x | z) for each latent, (B, *shape), as ``sample`` would: a draw of it, or its mean."""


class Bijective(Codec):
    """A codec that loses nothing: ``decode(encode(x))`` is ``x``."""

    diagnostics: Mapping[str, Diagnostic] = {  # of flows that are trained on their likelihood
        "log_det_min": Diagnostic("least log |det dz/dx| in a batch", "nats/dim"),
        "log_det_max": Diagnostic("largest log |det dz/dx| in a batch", "nats/dim"),
    }

    @abstractmethod
    def forward_and_log_det(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the latent, (B, *latent.shape), and log |det dz/dx|, (B,)."""


class Denoiser(GenerativeModel):
    """A model that undoes the noise of a Gaussian path.

    On a conditional model ``y=None`` stands for the null label ``num_classes``.
    """

    path: GaussianPath
    evaluations: int = 1  # of a network in one ``predict``; guidance takes two

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        """Predict one of the five kinds of ``genzoo.diffusion.path`` from noisy data.

        Args:
            x_t: (B, *shape).
            t: (B,) in [0, 1], 0 = data, 1 = noise.
            y: classes, (B,) int64 in 0..num_classes, the last being the null label.
        """

    def predict_as(self, kind: Parameterization, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, int]:
        """Estimate any kind, (B, *shape), and say how many evaluations of the network that took.

        At an end point where the prediction cannot say what is asked, the network is asked again beside it.
        """
        prediction, asked = self.predict(x_t, t, y), self.evaluations
        if prediction.kind != kind:
            inside = self.path.conditioned(prediction.kind, kind, t)
            if bool((inside != t).any()):
                prediction, asked = self.predict(x_t, inside, y), 2 * asked
            t = inside
        return self.path.combine(prediction, x_t, t, kind), asked

    def denoise(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate E[x | x_t]."""
        return self.predict_as("x0", x_t, t, y)[0]

    def eps(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate E[eps | x_t]."""
        return self.predict_as("eps", x_t, t, y)[0]

    def velocity(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate E[dx_t/dt | x_t], the velocity of the probability-flow ODE."""
        return self.predict_as("velocity", x_t, t, y)[0]

    def score(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Estimate grad log p_t(x_t).

        Raises:
            ValueError: where the path pairs its noise with its data.
        """
        return self.predict_as("score", x_t, t, y)[0]


class Adversarial(GenerativeModel):
    """A model whose players minimise different losses in turns."""

    @abstractmethod
    def players(self) -> dict[str, nn.Module]:
        """Name the players and the networks that each of them trains; they share no weights."""

    @abstractmethod
    def turn(self, step: int) -> str:
        """Say whose turn it is at a step, counted from 0."""


class Staged(GenerativeModel):
    """A model whose parts are trained one after another."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """List the stages in their order; a stage leaves the weights of the ones before it alone."""


class Precomputed(GenerativeModel):
    """A model whose loss reads tensors that are computed once, before the first step.

    They follow from the model's arguments alone and are no part of its weights, nor of the average of these. A trainer has
    them computed before its clock starts and keeps them beside its checkpoints.
    """

    @abstractmethod
    def precomputed_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors; none where the loss needs none."""

    @abstractmethod
    def precompute(self) -> dict[str, Tensor]:
        """Compute the tensors, unless they are there, and return them by name.

        Of several processes that train together each computes a share, and all of them have the whole in the end.
        """

    @abstractmethod
    def set_precomputed(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors of these names and shapes, which ``precompute`` returned in another process.

        Raises:
            ValueError: for values that it cannot have returned.
        """


class Composite(GenerativeModel):
    """A model whose samples begin as those of another one, its prior, whose sampler may be exchanged."""

    prior: GenerativeModel


def call_network(network: nn.Module, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """Ask a network about noisy data, (B, ...), at their times, (B,) or (), for an answer in their type."""
    return cast_like(network(x_t, t if t.ndim else t.expand(len(x_t)), y), x_t)


def frozen(model: GenerativeModel) -> GenerativeModel:
    """Fix the weights of a finished model, which others may build on but not train."""
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
