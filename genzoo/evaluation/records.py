"""Records of metrics in result files: value, standard error, protocol and setting."""

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
    """Build the record of a metric, with unit and direction from the catalogue.

    Raises:
        KeyError: for a name that is not in the catalogue.
    """
    metric = lookup(name)
    return {
        "value": value,
        "stderr": stderr,
        "better": metric.better,
        "card": {"protocol": {"unit": metric.unit, **protocol}, "setting": dict(setting)},
        **({"detail": detail} if detail else {}),
    }


class ScoresNotSavedError(ResourceError):
    """Scores were computed but could not be saved; the message is one line.

    Attributes:
        result: the scores.
    """

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


@contextlib.contextmanager
def saving(result: dict[str, Any], path: Any) -> Iterator[None]:
    """Attach the scores to errors of a block that saves them.

    Args:
        result: the scores.
        path: of the result file or run.

    Raises:
        ScoresNotSavedError: if the path is read-only or the disk full.
    """
    try:
        yield
    except ResourceError as error:
        raise ScoresNotSavedError(f"the scores were not saved: {error}", result) from error
    except OSError as error:
        raise ScoresNotSavedError(f"{path}: the scores were not saved: {error.strerror}", result) from error
