"""Scores as they are written into a run: the number, its error, and how it was made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from genzoo.catalogue import lookup
from genzoo.runs import ResourceError


def to_record(
    name: str,
    value: Any,
    stderr: float | None,
    protocol: dict[str, Any],
    setting: dict[str, Any],
    detail: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Put a number together with how it was made; unit and direction are those of the catalogue.

    Raises:
        KeyError: where the catalogue has no metric of this name.
    """
    metric = lookup(name)
    return {
        "value": value,
        "stderr": stderr,
        "better": metric.better,
        "card": {"protocol": {"unit": metric.unit, **protocol}, "setting": dict(setting)},
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
