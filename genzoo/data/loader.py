"""Training batches as a pure function of the step, gathered from a data set in device memory.

The data are one tensor and a batch is a gather by index, without decoding or copies from the host. The stream is the endless
concatenation of shuffled epochs, so that every batch is full and every example appears equally often:

    order of an epoch = f(seed, epoch),    flip of an example = f(seed, epoch, index).

Batch ``s`` depends on nothing else, so that training resumes at any step, with or without loader workers. In distributed
training each process takes an equal part of the batch.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from genzoo.data.dataset import DataError, Split
from genzoo.numerics.random import generator

PATIENCE = 60.0  # timeout of a loader worker's batch, in seconds

Batch = tuple[Tensor, Tensor | None]


class Batches:
    """The endless stream of training batches.

    Args:
        split: the examples, moved to ``device`` once.
        batch_size: global batch size.
        seed: of the order and the flips.
        flip: random horizontal flips; both versions are held in memory.
        device: of the examples.
        workers: number of loader workers; 0 is fastest for data in memory.
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
        self._latest: tuple[int, Batch] | None = None  # step and batch of the loader workers

    def share(self, rank: int, world: int) -> None:
        """Restrict the batches to the ``rank``-th of ``world`` equal parts.

        Raises:
            ValueError: if ``world`` does not divide the batch size.
        """
        if self.batch_size % world:
            raise ValueError(f"batch_size={self.batch_size} is not divisible by {world} processes")
        self.rank, self.world = rank, world

    def to(self, device: torch.device | str) -> None:
        """Move the examples to a device; with loader workers, the batches alone."""
        self.device = torch.device(device)
        if not self.workers:
            check_room(self.x, self.device)
            self.x, self.y = self.x.to(device), None if self.y is None else self.y.to(device)
            self._epochs.clear()

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Order of an epoch, and rows of ``x``: the flipped copy of row i is row i + size."""
        if epoch not in self._epochs:
            order = torch.randperm(self.size, generator=generator("order", self.seed, epoch))
            row = order
            if self.flip:
                flipped = torch.rand(self.size, generator=generator("flip", self.seed, epoch)) < 0.5
                row = order + self.size * flipped[order]
            self._epochs = {e: cached for e, cached in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = _to_device(order, self.x.device), _to_device(row, self.x.device)
        return self._epochs[epoch]

    def __call__(self, step: int) -> Batch:
        """Return the examples and conditions of a step, (B, *shape) in the dtype of the data and (B, ...).

        Raises:
            RuntimeError: if a loader worker died or timed out.
        """
        if not self.workers:
            return self.gather(step)
        if self._latest is None or self._latest[0] != step:
            if self._ahead is None or self._latest is None or self._latest[0] != step - 1:
                self._ahead = self._prefetched(step)
            self._latest = step, self._next(self._ahead)
        x, y = self._latest[1]
        return x.to(self.device, non_blocking=True), None if y is None else y.to(self.device, non_blocking=True)

    @staticmethod
    def _next(ahead: Any) -> Batch:
        """Receive a batch, with one kind of error for a worker that died before and while it sent the batch."""
        try:
            return next(ahead)
        except (ConnectionResetError, ConnectionRefusedError, EOFError, FileNotFoundError) as error:
            time.sleep(0.1)  # until the system has noted its end
            dead = [str(worker.pid) for worker in ahead._workers if not worker.is_alive()]
            raise RuntimeError(
                f"DataLoader worker (pid {', '.join(dead)}) died while sending a batch: {error}"
            ) from error

    def _prefetched(self, step: int) -> Iterator[Batch]:
        """Start loader workers at ``step``."""
        return iter(
            DataLoader(
                _BatchDataset(self),
                batch_size=None,
                sampler=_StepSampler(step),
                num_workers=self.workers,
                timeout=PATIENCE,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_ignore_signals,
                generator=torch.Generator(),  # not the global one
            )
        )

    def gather(self, step: int) -> Batch:
        """Gather the batch of a step in this process."""
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
    """Check that the data fit into 80% of a GPU's free memory.

    Raises:
        DataError: with the sizes, and the setting that keeps the data in host memory.
    """
    if device.type != "cuda" or x.device == device:
        return
    free, _ = torch.cuda.mem_get_info(device)
    if x.nbytes > 0.8 * free:
        raise DataError(
            f"the data take {x.nbytes / 1e9:,.1f} GB, mirror images included, and {device} has {free / 1e9:,.1f} GB free: "
            "set trainer.workers=2 to keep them in host memory"
        )


def _to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device, asynchronously for a GPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class _BatchDataset(Dataset[Batch]):
    """Batches indexed by step."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __getitem__(self, step: int) -> Batch:
        return self.batches.gather(step)


class _StepSampler(Sampler[int]):
    """Endless sequence of steps."""

    def __init__(self, step: int):
        self.step = step

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.step)


def _ignore_signals(worker: int) -> None:
    """Ignore the user's signals in a loader worker; the parent handles them and ends its workers by SIGTERM."""
    for number in {signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)}:  # no SIGHUP on Windows
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
