"""Products of tables of features with each other: most of what comparing them costs."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_dot(x: Tensor, y: Tensor) -> Tensor:
    """Multiply all rows with all rows, (N, D) and (M, D) -> (N, M).

    On a CPU numpy does it: it sees where a table meets itself, and then computes but half.
    """
    return torch.from_numpy(x.numpy() @ y.numpy().T) if x.device.type == "cpu" else x @ y.T
