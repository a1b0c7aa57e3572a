"""In-memory data sets: training, validation and test splits, their conditions and, for toy data, their density.

A model learns from the training split. Whatever is chosen (among settings, steps of a run or families) is chosen by scores on
the validation split. The test split is for the final scores alone.

Images are kept as integers, ``0..levels - 1`` in one byte each; ``genzoo.distributions.discretization`` maps them to [-1, 1]
in each training step. Vectors are floats on their own scale.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from genzoo.conditions import ClassLabels, Condition
from genzoo.event import EventSpec
from genzoo.text import Tokenizer

HeldOut = Literal["test", "validation"]


class DataError(ValueError):
    """Invalid data; the one-line message names the file or folder and the remedy."""

    exit_code = 2  # of the command line

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


class KnownDensity(Protocol):
    """A data distribution with a known density."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute the log density in nats, (N, *shape) -> (N,)."""
        ...


class CaptionChecker(Protocol):
    """A program that compares images with their captions.

    Attributes:
        name: with the version.
        accuracy: measured fraction of real images, all of whose attributes are read as in their captions.
    """

    name: str
    accuracy: float

    def check(self, x: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Compare images with captions.

        Args:
            x: images, uint8 (N, C, H, W).
            captions: N captions.

        Returns:
            For each attribute, (N,) float64: 1 where it is right, 0 where it is wrong, NaN where the caption omits it.
        """
        ...


@dataclass(frozen=True, eq=False)
class Split:
    """Examples of a data set and their conditions.

    Attributes:
        x: images, uint8 levels (N, C, H, W), or vectors, float32 (N, D).
        y: conditions, (N, *condition.shape), such as int64 class indices (N,); None if unconditional.
    """

    x: Tensor
    y: Tensor | None

    def select(self, chosen: Tensor) -> Split:
        """Select examples by a mask or by indices."""
        return Split(self.x[chosen], None if self.y is None else self.y[chosen])


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set with fixed splits.

    Attributes:
        train: the training split.
        test: the held-out split; empty for a set of reference images without a split.
        levels: number of integer levels of a pixel, K; None for vectors.
        classes: class names, in the order of the indices ``y``; empty if unlabelled.
        density: the data distribution, if known.
        notes: messages of the reader, such as skipped files, one line each.
        conditions: type of ``y`` if it is not a class index.
        tokenizer: of captions, whose tokens ``y`` are.
        checker: of images and captions, if there is one.
        validation: the validation split; None if there is none. See ``genzoo.data.validation``.
        held_out: the split that scores refer to, beside the training split; None for no other. See ``scored_on``.
    """

    train: Split
    test: Split
    levels: int | None
    classes: tuple[str, ...] = ()
    density: KnownDensity | None = None
    notes: tuple[str, ...] = ()
    conditions: Condition | None = None
    tokenizer: Tokenizer | None = None
    checker: CaptionChecker | None = None
    validation: Split | None = None
    held_out: HeldOut | None = "test"

    def scored_on(self, held_out: HeldOut) -> DataSet:
        """Return the data with another split for scores.

        Raises:
            DataError: for a validation split that does not exist.
        """
        if held_out == "validation" and self.validation is None:
            raise DataError(
                "metrics.split=validation: the data have no validation split: train with data.validation=0.1"
            )
        return dataclasses.replace(self, held_out=held_out)

    def for_choices(self) -> DataSet:
        """Return the data whose scores are those on the validation split, or on the training split alone without one."""
        return dataclasses.replace(self, held_out="validation" if self.validation else None)

    @property
    def event(self) -> EventSpec:
        """Shape and levels of one example."""
        return EventSpec(self.shape, self.levels)

    @property
    def condition(self) -> Condition | None:
        """Type of ``y``, the condition of a conditional model of these data."""
        return self.conditions or (ClassLabels(self.num_classes) if self.num_classes else None)

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that samples are compared with, by name: "train" and ``held_out``, or "all" without a test split."""
        if self.held_out is None:
            return {"train": self.train}
        name, scored = self.scored
        return {"all": self.train} if name == "all" else {"train": self.train, name: scored}

    @property
    def scored(self) -> tuple[str, Split]:
        """Name and examples of the split of densities and reconstructions: ``held_out``, or "all" without a test split."""
        if self.held_out == "validation" and self.validation is not None:
            return "validation", self.validation
        return ("test", self.test) if len(self.test.x) else ("all", self.train)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example, such as (3, 32, 32) or (2,)."""
        return tuple(self.train.x.shape[1:])

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 for unlabelled data."""
        return len(self.classes)

    @functools.cached_property
    def sha256(self) -> str | None:
        """SHA-256 of all examples and conditions; None for toy densities, which are drawn anew each time."""
        if self.density is not None:
            return None
        digest = hashlib.sha256()
        for split in filter(None, (self.train, self.validation, self.test)):
            for tensor in (split.x, split.y):
                if tensor is not None:
                    digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()
