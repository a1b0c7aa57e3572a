"""Run directories as a report sees them: found, read, and told apart from their seeds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genzoo.redact import redact
from genzoo.runs import PICTURE_BYTES, Run, RunError, read_file

# Parts of a configuration that do not change what is trained: where it is written, and how it is looked at.
BESIDES = (
    ("seed",),
    ("outputs",),
    ("logger",),
    ("timeout",),
    ("objective",),
    ("metrics",),
    ("budget", "samples"),
    ("trainer", "grids"),
    ("trainer", "saves"),
    ("trainer", "scores"),
    ("trainer", "score_samples"),
)
# Parts of a score's setting that differ from seed to seed.
OF_SEED = ("seed", "train_seed", "step", "images_seen", "budget", "ended_by", "nfe")


@dataclass(frozen=True)
class Record:
    """One run."""

    path: Path
    name: str  # as short as tells it apart
    config: dict[str, Any]
    status: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # of ``metrics.jsonl``

    @property
    def data(self) -> str:
        section = self.config.get("data")
        return str(section.get("name", "?")) if isinstance(section, Mapping) else "?"

    @property
    def model(self) -> str:
        """What ``model=`` was, or for a run that does not say the name of its directory without the data's."""
        return str(self.status.get("model") or self.path.resolve().parent.name.removesuffix(f"-{self.data}"))

    @property
    def state(self) -> str:
        return str(self.status.get("state", "?"))

    @property
    def trained(self) -> dict[str, Any]:
        """What was trained and how, the same for all seeds: the leaves of the configuration."""
        leaves = flatten(self.config)
        return {".".join(key): value for key, value in leaves.items() if not _among(key, BESIDES)}

    @property
    def unscored(self) -> str | None:
        """Why the run is in no table, None where it is in one."""
        if self.state != "done":
            why = self.status.get("why")
            return f"{self.state}: {why}" if why else self.state
        return None if self.results else "finished, and not scored"

    def picture(self) -> bytes | None:
        """The last grid of samples, where there is one."""
        try:
            return read_file(self.path / "samples.png", PICTURE_BYTES)
        except RunError:  # there is none, or it is none
            return None


def _among(key: tuple[str, ...], parts: Iterable[tuple[str, ...]]) -> bool:
    return any(key[: len(part)] == part for part in parts)


def flatten(tree: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """List the leaves of nested mappings by their keys; a list is a leaf."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, (*prefix, str(key)))
    return leaves


def find(folders: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """List the run directories at and below some folders, each once, in the order of their names.

    Raises:
        RunError: for a folder that is not there, or below which there is no run.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise RunError(f"runs={folder}: no such directory")
        here = sorted(path.parent for path in _configurations(folder))
        if not here:
            raise RunError(f"runs={folder}: there is no run in it")
        for path in here:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _configurations(folder: Path) -> Iterator[Path]:
    """Walk to every ``config.yaml`` that lies beside a status; nothing is looked for inside a run."""
    for here, folders, files in os.walk(folder):
        if "config.yaml" in files and "status.json" in files:
            folders.clear()
            yield Path(here, "config.yaml")


def read(paths: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """Read run directories.

    Returns:
        The runs, and in one line each what could not be read.
    """
    paths = list(paths)
    common = Path(os.path.commonpath([path.resolve().parent for path in paths])) if paths else Path()
    records, broken = [], []
    for path in paths:
        try:
            run = Run(path)
            name = path.resolve().relative_to(common).as_posix()
            # Runs of other programs, and of former versions, may hold secrets.
            kept = redact([name, run.config, run.status, list(run.results())])
            record = Record(path, *kept)
            records.append(record)
            # A record that is damaged takes the curves of its run away, not the scores.
            record.events.extend(run.events(checked=True))
        except (RunError, OSError) as error:
            broken.append(redact(" ".join(str(error).split())))
    return records, broken
