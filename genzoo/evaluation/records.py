"""Scores as they are written into a run: the number, its error, and how it was made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from genzoo.runs import ResourceError


def to_record(
    value: Any,
    stderr: float | None,
    better: str,
    protocol: dict[str, Any],
    setting: dict[str, Any],
    detail: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Put a number together with how it was made."""
    return {
        "value": value,
        "stderr": stderr,
        "better": better,
        "card": {"protocol": dict(protocol), "setting": dict(setting)},
        **({"detail": detail} if detail else {}),
    }


class NotKept(ResourceError):
    """Scores were computed and could not be written down; the message is one line.

    Attributes:
        result: the scores, to be shown at least.
    """

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


@contextlib.contextmanager
def kept(result: dict[str, Any], place: Any) -> Iterator[None]:
    """Keep hold of scores that cannot be written down.

    Args:
        result: the scores.
        place: where they are written.

    Raises:
        NotKept: where the place is read-only or full.
    """
    try:
        yield
    except ResourceError as error:
        raise NotKept(f"the scores were not kept: {error}", result) from error
    except OSError as error:
        raise NotKept(f"{place}: the scores were not kept: {error.strerror}", result) from error
