"""From pure functions of whole sets to metrics of streams that are split over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class CatMetric(Metric):
    """A pure function of the rows of a stream, gathered over processes.

    A set whose order or whole is needed, by a kernel or by neighbours, has no smaller summary than itself; and sums of squares
    would lose the error of numbers that are large and alike.

    Args:
        function: takes all rows, (N, ...), in the order of the updates and, of several processes, of their ranks.
        dtype: in which the rows are kept.
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
