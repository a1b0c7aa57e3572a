"""Full names of Python objects."""

from __future__ import annotations

from typing import Any


def is_full_name(value: Any) -> bool:
    """Whether a value is a dotted name, package.module.Class."""
    return isinstance(value, str) and "." in value and all(part.isidentifier() for part in value.split("."))
