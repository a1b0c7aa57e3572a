"""Run directories as a report sees them: found, read, and told apart from their seeds."""

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
NAMES = 1000  # of the scores of one file, and of one run's curves
LEAVES = 2000  # values of a configuration
RESULTS = 200  # files of scores in one run
POINTS = 40_000  # of all curves together, so that a page of many runs still opens at once

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
    events: list[dict[str, Any]] = field(default_factory=list)  # of ``metrics.jsonl``, those that are shown

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
    """Read run directories, one at a time: of a run nothing is kept but what a report shows.

    Returns:
        The runs, and in one line each what could not be read, or is not what a run holds.
    """
    paths = list(paths)
    common = Path(os.path.commonpath([path.resolve().parent for path in paths])) if paths else Path()
    records, broken = [], []
    kept = _Kept()
    for path in paths:
        try:
            run = Run(path)
            name = path.resolve().relative_to(common).as_posix()
            # Runs of other programs, and of former versions, may hold secrets.
            name, config, status = redact([name, check_config(run), check_status(run)])
            results = [kept.result(check_result(result, where)) for where, result in run.named_results(RESULTS)]
            record = Record(path, name, config, status, results)
            records.append(record)
            # A record that is damaged takes the curves of its run away from there on, not the scores.
            _read_curves(run, record.events, len(paths))
        except (RunError, OSError) as error:
            broken.append(redact(" ".join(str(error).split())))
    return records, broken


_NUMBER = rb"(?:null|-?(?:0|[1-9][0-9]{0,15})(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,2})?)"
_TEXT = rb'"[^"\\\x00-\x1f]{0,200}"'
# An event in the form in which training writes it.
_EVENT = re.compile(
    rb'\{"event":"(\w{1,100})"(?:,"\w{1,100}":(?:' + _NUMBER + rb"|" + _TEXT + rb"))*+"
    rb',"values":\{(?:' + _TEXT + rb":" + _NUMBER + rb'(?:,(?=")|(?=\})))*+\}\}\n'
)


def _read_curves(run: Run, kept: list[dict[str, Any]], runs: int) -> None:
    """Keep of a run's events what a page of so many runs shows; of the others only the form is checked.

    Raises:
        RunError: naming the first line that is no event; what comes before it is kept.
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
    """Keep at most about ``most`` events, at least 12, evenly spread, the first and the last among them."""
    most = max(12, most)
    if len(events) <= most:
        return list(events)
    return [events[round(i * (len(events) - 1) / (most - 1))] for i in range(most)]


class _Kept:
    """What is kept of scores: cards that are the same in many runs once, and no secrets."""

    def __init__(self) -> None:
        self._cards: dict[str, Any] = {}

    def result(self, result: dict[str, Any]) -> dict[str, Any]:
        """Return the scores of a run as tables show them."""
        entries = result["metrics"]
        # A text under each name, which shows whether the name is one of secrets.
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


# What a report takes for granted; whatever else a file may hold is shown as text


def _must(holds: bool, where: Path, key: str, what: str) -> None:
    if not holds:
        raise RunError(f"{where}: {key}: {what}")


def _is_text(value: Any, most: int = 10_000) -> bool:
    return isinstance(value, str) and len(value) <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def check_config(run: Run) -> dict[str, Any]:
    """Read the configuration of a run.

    Raises:
        RunError: naming the key that is not what it should be.
    """
    config, where = run.config, run.path / "config.yaml"
    data = config.get("data")
    _must(data is None or isinstance(data, dict), where, "data", "must be a mapping")
    if data:
        _must(_is_text(data.get("name", ""), 100), where, "data.name", "must be a text of at most 100 letters")
    seed = config.get("seed")
    _must(seed is None or type(seed) is int, where, "seed", "must be an integer")
    budget = config.get("budget")
    _must(budget is None or isinstance(budget, dict), where, "budget", "must be a mapping")
    for key, value in (budget or {}).items():
        _must(value is None or _is_number(value), where, f"budget.{key}", "must be a number")
    _must(len(flatten(config)) <= LEAVES, where, "all of it", f"has more than {LEAVES:,} values")
    return config


def check_status(run: Run) -> dict[str, Any]:
    """Read the status of a run.

    Raises:
        RunError: naming the key that is not what it should be.
    """
    status, where = run.status, run.path / "status.json"
    for key in ("state", "why", "model", "command", "git_commit", "started"):
        value = status.get(key)
        _must(value is None or _is_text(value), where, key, "must be a text of at most 10,000 letters")
    for key in ("machine", "diagnostics"):
        _must(status.get(key) is None or isinstance(status[key], dict), where, key, "must be a mapping")
    said = status.get("diagnostics") or {}
    _must(len(said) <= NAMES, where, "diagnostics", f"has more than {NAMES:,} names")
    for key, about in said.items():
        _must(isinstance(about, dict), where, f"diagnostics.{key}", "must be a mapping")
    return status


def check_result(result: dict[str, Any], where: Path) -> dict[str, Any]:
    """Check the scores of a run: every one has a value, or null for none, and a card that says how it was made.

    Raises:
        RunError: naming the score and what it lacks.
    """
    metrics = result.get("metrics")
    _must(isinstance(metrics, dict), where, "metrics", "must be a mapping")
    assert isinstance(metrics, dict)
    _must(len(metrics) <= NAMES, where, "metrics", f"has more than {NAMES:,} names")
    _must(result.get("scored") is None or _is_text(result["scored"], 100), where, "scored", "must be a time")
    for name, entry in metrics.items():
        key = f"metrics.{name[:100]}"
        _must(0 < len(name) <= 200, where, key, "must be a name of at most 200 letters")
        _must(isinstance(entry, dict), where, key, "must be a mapping")
        _must("value" in entry, where, f"{key}.value", "is missing")
        _must(entry["value"] is None or _is_number(entry["value"]), where, f"{key}.value", "must be a number or null")
        error = entry.get("stderr")
        good = error is None or (_is_number(error) and error >= 0)
        _must(good, where, f"{key}.stderr", "must be a number of at least 0, or null")
        better = entry.get("better")
        _must(better is None or _is_text(better, 100), where, f"{key}.better", "must be a text or null")
        _must(isinstance(entry.get("card"), dict), where, f"{key}.card", "must be a mapping")
        for part in ("protocol", "setting"):
            _must(isinstance(entry["card"].get(part), dict), where, f"{key}.card.{part}", "must be a mapping")
        unit = entry["card"]["protocol"].get("unit")
        _must(unit is None or _is_text(unit, 200), where, f"{key}.card.protocol.unit", "must be a text")
    return result
