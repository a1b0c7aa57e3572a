"""Origin of each value of a configuration: file and line.

Hydra merges the files of a defaults list one after another. Here their syntax trees are read in the same order, so that each
key has its values, the last of which is in force, with file, line and comment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from genzoo.config.loader import hydra_loader, searchpath_override
from genzoo.config.overrides import parse
from genzoo.config.paths import CONF


class Origin(NamedTuple):
    """One line of one file that sets a key."""

    key: str  # in full, "optimizer.lr"
    file: Path
    line: int
    text: str  # the value as written; empty for a section
    comment: str


def files(verb: str, overrides: Sequence[str], config_dir: str | None = None) -> Iterator[tuple[Path, str]]:
    """Yield the files of a composition in merge order, each with its package.

    Raises:
        Exception: of Hydra, if the composition fails.
    """
    typed = [o.value() for o in map(parse, overrides) if o.key_or_group == "hydra.searchpath"]
    places = [str(place).removeprefix("file://") for value in typed if isinstance(value, list) for place in value]
    homes = [CONF, *map(Path, [*([config_dir] if config_dir else []), *places])]
    with _open_loader() as loader:
        words = [*searchpath_override(config_dir), *overrides]
        listed = loader.compute_defaults_list(verb, words, RunMode.RUN).defaults
    for entry in listed:
        path = next((path for home in homes if (path := home / f"{entry.config_path}.yaml").is_file()), None)
        if path is not None:
            yield path, ".".join(part for part in (entry.package or "").split(".") if part not in ("", "_global_"))


def origins(verb: str, overrides: Sequence[str], config_dir: str | None = None) -> dict[str, list[Origin]]:
    """List the lines that set each key of a composition, the effective one last."""
    found: dict[str, list[Origin]] = {}
    for path, package in files(verb, overrides, config_dir):
        for origin in _lines(path, package):
            found.setdefault(origin.key, []).append(origin)
    return found


def _lines(path: Path, package: str) -> Iterator[Origin]:
    text = path.read_text()
    lines = text.splitlines()
    left: list[tuple[str, yaml.Node | None]] = [(package, yaml.compose(text, Loader=yaml.SafeLoader))]
    while left:
        prefix, node = left.pop()
        if not isinstance(node, yaml.MappingNode):
            continue
        for key, value in node.value:
            if not prefix and key.value in ("defaults", "hydra"):
                continue
            full = f"{prefix}.{key.value}" if prefix else str(key.value)
            number = key.start_mark.line
            comment = lines[number].partition(" # ")[2].strip()
            nested = isinstance(value, yaml.MappingNode)
            written = "" if nested else text[value.start_mark.index : value.end_mark.index].strip()
            yield Origin(full, path, number + 1, written, comment)
            if nested:
                left.append((full, value))


@contextlib.contextmanager
def _open_loader() -> Iterator[ConfigLoader]:
    """Return Hydra's current config loader, or initialise one."""
    if GlobalHydra.instance().is_initialized():
        yield GlobalHydra.instance().config_loader()
        return
    with hydra_loader() as loader:
        yield loader


def shown(path: Path) -> str:
    """Path of a file relative to the project if it is in ``conf``."""
    return f"conf/{path.relative_to(CONF).as_posix()}" if path.is_relative_to(CONF) else str(path)
