"""Metrics of concatenated batches, gathered over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class CatMetric(Metric):
    """A pure function of the concatenated rows of all updates and processes.

    For metrics without a sufficient statistic, such as kernels and nearest neighbours, and for standard errors without the
    cancellation of sums of squares.

    Args:
        function: of all rows, (N, ...), in the order of the updates, and of ranks.
        dtype: of the stored rows.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, function: Callable[[Tensor], Any], dtype: torch.dtype = torch.float32, **kwargs: Any):
        super().__init__(**kwargs)
        self.function, self.kept = function, dtype
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, rows: Tensor) -> None:
        self.rows.append(rows.detach().to(self.kept))

    def compute(self) -> Any:
        return self.function(dim_zero_cat(self.rows))
