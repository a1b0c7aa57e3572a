"""The specification of one data example."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EventSpec:
    """Shape and quantisation of one example.

    Args:
        shape: (channels, height, width) of an image, (d,) of a vector.
        levels: number of levels of integer images, which lie on [-1, 1]; None for real vectors.
    """

    shape: tuple[int, ...]
    levels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(f"shape must be (channels, height, width) or (d,) of positive sizes, not {self.shape}")
        if self.levels is not None and self.levels < 2:
            raise ValueError(f"levels must be at least 2, or null for real-valued data, not {self.levels}")

    @property
    def dim(self) -> int:
        """Number of dimensions."""
        return math.prod(self.shape)

    @property
    def is_image(self) -> bool:
        """Whether the event has shape (channels, height, width)."""
        return len(self.shape) == 3
