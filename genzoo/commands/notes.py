"""What a command says on stderr beside its result."""

from __future__ import annotations

import contextlib
import sys

from genzoo.redact import redact


def note(text: str) -> None:
    """Say something in one line, whatever a name that is quoted in it would do to a terminal; nobody need hear it."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in redact(" ".join(text.split())))
    with contextlib.suppress(OSError, ValueError):  # stderr is gone, or closed
        print(f"genzoo: {line}", file=sys.stderr, flush=True)
