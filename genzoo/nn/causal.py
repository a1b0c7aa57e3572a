"""What an autoregressive model asks of its network. Shapes: B batch, C channels, H height, W width, P parameters of a pixel.

A causal network reads an image in raster order, left to right and top to bottom, and says at each pixel what it expects
there. It does so in two ways that must agree: for all pixels of a known image at once, and pixel by pixel where the
image is only being made. The second keeps what earlier pixels left behind, so that a step costs one pixel and not the
image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Walk(ABC):
    """The way of a batch through the pixels in raster order, and all that is remembered of it."""

    @abstractmethod
    def step(self, pixel_BC: Tensor | None) -> Tensor:
        """Take the pixel that was just decided, None before the first, and return the parameters of the next, (B, P)."""


class CausalNetwork(nn.Module, ABC):
    """A network whose output at a pixel depends on strictly earlier pixels alone, on all of their channels."""

    @abstractmethod
    def forward(self, x_BCHW: Tensor, y: Tensor | None = None) -> Tensor:
        """Return the parameters of every pixel, (B, P, H, W)."""

    @abstractmethod
    def walk(self, n: int, y: Tensor | None = None) -> Walk:
        """Begin ``n`` images of the classes ``y``, (n,)."""
