"""Fault-tolerant output: progress on stderr, results on stdout.

A broken pipe (``2>&1 | head -1``), a closed terminal or a full disk behind a redirection must not end a long training. Output
that cannot be written is dropped; lost results set the exit code of the command.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

BROKEN_PIPE = 141  # exit code for a broken pipe: 128 + SIGPIPE, as in a shell
# A stream closed by Python raises ValueError.
_FAILURES = (OSError, ValueError)


class FaultTolerantStream:
    """A text stream that drops output on write errors.

    Args:
        stream: any text stream.

    Attributes:
        failure: the first error, or None.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.failure: Exception | None = None

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except _FAILURES as error:
            self.failure = self.failure or error
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except _FAILURES as error:
            self.failure = self.failure or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def stderr() -> Any:
    """Standard error as a stream that never raises, even if it is missing."""
    stream = sys.stderr
    if stream is None:
        return open(os.devnull, "w")
    return stream if isinstance(stream, FaultTolerantStream) else FaultTolerantStream(stream)


def log_stderr(message: str) -> None:
    """Write one line of progress to standard error."""
    print(f"genzoo: {message}", file=stderr(), flush=True)


@contextlib.contextmanager
def fault_tolerant_streams() -> Iterator[FaultTolerantStream]:
    """Replace ``sys.stdout`` and ``sys.stderr`` by fault-tolerant streams within a block.

    Yields:
        Standard output; its ``failure`` is set if results were lost.
    """
    _open_closed_descriptors()
    streams = sys.stdout, sys.stderr
    with contextlib.suppress(AttributeError, *_FAILURES):
        # Characters missing in the locale are written as "?".
        text: Any = sys.stdout
        text.reconfigure(errors="replace")
    out, err = (FaultTolerantStream(stream) for stream in streams)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = streams
        for stream in (out, err):
            stream.flush()
            if stream.failure:
                _discard(stream)


def exit_code(failure: Exception) -> int:
    """Exit code of lost results: 141 for a broken pipe, else 4."""
    return BROKEN_PIPE if isinstance(failure, OSError) and failure.errno == errno.EPIPE else 4


def _open_closed_descriptors() -> None:
    """Open the null device for closed standard streams, whose descriptors the next file would reuse."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def _discard(stream: FaultTolerantStream) -> None:
    """Discard the buffer of a stream; the interpreter's final flush would set the exit code to 120."""
    with contextlib.suppress(*_FAILURES):
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
        stream.flush()


def status_line(text: str) -> None:
    """Show progress in one overwritten line of a terminal."""
    stream = stderr()
    if stream.isatty():
        print(f"\r\x1b[K{text}", end="", file=stream, flush=True)
