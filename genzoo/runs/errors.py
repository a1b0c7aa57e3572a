"""Errors of run directories and machine resources."""

from __future__ import annotations


class RunError(ValueError):
    """An invalid or incomplete run directory; the message is one line."""

    exit_code = 2  # of the command line


class ResourceError(RuntimeError):
    """Exhausted resources: disk, memory, worker processes; the message is one line."""

    exit_code = 4  # of the command line
