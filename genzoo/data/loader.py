"""Batches of a data set that lies whole on the device, as a function of the step that asks for them.

The data are one tensor, and a batch is a gather by index: nothing is decoded, copied from the host or handed between
processes. The stream is the endless concatenation of shuffled epochs, so that every batch is full and every example is
seen equally often:

    order of an epoch = f(seed, epoch),    flip of an example = f(seed, epoch, index).

Batch ``s`` depends on nothing else, so a run that resumes at step ``s`` asks for batch ``s``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genzoo.data.dataset import Split
from genzoo.prob.random import generator


class Batches:
    """The endless stream of training batches.

    Args:
        split: the examples, moved to ``device`` once.
        batch_size: examples in a batch.
        seed: of the order and the flips.
        flip: whether images are mirrored left to right half of the time; both versions are held in memory.
        device: where the examples lie.
    """

    def __init__(
        self, split: Split, batch_size: int, seed: int, flip: bool = False, device: torch.device | str = "cpu"
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.size, self.batch_size, self.seed, self.flip = len(split.x), batch_size, seed, flip
        self.x = (torch.cat([split.x, split.x.flip(-1)]) if flip else split.x).to(device)
        self.y = None if split.y is None else split.y.to(device)
        self._epochs: dict[int, tuple[Tensor, Tensor]] = {}

    def to(self, device: torch.device | str) -> None:
        """Move the examples to a device."""
        self.x, self.y = self.x.to(device), None if self.y is None else self.y.to(device)
        self._epochs.clear()

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the order of an epoch, and for each place in it the row of ``x``, which a flip moves by ``size``."""
        if epoch not in self._epochs:
            order = torch.randperm(self.size, generator=generator("order", self.seed, epoch))
            row = order
            if self.flip:
                flipped = torch.rand(self.size, generator=generator("flip", self.seed, epoch)) < 0.5
                row = order + self.size * flipped[order]
            self._epochs = {e: known for e, known in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = order.to(self.x.device), row.to(self.x.device)
        return self._epochs[epoch]

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        """Return the examples and classes of a step, (B, *shape) of the data's own type and (B,)."""
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        orders, rows = [], []
        for epoch in range(start // self.size, (stop - 1) // self.size + 1):
            here = slice(max(start - epoch * self.size, 0), min(stop - epoch * self.size, self.size))
            order, row = self._epoch(epoch)
            orders.append(order[here])
            rows.append(row[here])
        x = self.x.index_select(0, torch.cat(rows))
        return x, None if self.y is None else self.y.index_select(0, torch.cat(orders))
