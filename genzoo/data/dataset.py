"""A data set: two splits held in memory, with their classes and, where it is known, their density.

Images are kept as integers, ``0..levels - 1`` in one byte each; ``genzoo.distributions.discretization`` maps them to [-1, 1]
in each training step, so that nothing is rounded twice. Vectors are floats, on the scale of their own density.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from genzoo.conditions import ClassLabels, Condition
from genzoo.event import EventSpec


class DataError(ValueError):
    """Data that cannot be used; the message is one line that names the file or folder and what to do about it."""

    exit_code = 2  # of the command line

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class KnownDensity(Protocol):
    """A data distribution with a density in closed form."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the log density in nats, (N, *shape) -> (N,)."""
        ...


@dataclass(frozen=True, eq=False)
class Split:
    """Events of a data set and their conditions.

    Attributes:
        x: uint8 levels, (N, C, H, W), for images; float32, (N, 2), for points of the plane.
        y: conditions, (N, *condition.shape), such as int64 class indices, (N,); None where the data have none.
    """

    x: Tensor
    y: Tensor | None


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set, split once and for all.

    Attributes:
        train: what a model learns from.
        test: what it is scored on, and never sees before; empty where ``train`` is all there is to be compared with.
        levels: how many integer levels a pixel has, K; None for points of the plane.
        classes: the name of each class, in the order of the indices ``y``; empty where there are no classes.
        density: the law of the data where it is known exactly.
        notes: what was read and what was passed over, one line each, for whoever should know.
        conditions: what ``y`` is, where it is no class.
    """

    train: Split
    test: Split
    levels: int | None
    classes: tuple[str, ...] = ()
    density: KnownDensity | None = None
    notes: tuple[str, ...] = ()
    conditions: Condition | None = None

    @property
    def event(self) -> EventSpec:
        """Shape and levels of one example."""
        return EventSpec(self.shape, self.levels)

    @property
    def condition(self) -> Condition | None:
        """What ``y`` is: the condition of a conditional model of these data."""
        return self.conditions or (ClassLabels(self.num_classes) if self.num_classes else None)

    @property
    def splits(self) -> dict[str, Split]:
        """The splits by name; "all", where the data have no test split."""
        return {"train": self.train, "test": self.test} if len(self.test.x) else {"all": self.train}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one event, such as (3, 32, 32) or (2,)."""
        return tuple(self.train.x.shape[1:])

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 where the data have none."""
        return len(self.classes)

    @property
    def sha256(self) -> str | None:
        """SHA-256 of all images and classes; None of toy densities, which are drawn anew each time."""
        if self.density is not None:
            return None
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            for tensor in (split.x, split.y):
                if tensor is not None:
                    digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()
