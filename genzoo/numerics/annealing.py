"""Coefficients that change during training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class CosineAnnealing(nn.Module):
    r"""A coefficient annealed from ``start`` to ``end`` by a cosine.

        end + (start - end) (1 + cos(pi min(1, seen / images)))/2

    ``seen`` is the number of training images, saved with the weights.

    Args:
        start: initial value.
        end: final value.
        images: training images until it is reached; 0 for a constant ``end``.
    """

    seen: Tensor

    def __init__(self, start: float, end: float, images: int):
        super().__init__()
        self.start, self.end, self.images = start, end, images
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """Return the present value, ()."""
        progress = (
            (self.seen.double() / self.images).clamp(max=1) if self.images else torch.ones_like(self.seen).double()
        )
        return self.end + (self.start - self.end) * 0.5 * (1 + torch.cos(math.pi * progress))

    def count(self, images: int) -> None:
        """Count the images of a training step."""
        self.seen += images
