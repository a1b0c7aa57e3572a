r"""Conditioning: specification, validation, sampling and dropout of ``y`` in ``p(x | y)``.

A condition is a class, a vector, a sequence of tokens, an image, or several of them; ``None`` denotes an unconditional model.
Families only pass ``y`` on, and networks embed it, see ``genzoo.nn.embeddings``.

Every condition has a **null value** outside its domain, the null token of classifier-free guidance: class n of n classes,
token V of a vocabulary of V, code K of K codes, NaN in vectors and images. A denoiser trained with condition dropout is
unconditional there.

References:
    Ho, Salimans, "Classifier-Free Diffusion Guidance", 2022, https://arxiv.org/abs/2207.12598 (algorithm 1: the null value
    and dropping).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genzoo.numerics.random import categorical, rand, randint

DropRate = float | Sequence[float]  # probability of dropping a condition, or of each of several

EXAMPLES_BYTES = 2**22  # of stored training conditions, other than classes


class Condition(ABC):
    """Specification of a conditioning variable, (B, *shape) in a batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None for the dtype of the model

    @abstractmethod
    def null(self, like: Tensor) -> Tensor:
        """Return the null value with the shape, device and dtype of a batch of conditions."""

    def is_null(self, y: Tensor) -> Tensor:
        """Return which conditions are the null value, (B,) bool."""
        null = self.null(y)
        return ((y == null) | (y.isnan() & null.isnan())).view(len(y), -1).all(1)

    @abstractmethod
    def valid(self, y: Tensor, *, allow_null: bool = False) -> Tensor:
        """Return whether all values are in the domain, () bool, without a device synchronisation."""

    @property
    @abstractmethod
    def domain(self) -> str:
        """Description of the accepted values, for error messages."""

    def empty(self, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Allocate n conditions."""
        return torch.empty(n, *self.shape, device=device, dtype=self.dtype or dtype)

    def missing(self, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return n null values, with zeros in place of fixed parts."""
        return self.null(torch.zeros(n, *self.shape, device=device, dtype=self.dtype or dtype))


@dataclass(frozen=True)
class ClassLabels(Condition):
    """One of n classes, (B,) int64 in 0..n-1; n is the null value."""

    n: int
    shape = ()
    dtype = torch.int64

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"ClassLabels needs at least 1 class, not {self.n}")

    @property
    def domain(self) -> str:
        return f"classes 0..{self.n - 1}"

    def null(self, like: Tensor) -> Tensor:
        return torch.full_like(like, self.n)

    def valid(self, y: Tensor, *, allow_null: bool = False) -> Tensor:
        return ((y >= 0) & (y < self.n + allow_null)).all()


@dataclass(frozen=True)
class Vector(Condition):
    """A vector of d real numbers, (B, d); NaN is the null value."""

    d: int
    dtype = None

    def __post_init__(self) -> None:
        if self.d < 1:
            raise ValueError(f"Vector needs at least 1 dimension, not {self.d}")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.d,)

    @property
    def domain(self) -> str:
        return "finite numbers"

    def null(self, like: Tensor) -> Tensor:
        return torch.full_like(like, torch.nan)

    def valid(self, y: Tensor, *, allow_null: bool = False) -> Tensor:
        return (y.isfinite() | null_rows(y)).all() if allow_null else y.isfinite().all()


@dataclass(frozen=True)
class Image(Condition):
    """An image, (B, C, H, W) on [-1, 1]; NaN is the null value."""

    shape: tuple[int, ...]
    dtype = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"Image needs a shape (channels, height, width), not {self.shape}")

    @property
    def domain(self) -> str:
        return "finite numbers"

    def null(self, like: Tensor) -> Tensor:
        return torch.full_like(like, torch.nan)

    def valid(self, y: Tensor, *, allow_null: bool = False) -> Tensor:
        return (y.isfinite() | null_rows(y)).all() if allow_null else y.isfinite().all()


@dataclass(frozen=True)
class Tokens(Condition):
    """A sequence of tokens, (B, length) int64 in 0..vocabulary-1; the token ``vocabulary`` is the null value.

    Shorter sequences are padded with token 0, which networks mask.
    """

    length: int
    vocabulary: int
    dtype = torch.int64

    def __post_init__(self) -> None:
        if self.length < 1 or self.vocabulary < 1:
            raise ValueError(f"Tokens needs a positive length and vocabulary, not {self.length} and {self.vocabulary}")

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.length,)

    @property
    def domain(self) -> str:
        return f"tokens 0..{self.vocabulary - 1}"

    def null(self, like: Tensor) -> Tensor:
        return torch.full_like(like, self.vocabulary)

    def valid(self, y: Tensor, *, allow_null: bool = False) -> Tensor:
        within = (y >= 0) & (y < self.vocabulary)
        return (within | (y == self.vocabulary).all(1, keepdim=True)).all() if allow_null else within.all()


@dataclass(frozen=True)
class Codes(Condition):
    """A grid of codes, (B, H, W) int64 in 0..levels-1; the code ``levels`` is the null value.

    Networks over a grid embed it at each position, others as a whole.
    """

    shape: tuple[int, ...]
    levels: int
    dtype = torch.int64

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) != 2 or min(self.shape) < 1 or self.levels < 1:
            raise ValueError(f"Codes needs a shape (height, width) and levels, not {self.shape} and {self.levels}")

    @property
    def domain(self) -> str:
        return f"codes 0..{self.levels - 1}"

    def null(self, like: Tensor) -> Tensor:
        return torch.full_like(like, self.levels)

    def valid(self, y: Tensor, *, allow_null: bool = False) -> Tensor:
        within = (y >= 0) & (y < self.levels)
        return (
            (within | (y == self.levels).all(2, keepdim=True).all(1, keepdim=True)).all()
            if allow_null
            else within.all()
        )


@dataclass(frozen=True)
class Joint(Condition):
    """Several conditions, packed into a vector of real numbers, (B, sum of their sizes).

    Integers are exact in float32 up to 2^24. Each part has its null value; the null value of the whole is that of all parts but
    the fixed ones, which a model never drops.

    Args:
        parts: the conditions.
        fixed: number of parts, the first ones, that keep their values in the null value.
    """

    parts: tuple[Condition, ...]
    fixed: int = 0
    dtype = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        if not self.parts or not 0 <= self.fixed <= len(self.parts):
            raise ValueError(f"Joint needs at least 1 condition, of which {self.fixed} cannot be fixed")
        for part in self.parts:
            integers = 0
            if isinstance(part, ClassLabels):
                integers = part.n
            elif isinstance(part, Tokens):
                integers = part.vocabulary
            elif isinstance(part, Codes):
                integers = part.levels
            if integers > 2**24:
                raise ValueError(f"Joint packs integers up to 2^24, and {part} has more")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers that each part takes."""
        return tuple(math.prod(part.shape) for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (sum(self.sizes),)

    @property
    def domain(self) -> str:
        return ", ".join(part.domain for part in self.parts)

    def join(self, *values: Tensor) -> Tensor:
        """Pack conditions, (B, *part.shape) each -> (B, sum of sizes), in the type of the first real part."""
        real = [value.dtype for value in values if value.is_floating_point()]
        dtype = real[0] if real else torch.get_default_dtype()
        return torch.cat(
            [(value[:, None] if value.ndim == 1 else value.flatten(1)).to(dtype) for value in values], dim=1
        )

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """Unpack conditions, (B, sum of sizes) -> (B, *part.shape) each."""
        pieces = zip(self.parts, y.split(self.sizes, dim=1), strict=True)
        return tuple(piece.view(len(y), *part.shape).to(part.dtype or y.dtype) for part, piece in pieces)

    def where(self, chosen: Tensor, y: Tensor, other: Tensor) -> Tensor:
        """Take parts of y where they are chosen, and of ``other`` elsewhere, (B, parts that are not fixed) bool."""
        pairs = list(zip(y.split(self.sizes, dim=1), other.split(self.sizes, dim=1), strict=True))
        kept = [old for _, old in pairs[: self.fixed]]
        columns = zip(chosen.split(1, dim=1), pairs[self.fixed :], strict=True)
        return torch.cat([*kept, *(torch.where(column, new, old) for column, (new, old) in columns)], dim=1)

    def null(self, like: Tensor) -> Tensor:
        pairs = enumerate(zip(self.parts, self.split(like), strict=True))
        return self.join(*(value if i < self.fixed else part.null(value) for i, (part, value) in pairs)).to(like.dtype)

    def valid(self, y: Tensor, *, allow_null: bool = False) -> Tensor:
        pieces = zip(self.parts, y.split(self.sizes, dim=1), strict=True)
        whole = [
            ((piece == piece.round()) & piece.isfinite()).all() for part, piece in pieces if part.dtype is not None
        ]
        pairs = enumerate(zip(self.parts, self.split(y), strict=True))
        each = [part.valid(value, allow_null=allow_null and i >= self.fixed) for i, (part, value) in pairs]
        return torch.stack([*whole, *each]).all()


def null_rows(y: Tensor) -> Tensor:
    """Return which rows are null, (B, 1, ...), of conditions whose null value is NaN."""
    return y.flatten(1).isnan().all(1).view(-1, *[1] * (y.ndim - 1))


# The conditioner of a model


class Conditioner(nn.Module):
    """Validation, sampling and dropout of the conditions of a model.

    Args:
        condition: None for an unconditional model.
        dropout: probability of replacing a condition by the null value in training; for several conditions also one for each,
            which are then dropped independently.

    Attributes:
        probs: for classes, their empirical distribution in the training data, (n,).
        examples: for other conditions, a subset of those in the training data, (m, *shape).
    """

    probs: Tensor
    examples: Tensor

    def __init__(self, condition: Condition | None, dropout: DropRate = 0.0):
        super().__init__()
        each = list(dropout) if isinstance(dropout, Sequence) else [dropout]
        if any(not 0 <= p <= 1 for p in each):
            raise ValueError(f"condition_dropout must be in [0, 1], not {dropout}")
        if isinstance(dropout, Sequence):
            parts = len(condition.parts) - condition.fixed if isinstance(condition, Joint) else 1
            if len(each) != parts:
                raise ValueError(f"condition_dropout={each}: {parts} conditions can be dropped")
        self.condition, self.dropout = condition, dropout
        if condition is None or isinstance(condition, ClassLabels):
            n = condition.n if condition else 0
            self.register_buffer("probs", torch.full((n,), 1 / max(n, 1)))
        else:
            self.register_buffer("examples", condition.empty(0, torch.device("cpu"), torch.get_default_dtype()))

    def fit(self, y: Tensor) -> None:
        """Estimate the training distribution of conditions from those of all training examples, (N, *shape).

        Raises:
            ValueError: for values outside the domain.
        """
        if self.condition is None:
            return
        self.check(y, len(y), synchronize=True)
        if isinstance(self.condition, ClassLabels):
            counts = torch.bincount(y.cpu(), minlength=self.condition.n).float()
            self.probs.copy_(counts / len(y))
        else:
            kept = max(EXAMPLES_BYTES // max(y[:1].nbytes, 1), 1)
            chosen = torch.linspace(0, len(y) - 1, min(kept, len(y))).round().long()
            self.examples = y.cpu()[chosen].to(self.examples.device, self.examples.dtype)

    def check(self, y: Tensor | None, n: int, *, allow_null: bool = False, synchronize: bool = False) -> None:
        """Validate a batch of conditions.

        In training on a GPU, values are checked by a device-side assertion, since reading them would synchronise each step;
        a failed assertion leaves the CUDA context unusable. ``GenerativeModule`` therefore checks the data set once on the
        host.

        Args:
            y: the conditions; must be None for an unconditional model.
            n: batch size.
            allow_null: whether the null value is accepted.
            synchronize: whether to read values in training on a GPU too.

        Raises:
            ValueError: for missing, unexpected or out-of-domain conditions.
        """
        condition = self.condition
        if condition is None:
            if y is not None:
                raise ValueError("this model is unconditional: y must be None")
            return
        expected = f"{n} {condition.domain}"
        if y is None:
            raise ValueError(f"this model is conditional: y must hold {expected}")
        dtype_matches = y.dtype == condition.dtype if condition.dtype else y.is_floating_point()
        valid = y.shape == (n, *condition.shape) and dtype_matches
        if valid and n:
            within = condition.valid(y, allow_null=allow_null)
            if y.device.type == "cuda" and self.training and not synchronize:
                torch._assert_async(within, f"y must hold {expected}")
            else:
                valid = bool(within)
        if not valid:
            kind = str(condition.dtype or "floating point").removeprefix("torch.")
            raise ValueError(
                f"y must be {(n, *condition.shape)} {kind} of {condition.domain}, not {tuple(y.shape)} {y.dtype}"
            )

    def draw(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Tensor | None:
        """Return ``y``, or if it is None n draws from the training distribution.

        Raises:
            ValueError: for out-of-domain ``y``, or without a fitted training distribution.
        """
        if self.condition is None or y is not None:
            self.check(y, n, synchronize=True)
            return y
        if isinstance(self.condition, ClassLabels):
            return categorical(self.probs, n, rng=rng)
        if not len(self.examples):
            raise ValueError("no training conditions to sample from: y must be given")
        return self.examples[randint(len(self.examples), (n,), rng=rng, device=self.examples.device)]

    @property
    def learns_null(self) -> bool:
        """Whether the null value occurs in training."""
        return all(self.dropout) if isinstance(self.dropout, Sequence) else bool(self.dropout)

    def drop(self, y: Tensor | None, rng: torch.Generator | None) -> Tensor | None:
        """Replace each condition by the null value with probability ``dropout``."""
        if y is None or self.condition is None:
            return y
        null = self.condition.null(y)
        if isinstance(self.dropout, Sequence):
            u = rand((len(y), len(self.dropout)), rng=rng, device=y.device)
            dropped = torch.stack([column < p for column, p in zip(u.unbind(1), self.dropout, strict=True)], dim=1)
            if isinstance(self.condition, Joint):
                return self.condition.where(dropped, null, y)
        else:
            dropped = rand((len(y),), rng=rng, device=y.device) < self.dropout
        return torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), null, y)

    def distinct(self, n: int) -> Tensor | None:
        """Return n conditions for a sample grid: the classes of the training data, or stored conditions, cyclically."""
        if self.condition is None:
            return None
        if isinstance(self.condition, ClassLabels):
            known = self.probs.nonzero().flatten()
        elif not len(known := self.examples):
            raise ValueError("no training conditions to sample from: y must be given")
        return known[torch.arange(n, device=known.device) % len(known)]

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        found = state.get(f"{prefix}examples")
        if found is not None and "examples" in self._buffers and found.shape[1:] == self.examples.shape[1:]:
            self.examples = self.examples.new_empty(found.shape)
        super()._load_from_state_dict(state, prefix, *rest)
