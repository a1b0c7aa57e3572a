"""The interface of causal networks. Shapes: B batch, C channels, H height, W width, P parameters of a pixel.

In raster order, left to right and top to bottom, the output at a pixel depends on the preceding pixels. It is computed in two
equivalent ways: in parallel for all pixels of an image, in training, and incrementally with cached activations, in sampling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class IncrementalState(ABC):
    """The state of incremental evaluation on a batch of images in raster order."""

    @abstractmethod
    def step(self, pixel_BC: Tensor | None) -> Tensor:
        """Append the last sampled pixel, None at the start, and return the parameters of the next, (B, P)."""


class CausalNetwork(nn.Module, ABC):
    """A network whose output at a pixel depends only on all channels of the preceding pixels."""

    @abstractmethod
    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the parameters of every pixel, (B, P, H, W)."""

    @abstractmethod
    def incremental(self, n: int, y: Tensor | None = None) -> IncrementalState:
        """Return the initial state for ``n`` images with conditions ``y``."""
