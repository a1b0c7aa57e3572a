"""Limits of a budget: setting one clears those of the preset."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from hydra.errors import HydraException

from genzoo.config.loader import COMPOSING, leaves
from genzoo.config.origins import files
from genzoo.config.overrides import parse
from genzoo.errors import UsageError

LIMITS = ("images", "seconds", "flops")  # of a budget


def clearing_overrides(verb: str, overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """Overrides that clear the limits of a preset budget if another limit is set.

    The command line takes precedence over files, an experiment or a recipe over the preset, later files over earlier ones: the
    level of highest precedence that sets a limit (other than null) determines all limits.

    Args:
        verb: the command.
        overrides: the command-line overrides, with one value per key.
        config_dir: a further directory of configurations.

    Returns:
        Overrides such as ``budget.seconds=null``.
    """
    if verb != "train":
        return []
    try:
        typed = {override.key_or_group: override.value() for override in map(parse, overrides)}
    except (UsageError, HydraException):  # composition raises a better message
        return []
    named = {name for name, value in _limits_of(typed).items() if value is not None}
    if named:
        return [f"budget.{name}=null" for name in LIMITS if name not in named]
    if not config_dir and not typed.keys() & {"experiment", "hydra.searchpath"}:
        return []  # the built-in recipes set no limit
    levels = [*_budgets_of_files(verb, overrides, config_dir), _limits_of(typed)]
    merged = dict(itertools.chain.from_iterable(limits.items() for limits in levels))
    while levels and not named:  # a limit cleared by a later level is not set by an earlier one
        named = {name for name, value in levels.pop().items() if value is not None and merged[name] is not None}
    return [f"budget.{name}=null" for name in LIMITS if merged.get(name) is not None and name not in named]


def _limits_of(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {name: keys[f"budget.{name}"] for name in LIMITS if f"budget.{name}" in keys}


def _budgets_of_files(verb: str, overrides: Sequence[str], config_dir: str | None) -> list[dict[str, Any]]:
    """Read the limits of each file of a composition, in merge order."""
    found = []
    try:
        composition = list(files(verb, overrides, config_dir))
    except COMPOSING:
        return []
    for path, package in composition:
        parts = package.split(".") if package else []
        if "budget" not in (parts or [path.read_text(errors="replace")])[0]:
            continue
        with contextlib.suppress(yaml.YAMLError, OSError):  # Hydra raises its own error
            content = yaml.safe_load(path.read_bytes())
            for part in reversed(parts):
                content = {part: content}
            found.append(_limits_of(dict(leaves(content))))
    return found
