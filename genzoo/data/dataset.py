"""What a data set is: two splits held in memory, and what is known about the law they come from.

Images are kept as the integers they are, ``0..levels - 1`` in one byte each; ``genzoo.distributions.discretization``
makes points of
[-1, 1] of them at the moment of use, so that nothing is rounded twice. Points of the plane are floats, on the scale of
their own density, which travels with them where it is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from genzoo.data.densities import PlaneDensity


class DataError(ValueError):
    """Data that cannot be used; the message is one line that names the file or folder and what to do about it."""

    exit_code = 2  # of the command line

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True, eq=False)
class Split:
    """Events of a data set and their classes.

    Attributes:
        x: uint8 levels, (N, C, H, W), for images; float32, (N, 2), for points of the plane.
        y: int64 class indices, (N,), or None where the data have no classes.
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
    """

    train: Split
    test: Split
    levels: int | None
    classes: tuple[str, ...] = ()
    density: PlaneDensity | None = None
    notes: tuple[str, ...] = ()

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
