"""Multilayer perceptrons for low-dimensional vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from genzoo.conditions import Condition
from genzoo.nn.embeddings import embed
from genzoo.nn.layers import TimeAndCondition, zero_


class MLP(nn.Module):
    """A residual MLP, (B, *in_shape) -> (B, *out_shape), with an optional condition.

        h <- h + W2 silu(W1 silu(h) + embedding)

    Args:
        in_shape, out_shape: of one input and one output.
        condition: of the model; None for an unconditional network.
        width: of the hidden layers.
        depth: number of residual layers.
        zero_init: whether the output layer is zero-initialised.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 128,
        depth: int = 3,
        zero_init: bool = False,
    ):
        super().__init__()
        self.out_shape = tuple(out_shape)
        self.stem = nn.Linear(math.prod(in_shape), width)
        self.embed_y = embed(condition, width)
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, math.prod(out_shape))
        if zero_init:
            zero_(self.head)

    def trunk(self, x: Tensor, embedding: Tensor | None) -> Tensor:
        h = self.stem(x.flatten(1))
        for first, second in zip(self.first, self.second, strict=True):
            inner = first(F.silu(h))
            h = h + second(F.silu(inner if embedding is None else inner + embedding))
        return self.head(F.silu(h)).view(-1, *self.out_shape)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.trunk(x, None if self.embed_y is None else self.embed_y(y))


class TimeMLP(nn.Module):
    """A time-conditioned MLP for denoising vectors: (B, *in_shape), times (B,) and conditions -> (B, *out_shape)."""

    def __init__(
        self,
        in_shape: Sequence[int],
        out_shape: Sequence[int],
        condition: Condition | None = None,
        width: int = 128,
        depth: int = 3,
    ):
        super().__init__()
        self.embedding = TimeAndCondition(width, condition, frequencies=64)
        self.mlp = MLP(in_shape, out_shape, width=width, depth=depth, zero_init=True)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.mlp.trunk(x_t, self.embedding(t, y))
