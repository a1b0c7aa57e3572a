"""Notes on stderr."""

from __future__ import annotations

from genzoo.console import log_stderr
from genzoo.runs.redact import redact


def note(text: str) -> None:
    """Write one line to stderr, with secrets redacted and control characters escaped."""
    log_stderr("".join(c if c.isprintable() else repr(c)[1:-1] for c in redact(" ".join(text.split()))))
