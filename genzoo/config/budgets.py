"""Limits of a budget: naming one clears those of the preset."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode

from genzoo.config.loader import COMPOSING, hydra_loader, leaves, searching
from genzoo.config.overrides import parse
from genzoo.config.paths import CONF
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
    """Read what each file of a composition says of the budget's limits, in the order in which they are merged."""
    typed: list[Any] = [o.value() for o in map(parse, overrides) if o.key_or_group == "hydra.searchpath"]
    places = [str(place).removeprefix("file://") for value in typed for place in (value or [])]
    homes = [CONF, *map(Path, [*([config_dir] if config_dir else []), *places])]
    try:
        with _open_loader() as loader:
            words = [*searching(config_dir), *overrides]
            files = loader.compute_defaults_list(verb, words, RunMode.RUN).defaults
    except COMPOSING:
        return []
    found = []
    for file in files:
        path = next((path for home in homes if (path := home / f"{file.config_path}.yaml").is_file()), None)
        package = [part for part in (file.package or "").split(".") if part not in ("", "_global_")]
        if path is None or "budget" not in (package or [path.read_text(errors="replace")])[0]:
            continue
        with contextlib.suppress(yaml.YAMLError, OSError):  # which Hydra refuses
            content = yaml.safe_load(path.read_bytes())
            for part in reversed(package):
                content = {part: content}
            found.append(_limits_of(dict(leaves(content))))
    return found


@contextlib.contextmanager
def _open_loader() -> Iterator[ConfigLoader]:
    """Return the loader of configurations that Hydra has at work, or open one."""
    if GlobalHydra.instance().is_initialized():
        yield GlobalHydra.instance().config_loader()
        return
    with hydra_loader() as loader:
        yield loader
