"""What a run may spend, and the plan that follows from it.

A budget counts real images delivered to any player of any family, generator turns included, so that it means the same
for all of them. Schedules, of the learning rate for one, are functions of images seen against images planned. The plan
follows the limit that will end the run. Images and FLOPs are planned exactly before the first step; where seconds end the
run, alone or before a count, the plan is fitted to the speed of the steps that were trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Budget:
    """Limits of a run; whichever ends first.

    Args:
        images: real images delivered, or None.
        seconds: of computing in training, or None; samples drawn and checkpoints written on the way are not counted.
        flops: of training, or None; see ``genzoo.training.flops``.

    Raises:
        ValueError: where all are None, or one is not positive.
    """

    images: int | None = None
    seconds: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        if self.images is None and self.seconds is None and self.flops is None:
            raise ValueError("a budget needs budget.images, budget.seconds or budget.flops")
        for name in ("images", "seconds", "flops"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"budget.{name} must be positive and finite, not {value}")


@dataclass(frozen=True)
class LearningRate:
    """Factor of the base learning rate as a function of progress.

    Args:
        decay: "constant", "linear" to zero, or "cosine" to zero.
        warmup: images over which the rate rises linearly from zero.
    """

    decay: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "linear", "cosine"):
            raise ValueError(f"decay must be constant, linear or cosine, not {self.decay!r}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, not {self.warmup}")

    def __call__(self, images: int, planned: int) -> float:
        """Return the factor after ``images`` of ``planned`` images."""
        progress = min(images / planned, 1.0)
        factor = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[self.decay]
        return factor * min(1.0, (images + 1) / (self.warmup + 1))
