"""Standard error for progress, standard output for results, and what happens where they cannot be written.

A reader that has gone (``2>&1 | head -1``), a terminal that was closed or a disk that is full behind a redirection must not
end a run that takes days. Progress that cannot be written is dropped. Results that cannot be written are dropped too, so that
the work is finished and kept in its files, but the exit status of the command says that they were lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

BROKEN_PIPE = 141  # exit code of a command whose output nobody read: 128 + SIGPIPE, as a shell reports it
# "Bad file descriptor" is a ValueError where Python has closed the stream itself.
_FAILURES = (OSError, ValueError)


class FaultTolerantStream:
    """A text stream that drops what cannot be written.

    Args:
        stream: any text stream.

    Attributes:
        failure: the first error, None as long as everything was written.
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
    """Return a view of standard error that never raises, also where there is none."""
    stream = sys.stderr
    if stream is None:
        return open(os.devnull, "w")
    return stream if isinstance(stream, FaultTolerantStream) else FaultTolerantStream(stream)


def log_stderr(message: str) -> None:
    """Write one line of progress to standard error."""
    print(f"genzoo: {message}", file=stderr(), flush=True)


@contextlib.contextmanager
def fault_tolerant_streams() -> Iterator[FaultTolerantStream]:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that never raise, within a block.

    Yields:
        Standard output, whose ``failure`` tells whether results were lost.
    """
    _open_closed_descriptors()
    streams = sys.stdout, sys.stderr
    with contextlib.suppress(AttributeError, *_FAILURES):
        # A locale without these characters shows them as "?" instead of raising after the training.
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
    """Return the exit code of a command whose results could not be written: 141 for a broken pipe, else 4."""
    return BROKEN_PIPE if isinstance(failure, OSError) and failure.errno == errno.EPIPE else 4


def _open_closed_descriptors() -> None:
    """Open the null device where a standard stream was closed, or the next file would take its descriptor and its output."""
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
    """Send what is left in a buffer nowhere; the interpreter's last flush would change the exit code to 120."""
    with contextlib.suppress(*_FAILURES):
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
        stream.flush()


def status_line(text: str) -> None:
    """Show on the terminal what is being computed, in one line that is overwritten; nothing where there is no terminal."""
    stream = stderr()
    if stream.isatty():
        print(f"\r\x1b[K{text}", end="", file=stream, flush=True)
