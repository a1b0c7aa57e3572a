"""A clamp with the gradient of projected gradient descent.

``Tensor.clamp`` has zero gradient beyond its bounds, so that a parameter outside them never returns. ``projected_clamp`` drops
the gradient only where a descent step would lead further out.

References:
    Bertsekas, "On the Goldstein-Levitin-Polyak gradient projection method", 1976,
    https://doi.org/10.1109/TAC.1976.1101194.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class _ProjectedClamp(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        outward = ((x <= ctx.low) & (gradient > 0)) | ((x >= ctx.high) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None


def projected_clamp(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """Clamp to [low, high], elementwise, with the gradient of a minimised loss kept where it points inside."""
    result: Tensor = _ProjectedClamp.apply(x, low, high)
    return result
