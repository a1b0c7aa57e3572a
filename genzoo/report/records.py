"""Validated records of run directories for reports."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genzoo.runs import PICTURE_BYTES, Run, RunError, read_file
from genzoo.runs.redact import redact

# Keys of a configuration without influence on training, and the seed.
IGNORED = (
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
NAMES = 1000  # scores of a file, and curves of a run
LEAVES = 2000  # values of a configuration
RESULTS = 200  # result files of a run
POINTS = 40_000  # of all curves together, for a responsive page

# Seed-dependent parts of a score's setting.
OF_SEED = ("seed", "train_seed", "step", "images_seen", "budget", "ended_by", "nfe")


@dataclass(frozen=True)
class Record:
    """One run."""

    path: Path
    name: str  # shortest unique path
    config: dict[str, Any]
    status: dict[str, Any]
    results: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # thinned ``metrics.jsonl``

    @property
    def data(self) -> str:
        section = self.config.get("data")
        return str(section.get("name", "?")) if isinstance(section, Mapping) else "?"

    @property
    def model(self) -> str:
        """The choice ``model=``; from the name of the directory if it is not recorded."""
        return str(self.status.get("model") or self.path.resolve().parent.name.removesuffix(f"-{self.data}"))

    @property
    def state(self) -> str:
        return str(self.status.get("state", "?"))

    @property
    def trained(self) -> dict[str, Any]:
        """Leaves of the configuration that influence training, equal for all seeds."""
        leaves = flatten(self.config)
        return {".".join(key): value for key, value in leaves.items() if not _among(key, IGNORED)}

    @property
    def unscored(self) -> str | None:
        """Reason why the run is in no table; None if it is in one."""
        if self.state != "done":
            why = self.status.get("why")
            return f"{self.state}: {why}" if why else self.state
        return None if self.results else "finished but not scored"

    def picture(self) -> bytes | None:
        """The last grid of samples, if any."""
        try:
            return read_file(self.path / "samples.png", PICTURE_BYTES)
        except RunError:  # missing or invalid
            return None


def _among(key: tuple[str, ...], parts: Iterable[tuple[str, ...]]) -> bool:
    return any(key[: len(part)] == part for part in parts)


def flatten(tree: Any, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Flatten nested mappings to leaves by key path; a list is a leaf."""
    if not isinstance(tree, Mapping) or not tree:
        return {prefix: tree}
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, (*prefix, str(key)))
    return leaves


def find(folders: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """List the run directories at and below some folders, without duplicates, sorted by name.

    Raises:
        RunError: for a missing folder, or one without runs.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise RunError(f"runs={folder}: no such directory")
        here = sorted(path.parent for path in _configurations(folder))
        if not here:
            raise RunError(f"runs={folder}: contains no run")
        for path in here:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _configurations(folder: Path) -> Iterator[Path]:
    """Walk to every ``config.yaml`` beside a ``status.json``, without descending into runs."""
    for here, folders, files in os.walk(folder):
        if "config.yaml" in files and "status.json" in files:
            folders.clear()
            yield Path(here, "config.yaml")


def read(paths: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """Read run directories, keeping only the parts that a report shows.

    Returns:
        The runs, and one-line errors of invalid runs.
    """
    paths = list(paths)
    common = Path(os.path.commonpath([path.resolve().parent for path in paths])) if paths else Path()
    records, broken = [], []
    scores = _ScoreCache()
    for path in paths:
        try:
            run = Run(path)
            name = path.resolve().relative_to(common).as_posix()
            # Runs of other programs, or of earlier releases, may contain secrets.
            name, config, status = redact([name, check_config(run), check_status(run)])
            results = [scores.result(check_result(result, where)) for where, result in run.named_results(RESULTS)]
            record = Record(path, name, config, status, results)
            records.append(record)
            # A damaged record truncates the curves of a run, but does not invalidate its scores.
            _read_curves(run, record.events, len(paths))
        except (RunError, OSError) as error:
            broken.append(redact(" ".join(str(error).split())))
    return records, broken


_NUMBER = rb"(?:null|-?(?:0|[1-9][0-9]{0,15})(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?)"
_TEXT = rb'"[^"\\\x00-\x1f]{0,200}"'
# An event as written by training.
_EVENT = re.compile(
    rb'\{"event":"(\w{1,100})"(?:,"\w{1,100}":(?:' + _NUMBER + rb"|" + _TEXT + rb"))*+"
    rb',"values":\{(?:' + _TEXT + rb":" + _NUMBER + rb'(?:,(?=")|(?=\})))*+\}\}\n'
)


def _read_curves(run: Run, kept: list[dict[str, Any]], runs: int) -> None:
    """Append the thinned curves of a run to ``kept``; other events are only validated.

    Raises:
        RunError: naming the first line that is not an event; the lines before it are kept.
    """
    found: dict[str, list[tuple[int, bytes]]] = {"train": [], "interim": []}
    problem: RunError | None = None
    try:
        for number, line in run.event_lines():
            match = _EVENT.fullmatch(line)
            kind = match[1].decode() if match else run.parse_event(line, number)["event"]
            if kind in found:
                found[kind].append((number, line))
    except RunError as error:
        problem = error
    for lines in found.values():
        names: set[str] = set()
        for number, line in thinned(lines, 0):
            try:
                names |= run.parse_event(line, number)["values"].keys()
            except RunError as error:
                problem = problem or error
        if len(names) > NAMES:
            raise RunError(f"{run.path / 'metrics.jsonl'}: has curves of more than {NAMES:,} names")
        for number, line in thinned(lines, POINTS // max(1, runs * max(1, len(names)))):
            kept.append(run.parse_event(line, number))
    if problem:
        raise problem


def thinned(events: Sequence[Any], most: int) -> list[Any]:
    """Thin events evenly to about ``most``, at least 12, including the first and the last."""
    most = max(12, most)
    if len(events) <= most:
        return list(events)
    return [events[round(i * (len(events) - 1) / (most - 1))] for i in range(most)]


class _ScoreCache:
    """Redacts scores, and shares equal cards between runs."""

    def __init__(self) -> None:
        self._cards: dict[str, Any] = {}

    def result(self, result: dict[str, Any]) -> dict[str, Any]:
        """Redact the scores of a run."""
        entries = result["metrics"]
        # A string under each name reveals whether the name denotes a secret.
        names = redact({name: [entry.get("better"), "word"] for name, entry in entries.items()})
        if names.keys() != entries.keys() or any(word != "word" for _, word in names.values()):
            entries = redact(entries)
        metrics = {}
        for name, entry in entries.items():
            card = {part: self._card(entry["card"][part]) for part in ("protocol", "setting")}
            metrics[name] = {**{part: entry.get(part) for part in ("value", "stderr", "better")}, "card": card}
            if entry is result["metrics"].get(name):
                metrics[name]["better"] = names[name][0]
        return {"scored": redact(result.get("scored")), "metrics": metrics}

    def _card(self, card: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(card)
        if text not in self._cards:
            self._cards[text] = redact(card)
        return self._cards[text]


# Validation of the values that a report relies on; others are shown as text


def _require(condition: bool, where: Path, key: str, requirement: str) -> None:
    if not condition:
        raise RunError(f"{where}: {key}: {requirement}")


def _is_text(value: Any, most: int = 10_000) -> bool:
    return isinstance(value, str) and len(value) <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def check_config(run: Run) -> dict[str, Any]:
    """Read and validate the configuration of a run.

    Raises:
        RunError: naming the invalid key.
    """
    config, where = run.config, run.path / "config.yaml"
    data = config.get("data")
    _require(data is None or isinstance(data, dict), where, "data", "must be a mapping")
    if data:
        _require(_is_text(data.get("name", ""), 100), where, "data.name", "must be a string of at most 100 characters")
    seed = config.get("seed")
    _require(seed is None or type(seed) is int, where, "seed", "must be an integer")
    budget = config.get("budget")
    _require(budget is None or isinstance(budget, dict), where, "budget", "must be a mapping")
    for key, value in (budget or {}).items():
        _require(value is None or _is_number(value), where, f"budget.{key}", "must be a number")
    _require(len(flatten(config)) <= LEAVES, where, "configuration", f"has more than {LEAVES:,} values")
    return config


def check_status(run: Run) -> dict[str, Any]:
    """Read and validate the status of a run.

    Raises:
        RunError: naming the invalid key.
    """
    status, where = run.status, run.path / "status.json"
    for key in ("state", "why", "model", "command", "git_commit", "started"):
        value = status.get(key)
        _require(value is None or _is_text(value), where, key, "must be a string of at most 10,000 characters")
    for key in ("machine", "diagnostics"):
        _require(status.get(key) is None or isinstance(status[key], dict), where, key, "must be a mapping")
    diagnostics = status.get("diagnostics") or {}
    _require(len(diagnostics) <= NAMES, where, "diagnostics", f"has more than {NAMES:,} names")
    for key, about in diagnostics.items():
        _require(isinstance(about, dict), where, f"diagnostics.{key}", "must be a mapping")
    return status


def check_result(result: dict[str, Any], where: Path) -> dict[str, Any]:
    """Validate the scores of a run: each has a value (or null) and a card.

    Raises:
        RunError: naming the score and the missing or invalid part.
    """
    metrics = result.get("metrics")
    _require(isinstance(metrics, dict), where, "metrics", "must be a mapping")
    assert isinstance(metrics, dict)
    _require(len(metrics) <= NAMES, where, "metrics", f"has more than {NAMES:,} names")
    _require(result.get("scored") is None or _is_text(result["scored"], 100), where, "scored", "must be a time")
    for name, entry in metrics.items():
        key = f"metrics.{name[:100]}"
        _require(0 < len(name) <= 200, where, key, "must be a name of at most 200 characters")
        _require(isinstance(entry, dict), where, key, "must be a mapping")
        _require("value" in entry, where, f"{key}.value", "is missing")
        _require(
            entry["value"] is None or _is_number(entry["value"]), where, f"{key}.value", "must be a number or null"
        )
        error = entry.get("stderr")
        good = error is None or (_is_number(error) and error >= 0)
        _require(good, where, f"{key}.stderr", "must be a number of at least 0, or null")
        better = entry.get("better")
        _require(better is None or _is_text(better, 100), where, f"{key}.better", "must be a string or null")
        _require(isinstance(entry.get("card"), dict), where, f"{key}.card", "must be a mapping")
        for part in ("protocol", "setting"):
            _require(isinstance(entry["card"].get(part), dict), where, f"{key}.card.{part}", "must be a mapping")
        unit = entry["card"]["protocol"].get("unit")
        _require(unit is None or _is_text(unit, 200), where, f"{key}.card.protocol.unit", "must be a string")
    return result
