"""Batches of a data set that lies whole on the device, as a function of the step that asks for them.

The data are one tensor, and a batch is a gather by index: nothing is decoded, copied from the host or handed between
processes. The stream is the endless concatenation of shuffled epochs, so that every batch is full and every example is
seen equally often:

    order of an epoch = f(seed, epoch),    flip of an example = f(seed, epoch, index).

Batch ``s`` depends on nothing else, so a run that resumes at step ``s`` asks for batch ``s``, whoever gathers it: this
process, or helpers that are some batches ahead. Several processes that train together take equal shares of each batch.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from genzoo.data.dataset import DataError, Split
from genzoo.numerics.random import generator

PATIENCE = 60.0  # seconds that a batch of a helper may take before it is given up

Batch = tuple[Tensor, Tensor | None]


class Batches:
    """The endless stream of training batches.

    Args:
        split: the examples, moved to ``device`` once.
        batch_size: examples in a batch.
        seed: of the order and the flips.
        flip: whether images are mirrored left to right half of the time; both versions are held in memory.
        device: where the examples lie.
        workers: processes that gather batches ahead; 0 for none, which is fastest for what lies in memory.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        flip: bool = False,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        self.size, self.batch_size, self.seed, self.flip = len(split.x), batch_size, seed, flip
        self.x = (torch.cat([split.x, split.x.flip(-1)]) if flip else split.x).to(device)
        self.y = None if split.y is None else split.y.to(device)
        self.workers, self.rank, self.world = workers, 0, 1
        self.device = torch.device(device)
        self._epochs: dict[int, tuple[Tensor, Tensor]] = {}
        self._ahead: Iterator[Batch] | None = None
        self._latest: tuple[int, Batch] | None = None  # of the helpers

    def share(self, rank: int, world: int) -> None:
        """Take the ``rank``-th of ``world`` equal parts of each batch.

        Raises:
            ValueError: where they cannot be equal.
        """
        if self.batch_size % world:
            raise ValueError(f"batch_size={self.batch_size} cannot be shared among {world} processes")
        self.rank, self.world = rank, world

    def to(self, device: torch.device | str) -> None:
        """Move the examples to a device, or only the batches where helpers gather them."""
        self.device = torch.device(device)
        if not self.workers:
            check_room(self.x, self.device)
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
            self._epochs[epoch] = _to_device(order, self.x.device), _to_device(row, self.x.device)
        return self._epochs[epoch]

    def __call__(self, step: int) -> Batch:
        """Return the examples and classes of a step, (B, *shape) of the data's own type and (B,).

        Raises:
            RuntimeError: where a loader worker has died or gives no answer.
        """
        if not self.workers:
            return self.gather(step)
        if self._latest is None or self._latest[0] != step:
            if self._ahead is None or self._latest is None or self._latest[0] != step - 1:
                self._ahead = self._helpers(step)
            self._latest = step, next(self._ahead)
        x, y = self._latest[1]  # pinned where the device copies by itself
        return x.to(self.device, non_blocking=True), None if y is None else y.to(self.device, non_blocking=True)

    def _helpers(self, step: int) -> Iterator[Batch]:
        """Start processes that gather the batches from ``step`` on."""
        return iter(
            DataLoader(
                _Steps(self),
                batch_size=None,
                sampler=_From(step),
                num_workers=self.workers,
                timeout=PATIENCE,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_leave_signals,
                generator=torch.Generator(),  # not the global one
            )
        )

    def gather(self, step: int) -> Batch:
        """Return the batch of a step, put together by this process."""
        share = self.batch_size // self.world
        start = step * self.batch_size + self.rank * share
        stop = start + share
        orders, rows = [], []
        for epoch in range(start // self.size, (stop - 1) // self.size + 1):
            here = slice(max(start - epoch * self.size, 0), min(stop - epoch * self.size, self.size))
            order, row = self._epoch(epoch)
            orders.append(order[here])
            rows.append(row[here])
        x = self.x.index_select(0, torch.cat(rows))
        return x, None if self.y is None else self.y.index_select(0, torch.cat(orders))


def check_room(x: Tensor, device: torch.device) -> None:
    """Refuse data that do not fit a GPU's free memory, of which a fifth is left to the model.

    Raises:
        DataError: with the sizes, and the setting that leaves the data on the host.
    """
    if device.type != "cuda" or x.device == device:
        return
    free, _ = torch.cuda.mem_get_info(device)
    if x.nbytes > 0.8 * free:
        raise DataError(
            f"the data take {x.nbytes / 1e9:,.1f} GB, mirror images included, and {device} has {free / 1e9:,.1f} GB free: "
            "say trainer.workers=2, which leaves them in host memory"
        )


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host's; from pinned memory a GPU does so when its turn comes, and the host goes on."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class _Steps(Dataset[Batch]):
    """The batches, by step."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, step: int) -> Batch:
        return self.batches.gather(step)


class _From(Sampler[int]):
    """All steps from one on."""

    def __init__(self, step: int):
        self.step = step

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.step)


def _leave_signals(worker: int) -> None:
    """Let a helper be ended by its parent alone, which hears the user's signals too."""
    for number in {signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}:  # which Windows lacks
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
