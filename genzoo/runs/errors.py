"""What may be wrong with a run directory, or with the machine that it lies on."""

from __future__ import annotations


class RunError(ValueError):
    """A directory that is no run, or a run that lacks what was asked for; the message is one line."""

    exit_code = 2  # of the command line


class ResourceError(RuntimeError):
    """Too little of something that a machine has: disk, memory, helpers; the message is one line."""

    exit_code = 4  # of the command line
