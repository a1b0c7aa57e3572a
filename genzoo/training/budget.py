"""What a run may spend, and the plan that follows from it.

A budget counts real images delivered to any player of any family, generator turns included, so that it means the same
for all of them. Schedules, of the learning rate for one, are functions of images seen against images planned. The plan
follows the limit that will end the run. Images and FLOPs are planned exactly before the first step; where seconds end the
run, alone or before a count, the plan is fitted to the speed of the steps that were trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Decay = Literal["constant", "linear", "cosine", "wsd"]


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

    With "wsd" (warm-up, stable, decay) it is 1 until the last part of the run, of length f, and there 1 - sqrt(p), p from 0 to
    1. The stable part does not depend on the length of the run, so that a finished run goes on from its end.

    Args:
        decay: "constant", "linear" to zero, "cosine" to zero, or "wsd".
        warmup: images over which the rate rises linearly from zero.
        decay_fraction: f, of the images; unused by the others.

    References:
        Hu et al., "MiniCPM", 2024, https://arxiv.org/abs/2404.06395 (section 4: warm-up, stable, decay).
        Haegele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024,
        https://arxiv.org/abs/2405.18392 (eq. 1 and section 4: the square root, a fifth of the steps).
    """

    decay: Decay = "constant"
    warmup: int = 0
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.decay not in get_args(Decay):
            raise ValueError(f"decay must be constant, linear, cosine or wsd, not {self.decay!r}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, not {self.warmup}")
        if not 0 < self.decay_fraction < 1:
            raise ValueError(f"decay_fraction must be between 0 and 1, not {self.decay_fraction}")

    def __call__(self, images: int, planned: int) -> float:
        """Return the factor after ``images`` of ``planned`` images."""
        progress = min(images / planned, 1.0)
        factor = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            "wsd": 1 - math.sqrt(self._decayed(progress)),
        }[self.decay]
        return factor * min(1.0, (images + 1) / (self.warmup + 1))

    def _decayed(self, progress: float) -> float:
        return max(0.0, (progress - (1 - self.decay_fraction)) / self.decay_fraction)

    def is_stable(self, images: int, planned: int) -> bool:
        """Whether the factors so far do not depend on ``planned``, so that a longer run would be in the same state."""
        if self.decay == "wsd":
            return self._decayed(min(images / planned, 1.0)) == 0
        return self.decay == "constant"
