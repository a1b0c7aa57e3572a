r"""Masked networks of vectors (MADE). Shapes: B batch, D dimensions, P parameters of a dimension.

The parameters of dimension i are functions of x_1, ..., x_{i-1}. Every unit has a degree: of input i it is i; of hidden units
the degrees go evenly up to D - 1. A weight is kept where information flows to no smaller degree,

    hidden units:  m(out) >= m(in)            outputs:  m(out) > m(in)

and is zero elsewhere, so that one evaluation gives the parameters of all dimensions. Hidden layers are residual.

References:
    Germain, Gregor, Murray, Larochelle, "MADE: Masked Autoencoder for Distribution Estimation", 2015,
    https://arxiv.org/abs/1502.03509 (eq. 8 and 9 for the masks).
    Nash, Durkan, "Autoregressive Energy Machines", 2019, https://arxiv.org/abs/1904.05626 (section 3.2, residual blocks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.embeddings import embed
from genzoo.nn.layers import zero_


class MaskedLinear(nn.Linear):
    """A linear layer whose weights are masked.

    Args:
        mask: of the kept weights, bool, (out_features, in_features).
    """

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Compute some of the outputs, by default all."""
        return F.linear(x, self.weight[rows] * self.mask[rows], self.bias[rows])


class MADE(nn.Module):
    """A masked residual MLP, (B, D) -> (B, P * D), with an optional condition.

    The first parameter of all dimensions comes first. All parameters are functions of the condition.

    Args:
        in_shape, out_shape: (D,) and (P * D,).
        condition: of the model; None for an unconditional network.
        width: of the hidden layers.
        depth: number of residual layers.
        zero_init: whether the output layer is zero-initialised.

    Raises:
        ValueError: for a number of outputs that is not a multiple of D.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 128,
        depth: int = 1,
        zero_init: bool = True,
    ):
        super().__init__()
        self.dim, outputs = math.prod(in_shape), math.prod(out_shape)
        if outputs % self.dim:
            raise ValueError(f"a masked network of {self.dim} dimensions needs a multiple of outputs, not {outputs}")
        # Only units of degree 0 reach the first dimension: they are functions of the condition alone.
        lowest = 1 if condition is None and self.dim > 1 else 0
        inputs = torch.arange(1, self.dim + 1)
        hidden = lowest + torch.arange(width) * (self.dim - lowest) // width
        inner = hidden[:, None] >= hidden
        self.stem = MaskedLinear(hidden[:, None] >= inputs)
        self.embed_y = embed(condition, width)
        self.first = nn.ModuleList(MaskedLinear(inner) for _ in range(depth))
        self.second = nn.ModuleList(MaskedLinear(inner) for _ in range(depth))
        self.head = MaskedLinear(inputs.repeat(outputs // self.dim)[:, None] > hidden)
        if zero_init:
            zero_(self.head)

    def forward(self, x_BD: Tensor, y: Tensor | None = None, i: int | None = None) -> Tensor:
        """Compute the parameters of all dimensions, (B, P * D), or of dimension ``i``, counted from 0, (B, P)."""
        h = self.stem(x_BD)
        embedding = None if self.embed_y is None else self.embed_y(y)
        for first, second in zip(self.first, self.second, strict=True):
            inner = first(F.silu(h))
            h = h + second(F.silu(inner if embedding is None else inner + embedding))
        return self.head(F.silu(h), slice(None) if i is None else slice(i, None, self.dim))
