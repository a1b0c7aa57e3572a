"""Self-contained web page of a comparison: it makes no requests, and escapes all text of runs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from genzoo.catalogue import is_cost
from genzoo.report import leaderboard, texts
from genzoo.report.leaderboard import Cell, Row, Table
from genzoo.report.records import POINTS, Record, flatten, thinned

PICTURE = 4 * 2**20  # bytes of the largest grid
PICTURES = 64 * 2**20  # bytes of all grids
AXES = ("images", "seconds", "flops")


def build(title: str, records: Sequence[Record], tables: Sequence[Table], unfinished: Sequence[str]) -> str:
    """Render the page.

    Args:
        title: its heading.
        records: all runs.
        tables: of their scores, see ``leaderboard.tables``.
        unfinished: runs without scores and the reasons, one line each.
    """
    assets = resources.files("genzoo.report") / "assets"
    script = (assets / "page.js").read_text()
    plotly = (resources.files("plotly") / "package_data" / "plotly.min.js").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":"), "allow_nan": False}
    content, pictures = payload(records, tables, unfinished)
    finished = sum(record.state == "done" for record in records)
    return environment.from_string((assets / "index.html").read_text()).render(
        title=title,
        summary=f"{finished} finished runs of {len(records)}, {sum(len(table.rows) for table in tables)} rows.",
        # Only genzoo's own assets, which contain no text of runs, are not escaped.
        style=jinja2.utils.markupsafe.Markup((assets / "page.css").read_text()),
        script=jinja2.utils.markupsafe.Markup(script),
        plotly=jinja2.utils.markupsafe.Markup(plotly),
        hashes=" ".join(f"'sha256-{_sha256(text)}'" for text in (plotly, script)),
        data=content,
        pictures=pictures,  # separate from the data, which delay the first paint
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class Interned:
    """A list of unique values, referenced by index."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.size = 0  # total length of strings
        self._places: dict[str, int] = {}

    def place(self, value: Any) -> int:
        name = value if isinstance(value, str) else leaderboard.key(value)
        if name not in self._places:
            self._places[name] = len(self.values)
            self.values.append(value)
            self.size += len(value) if isinstance(value, str) else 0
        return self._places[name]


def payload(
    records: Sequence[Record], tables: Sequence[Table], unfinished: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Collect the data of the page as plain JSON, and the grids of samples in base64."""
    protocols, pictures, trained = Interned(), Interned(), Interned()
    labels = {id(record): row.label for table in tables for row in table.rows for record, _ in row.runs}
    content = {
        "tables": [
            {
                "data": table.data,
                "why": table.why,
                "fairness": texts.fairness(table),
                "certainty": texts.certainty(table),
                "columns": columns(table),
                "rows": board(table, protocols, pictures, trained),
            }
            for table in tables
        ],
        "protocols": protocols.values,
        "trained": trained.values,
        "series": [curves(record, labels.get(id(record), record.model), len(records)) for record in records],
        "diagnostics": diagnostics(records),
        "unfinished": list(unfinished),
        "commands": [str(record.status.get("command", "?")) for record in records],
    }
    content["labels"] = {
        name: texts.label(name) for series in content["series"] for name in series["y"] if "/fd_" in name
    }
    return _plain(content), pictures.values


def columns(table: Table) -> list[dict[str, Any]]:
    """Describe the metrics of a table."""
    headlines = set(table.headlines)
    return [column(table, name, name in headlines) for name in table.metrics]


def column(table: Table, name: str, headline: bool) -> dict[str, Any]:
    """Describe one metric of a table."""
    first = next(row.cells[name] for row in table.rows if name in row.cells)
    ranked = leaderboard.ranked(table, name)
    return {
        "name": name,
        "label": texts.label(name),
        "unit": first.unit,
        "better": first.better,
        "cost": is_cost(name),
        "headline": headline,
        "ranked": ranked,
        "note": None
        if ranked
        else "not ranked: a training cost, different protocols, no direction, or noise may be best",
    }


def board(table: Table, protocols: Interned, pictures: Interned, trained: Interned) -> list[dict[str, Any]]:
    """Describe the rows of a table."""
    marks: dict[tuple[str, int], str] = {}
    for name in table.metrics:
        best, near = leaderboard.leaders(table, name)
        marks |= {(name, id(row)): "best" for row in best} | {(name, id(row)): "near" for row in near}

    def show(row: Row, name: str, cell: Cell) -> dict[str, Any]:
        return {
            "text": texts.measured(cell),
            "mean": cell.mean,
            "stderr": cell.stderr,
            "source": cell.source,
            "values": cell.values,
            "missing": cell.missing,
            "mark": marks.get((name, id(row))),
            "protocol": protocols.place(cell.protocol),
        }

    shown = []
    for row in table.rows:
        # The grids of runs are of unguided samples.
        unguided = [] if row.setting.get("guidance") else row.runs
        grid = next((grid for record, _ in unguided if (grid := picture(record))), None)
        shown.append(
            {
                "label": row.label,
                "model": row.model,
                "seeds": row.seeds,
                "failed": row.failed,
                "ended": leaderboard.ending_note(table, row),
                "setting": {".".join(part): value for part, value in flatten(row.setting).items()},
                "trained": trained.place(row.trained),
                "cells": {name: show(row, name, cell) for name, cell in row.cells.items()},
                "runs": [origin(record) for record, _ in row.runs],
                "picture": None if grid is None or pictures.size + len(grid) > PICTURES else pictures.place(grid),
            }
        )
    return shown


def origin(record: Record) -> dict[str, Any]:
    """Provenance of a run."""
    status = record.status
    machine = status.get("machine")
    machine = machine if isinstance(machine, Mapping) else {}
    return {
        "name": record.name,
        "command": str(status.get("command", "")),
        "git": str(status.get("git_commit") or ""),
        "started": str(status.get("started") or ""),
        "machine": ", ".join(filter(None, [texts.hardware(status), str(machine.get("system") or "")])),
    }


def picture(record: Record) -> str | None:
    """The last grid of a run in base64, if it is a PNG of at most ``PICTURE`` bytes."""
    content = record.picture()
    if content is None or len(content) > PICTURE or not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    return base64.b64encode(content).decode()


def curves(record: Record, label: str, runs: int) -> dict[str, Any]:
    """Training curves of a run: axes for each kind of event, and values for each name."""
    found: dict[str, list[Mapping[str, Any]]] = {"train": [], "interim": []}
    for event in record.events:
        if event.get("event") in found and isinstance(event.get("values"), Mapping):
            found[event["event"]].append(event)
    axes, values = {}, {}
    for kind, events in found.items():
        names = list(dict.fromkeys(name for event in events for name in event["values"]))
        chosen = thinned(events, POINTS // max(1, runs * max(1, len(names))))
        axes[kind] = {axis: [_number(event.get(axis)) for event in chosen] for axis in AXES}
        for name in names:
            points = [_number(event["values"].get(name)) for event in chosen]
            if any(point is not None for point in points):
                values[name] = {"k": kind, "v": points}
    seed = record.config.get("seed")
    return {
        "label": label,
        "model": record.model,
        "data": record.data,
        "seed": str(seed),
        "x": axes,
        "y": values,
    }


def _number(value: Any) -> float | None:
    return float(f"{value:.6g}") if type(value) in (int, float) else None


def diagnostics(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Labels, units and directions of the loss terms of each family, from its runs."""
    described: dict[str, dict[str, Any]] = {}
    for record in records:
        given = record.status.get("diagnostics")
        for name, about in (given if isinstance(given, Mapping) else {}).items():
            if isinstance(about, Mapping):
                texts = {part: str(about.get(part) or "") for part in ("label", "unit", "better")}
                described.setdefault(record.model, {})[str(name)] = texts
    return described


def _plain(value: Any) -> Any:
    """Convert to JSON types; YAML dates and sets of untrusted configurations become strings."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
