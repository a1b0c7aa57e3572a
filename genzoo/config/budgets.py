"""Limits of a budget: naming one clears those of the preset."""

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


def one_budget(verb: str, overrides: Sequence[str], config_dir: str | None = None) -> list[str]:
    """List the overrides by which limits of the budget that were named clear those that were not.

    What is typed comes before what files say, an experiment or a recipe before the preset, the later file before the
    earlier one: the last of them that names a limit names all that there are. A limit that is null is not named.

    Args:
        verb: the command.
        overrides: the rest of the command line; of several values of a key one.
        config_dir: a further directory of configurations.

    Returns:
        ``budget.seconds=null`` and the like, for what would be in force otherwise.
    """
    if verb != "train":
        return []
    try:
        said = {override.key_or_group: override.value() for override in map(parse, overrides)}
    except (UsageError, HydraException):  # which composing refuses in better words
        return []
    named = {name for name, value in _limits_of(said).items() if value is not None}
    if named:
        return [f"budget.{name}=null" for name in LIMITS if name not in named]
    if not config_dir and not said.keys() & {"experiment", "hydra.searchpath"}:
        return []  # the project's own recipes name no limit
    levels = [*_budgets_of_files(verb, overrides, config_dir), _limits_of(said)]
    merged = dict(itertools.chain.from_iterable(limits.items() for limits in levels))
    while levels and not named:  # what a later level makes null, no earlier one names
        named = {name for name, value in levels.pop().items() if value is not None and merged[name] is not None}
    return [f"budget.{name}=null" for name in LIMITS if merged.get(name) is not None and name not in named]


def _limits_of(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {name: keys[f"budget.{name}"] for name in LIMITS if f"budget.{name}" in keys}


def _budgets_of_files(verb: str, overrides: Sequence[str], config_dir: str | None) -> list[dict[str, Any]]:
    """Read the limits that each file of a composition sets, in the order in which they are merged."""
    found = []
    try:
        composition = list(files(verb, overrides, config_dir))
    except COMPOSING:
        return []
    for path, package in composition:
        parts = package.split(".") if package else []
        if "budget" not in (parts or [path.read_text(errors="replace")])[0]:
            continue
        with contextlib.suppress(yaml.YAMLError, OSError):  # which Hydra refuses
            content = yaml.safe_load(path.read_bytes())
            for part in reversed(parts):
                content = {part: content}
            found.append(_limits_of(dict(leaves(content))))
    return found
