"""Leaderboard as text: labels, formatted numbers, equal-compute statement, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from genzoo import catalogue
from genzoo.catalogue import is_cost
from genzoo.report.certainty import standings, winner
from genzoo.report.leaderboard import Cell, Row, Table, ending_note, is_partial, key, leaders, ranked, resource_use

CSV_COLUMNS = (
    *("table", "data", "row", "model", "seeds", "runs_failed", "metric", "mean", "stderr", "stderr_of"),
    *("n", "missing", "unit", "better", "protocol"),
)


# Names and numbers


UNTESTED = (
    "Costs and means over two seeds are not tested; at least three seeds are needed. Columns in which noise may be best"
    " (precision, density, memorisation) have no best."
)


def label(name: str) -> str:
    """Label of a metric; its name without underscores if it is not in the catalogue."""
    section, _, leaf = name.partition("/")
    return catalogue.label(name) or leaf.replace("_", " ") + catalogue.SPLITS.get(section, "")


def quantity(value: float | None) -> str:
    """Format a number: 0.0123, 12.3, 1,234, 1.2M, 3.4e+12."""
    if value is None:
        return "n/a"
    size = abs(value)
    if size >= 1e9:
        return f"{value:.3g}"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1000 or (value == int(value) and size >= 10):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def measured(c: Cell | None) -> str:
    """Format a mean with its standard error, rounded to two digits of the error."""
    if c is None:
        return "n/a"
    if c.mean is None:
        return "not finite"
    if not c.stderr:
        return quantity(c.mean)
    digits = max(0, 1 - math.floor(math.log10(c.stderr)))
    if abs(c.mean) >= 1e6 or digits > 8:
        return f"{quantity(c.mean)} ± {quantity(c.stderr)}"
    return f"{c.mean:,.{digits}f} ± {c.stderr:,.{digits}f}"


# Equal-compute comparison


def fairness(table: Table) -> list[str]:
    """State which resources, limits, seeds and machines are equal within a table, one sentence each."""
    sentences = [f"Same data ({table.data}), scored by the same protocols."]
    for used in resource_use(table):
        if used.least is None or used.most is None:
            sentences.append(f"Unknown {used.name}: not recorded for all rows.")
        elif used.equal:
            limit = f"{quantity(used.limit)} {used.unit}" if used.limit else f"{quantity(used.most)} {used.unit}"
            sentences.append(f"Equal {used.name}: {limit}.")
        else:
            times = f" ({used.most / used.least:.3g} times)" if used.least > 0 else ""
            sentences.append(
                f"Unequal {used.name}: {quantity(used.least)} to {quantity(used.most)} {used.unit}{times}."
            )
    ends = sorted({end for row in table.rows for end in row.endings if end})
    if len(ends) > 1:
        sentences.append(f"Ended by different limits: {', '.join(ends)}.")
    cut = [row.label for row in table.rows if "planned by" in (ending_note(table, row) or "")]
    if cut:
        sentences.append(f"Ended before the learning-rate schedule: {'; '.join(cut)}.")
    seeds = {key(row.seeds) for row in table.rows}
    if len(seeds) == 1:
        sentences.append(f"Seeds {', '.join(map(str, table.rows[0].seeds))} in every row.")
    else:
        counts = sorted({len(row.seeds) for row in table.rows})
        sentences.append(f"Different seeds: {counts[0]} to {counts[-1]} per row, or not the same ones.")
    machines = {hardware(record.status, threads=True) for row in table.rows for record, _ in row.runs} - {""}
    word = {0: "Machine: not recorded", 1: "Machine: "}.get(len(machines), "Different machines: ")
    return [*sentences, f"{word}{'; '.join(sorted(machines))}."]


def certainty(table: Table) -> list[str]:
    """State how certain the ranks of the first headline and of densities are; see ``genzoo.report.certainty``."""
    sentences: list[str] = []
    names = [name for name in table.headlines if not (is_cost(name) or is_partial(name)) and ranked(table, name)]
    for name in names:
        if name != names[0] and not name.partition("/")[2].startswith(("bpd", "nll")):
            continue
        chosen = [(row, row.cells[name]) for row in table.rows if name in row.cells]
        cells = [c for _, c in chosen]
        found = [(row, standing) for (row, _), standing in zip(chosen, standings(cells), strict=True) if standing]
        if not found:
            continue
        best = winner(cells)
        said = "no row is certainly the best" if best is None else f"{chosen[best][0].label} is the best"
        ranks = ", ".join(f"{row.label} {_range(s.ranks)}" for row, s in sorted(found, key=lambda f: f[1].ranks))
        likely = sorted((f for f in found if f[1].best >= 0.005), key=lambda f: -f[1].best)
        chances = ", ".join(f"{row.label} {s.best:.0%}" for row, s in likely)
        sentences.append(f"{label(name)}: {said}. Ranks: {ranks}. Probability of being the best: {chances}.")
    if sentences:
        counts = {len(row.seeds) for row in table.rows}
        if 1 in counts:
            sentences.append("Rows of one seed have the error of the measurement alone: that between seeds is larger.")
        if 2 in counts:
            sentences.append("Rows of two seeds are not tested: train at least three.")
    return sentences


def _range(ranks: tuple[int, int]) -> str:
    first, last = ranks
    return str(first) if first == last else f"{first}-{last}"


def hardware(status: Mapping[str, Any], threads: bool = False) -> str:
    """Hardware of a run: its GPU, or its CPU with the number of threads; empty if not recorded."""
    gpu, machine = status.get("gpu"), status.get("machine")
    if isinstance(gpu, Mapping) and gpu.get("name"):
        return str(gpu["name"])
    if not isinstance(machine, Mapping) or not machine.get("cpu"):
        return ""
    return f"{machine['cpu']}, {status.get('threads')} threads" if threads else str(machine["cpu"])


# Files


def to_csv(found: Sequence[Table]) -> str:
    """Write one line per row and metric, in full precision."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for i, table in enumerate(found, start=1):
        names = table.metrics
        for row in table.rows:
            for name in names:
                c = row.cells.get(name)
                start = [i, table.data, row.label, row.model, " ".join(map(str, row.seeds)), row.failed, name]
                if c is None:
                    writer.writerow(_harmless([*start, "n/a", "", "", 0, 0, "", "", ""]))
                    continue
                numbers = ["" if v is None else repr(v) for v in (c.mean, c.stderr)]
                end = [c.source or "", len(c.values), c.missing, c.unit, c.better or "", key(c.protocol)]
                writer.writerow(_harmless([*start, *numbers, *end]))
    return out.getvalue()


def _harmless(cells: Iterable[Any]) -> list[Any]:
    """Escape strings that a spreadsheet would evaluate as a formula."""
    return [f"'{c}" if isinstance(c, str) and c[:1] in "=+-@\t\r" and not _is_number(c) else c for c in cells]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_markdown(found: Sequence[Table], failures: Sequence[str] = ()) -> str:
    """Write the headline columns of all tables, each with its equal-compute statement."""
    parts = []
    for i, table in enumerate(found, start=1):
        names = [name for name in table.headlines if any(name in row.cells for row in table.rows)]
        lines = [f"## {_escape(table.data)}" + (f", table {i}" if len(found) > 1 else ""), ""]
        lines += [f"Not in an earlier table: {_escape('; '.join(table.why))}.", ""] if table.why else []
        lines += [_escape(" ".join(fairness(table))), ""]
        lines.append("| | " + " | ".join(_escape(heading(table, name)) for name in names) + " | seeds |")
        lines.append("|---" * (len(names) + 2) + "|")
        marks = {name: leaders(table, name) for name in names}
        for row in table.rows:
            cells = [_marked(row, row.cells.get(name), *marks[name]) for name in names]
            seeds = f"{len(row.seeds)}" + (f" ({row.failed} failed)" if row.failed else "")
            note = ending_note(table, row)
            label = row.label + (f" ({note})" if note else "")
            lines.append(f"| {_escape(label)} | " + " | ".join(cells) + f" | {seeds} |")
        lines += ["", *(f"- {_escape(sentence)}" for sentence in certainty(table))]
        parts.append("\n".join(lines))
    legend = (
        "Mean ± standard error over seeds, or with one seed (¹) of the measurement alone; arrows show the better direction."
        " **Bold** is the best of a column, *italic* a row without a significant difference to it (Welch test, 5 %) or without"
        f" a standard error. {UNTESTED} Below a table: the best row differs from each other one at 5 %, and ranks hold with"
        " 95 % for all rows of a column together (Holm)."
    )
    parts.append(legend)
    if failures:
        parts.append("## Not finished\n\n" + "\n".join(f"- {_escape(failure)}" for failure in failures))
    return "\n\n".join(parts) + "\n"


def heading(table: Table, name: str) -> str:
    """Label of a column, with an arrow in the better direction."""
    arrows = {"lower": " ↓", "higher": " ↑"}
    better = next(row.cells[name].better for row in table.rows if name in row.cells)
    return label(name) + (arrows.get(better or "", "") if ranked(table, name) else "")


def _marked(row: Row, c: Cell | None, best: Sequence[Row], near: Sequence[Row]) -> str:
    text = measured(c) + ("¹" if c is not None and c.source == "measurement" else "")
    if c is not None and c.missing:
        text += f" ({c.missing} missing)"
    mark = "**" if any(row is other for other in best) else "*" if any(row is other for other in near) else ""
    return f"{mark}{text}{mark}"


def _escape(text: str) -> str:
    """Escape Markdown and HTML."""
    for mark, instead in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("[", "\\["),
        ("\n", " "),
    ):
        text = text.replace(mark, instead)
    return text
