"""Pairwise inner products."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of all pairs of rows, (N, D) and (M, D) -> (N, M).

    On a CPU by numpy, which exploits the symmetry if x is y.
    """
    return torch.from_numpy(x.numpy() @ y.numpy().T) if x.device.type == "cpu" else x @ y.T
