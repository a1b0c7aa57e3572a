"""Signals that end a run: heard at once where that is safe, else after the step or the checkpoint that is under way.

A run that is told to stop (SIGTERM, by a cluster or an operator; SIGINT, by Ctrl-C; SIGHUP, by a terminal that was closed)
writes a checkpoint and leaves with 128 plus the number of the signal. A second signal does not wait for the checkpoint. What
whoever started the process has made it ignore stays ignored: SIGHUP under ``nohup``, SIGINT in a background job of a script.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # not on Windows
HEARD = (signal.SIGTERM, signal.SIGINT, *([] if _HANGUP is None else [_HANGUP]))
# A signal often arrives twice, sent to the process and to its group, or by the kernel and by a shell that exits.
REPEATED = 1.0  # seconds within which the same signal is the same request


class Stopped(BaseException):
    """A signal has ended the run. No ``Exception``: nothing that goes on after errors may go on after this one.

    Attributes:
        exit_code: of the command line, 143, 130 or 129.
        abrupt: whether a second signal asked to leave at once, whatever was under way.
    """

    def __init__(self, number: int, abrupt: bool = False):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number
        self.abrupt = abrupt


def is_ignored(number: int) -> bool:
    """Return whether a signal is ignored by order of whoever started this process; SIGTERM never is."""
    return number != signal.SIGTERM and signal.getsignal(number) is signal.SIG_IGN


class Signals:
    """While it is entered, SIGTERM, SIGINT and SIGHUP raise ``Stopped``: at once, or in ``held`` when ``check`` is called."""

    def __init__(self) -> None:
        self.heard: int | None = None
        self._time = 0.0  # when it was heard
        self._holding = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def listen(self) -> None:
        """Take the signals, from whoever has them now."""
        if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
            return
        for number in HEARD:
            if is_ignored(number):
                continue
            before = signal.signal(number, self._hear)
            self._before.setdefault(number, before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        current = time.monotonic()
        again = self.heard is not None
        if again and ((self.heard == number and current - self._time < REPEATED) or number == _HANGUP):
            return
        self.heard, self._time = number, current
        if again or not self._holding:
            raise Stopped(number, abrupt=again)

    def check(self) -> None:
        """Stop here if a signal was heard.

        Raises:
            Stopped: if so.
        """
        if self.heard is not None:
            raise Stopped(self.heard)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep signals until ``check``, or the end of the block."""
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before
        if not before:
            self.check()

    @contextlib.contextmanager
    def free(self) -> Iterator[None]:
        """Hear signals at once, within a block that holds them."""
        self.check()
        before, self._holding = self._holding, False
        try:
            yield
        finally:
            self._holding = before
