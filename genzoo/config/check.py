"""Validation of configurations against the schema, with full keys in messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from genzoo.config.schema import SCHEMAS, SECTIONS, Section
from genzoo.errors import UsageError, nearest
from genzoo.runs.upgrade import RENAMED


def unknown_key(key: str, known: Iterable[str]) -> UsageError:
    """Build the error of an unknown key, with the closest known key as a suggestion."""
    known = set(known)
    if now := renamed(key, known):
        return UsageError(f"unknown key '{key}': {now}")
    parent, dot, leaf = key.rpartition(".")
    beside = {k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent}
    if not beside:
        return UsageError(f"unknown key '{key}': {nearest(key, known)}")
    hint = nearest(leaf, beside - {"_target_", "_partial_"}).replace("mean '", f"mean '{parent}{dot}")
    if "_target_" in beside and hint.startswith("choose"):
        hint += f"; add an argument that the configuration omits by +{key}=..."
    return UsageError(f"unknown key '{key}': {hint}")


def renamed(key: str, known: Iterable[str]) -> str | None:
    """Hint for a renamed key of an earlier release; None for other keys."""
    parent, dot, leaf = key.rpartition(".")
    if leaf == "num_classes" and parent.partition(".")[0] in ("model", "codec"):
        return "set data.conditional=true for a model conditioned on the classes of the data"
    now = f"{parent}{dot}{RENAMED[leaf]}" if leaf in RENAMED else "label" if key == "y" else None
    return f"did you mean '{now}'?" if now and now in known else None


def check(verb: str, plain: Any) -> dict[str, Any]:
    """Validate a configuration of plain types.

    Raises:
        UsageError: naming the full key.
    """

    return _checked(SCHEMAS[verb], plain)


def check_section(name: str, section: Any) -> dict[str, Any]:
    """Validate one section of a run's configuration.

    Raises:
        UsageError: naming the full key.
    """

    return _checked(SECTIONS[name], section, name)


def _checked(schema: type[Section], plain: Any, name: str = "") -> dict[str, Any]:
    try:
        return schema.model_validate(plain).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise _usage_error(error, name, schema.known_keys(f"{name}." if name else "")) from error


def _usage_error(error: ValidationError, section: str, known: Iterable[str]) -> UsageError:
    """Convert a pydantic error to one line with the full key."""
    first = error.errors()[0]
    key, given, message = ".".join(filter(None, [section, *map(str, first["loc"])])), first["input"], first["msg"]
    if first["type"] == "extra_forbidden":
        return unknown_key(key, known)
    if first["type"] == "missing":
        return UsageError(f"{key} is missing: set {key}=...")
    if first["type"] == "value_error":  # of genzoo's own validators, whose messages name the keys
        return UsageError(str(first["ctx"]["error"]))
    shown = "null" if given is None else str(given)[:100]
    return UsageError(f"{key}={shown}: {message[0].lower()}{message[1:]}")
