"""The clock of a training: seconds of computing.

On an accelerator a step returns when it is launched, so the clock waits for the device before it is read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed what was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """A stopwatch that runs within ``running``.

    Attributes:
        seconds: counted so far in this process.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._read_at: float | None = None  # None while it stands

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count seconds up to the last ``read`` of the block."""
        self._read_at = time.monotonic()
        try:
            yield
        finally:
            self._read_at = None

    @property
    def stands(self) -> bool:
        """Whether no seconds are counted now."""
        return self._read_at is None

    def read(self, device: torch.device) -> float:
        """Wait for a device; return the seconds since the last reading, and count them."""
        assert self._read_at is not None
        synchronize(device)
        now = time.monotonic()
        elapsed, self._read_at = now - self._read_at, now
        self.seconds += elapsed
        return elapsed

    def skip(self) -> None:
        """Leave out the time since the last reading."""
        if self._read_at is not None:
            self._read_at = time.monotonic()
