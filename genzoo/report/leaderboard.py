"""Leaderboard: runs that differ only in their seed form a row, comparable rows form a table.

A cell is the mean over seeds with its standard error, the standard deviation over seeds divided by the root of their number.
With one seed the standard error is that of the measurement, without the variance between seeds, and is marked as such.

Scores are comparable if their protocols are equal: network, reference, number of samples, split, bound. Rows with different
protocols are in separate tables. Machine-dependent metrics (speeds) may have different protocols in one table, and are then
not ranked.

The best row of a column is marked, together with the rows that do not differ significantly from it (Welch test, 5 %,
uncorrected for multiple comparisons) and those without a standard error. Two seeds are not tested, since one degree of freedom
remains, nor are costs, whose errors are proportional to them: there the best alone is marked. Columns in which noise can be
best have no best: samples far from all data have few copies, and wide noise may fall into the balls of precision and density.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from genzoo import catalogue
from genzoo.catalogue import is_cost
from genzoo.report.certainty import welch
from genzoo.report.records import OF_SEED, Record, flatten

DIFFERENT = "different between seeds"  # key of a protocol that lists the differing parts
LIMITS = ("images", "seconds", "flops")
LEAST_SEEDS = 3  # of a tested mean

# Columns shown by default, in this order; the page shows the rest on demand.
HEADLINES = (
    "text/attributes",
    "text/held_out",
    "test/fid",
    "test/fd_*",
    "test/bpd",
    "test/bpd_upper",
    "test/bpd_estimate",
    "test/bpd_upper_estimate",
    "test/nll_truth",
    "test/nll",
    "test/nll_upper",
    "test/nll_estimate",
    "test/nll_upper_estimate",
    "test/is",
    "test/sliced_wasserstein",
    "test/mmd",
    "test/precision*",
    "test/recall*",
    "test/coverage*",
    "reconstruction/psnr",
    "classifier/accuracy",
    "classifier/cross_entropy",
    "classifier/accuracy_noisy",
    "memorisation/copied",
    "sampling/nfe",
    "sampling/samples_per_second",
    "training/images",
    "training/seconds",
    "training/flops",
    "model/parameters",
)


@dataclass(frozen=True)
class Cell:
    """A metric over the runs of a row."""

    values: list[float]  # finite values, one per seed
    missing: int  # number of seeds without a finite value
    mean: float | None
    stderr: float | None
    source: Literal["seeds", "measurement"] | None  # of the standard error
    unit: str
    better: str | None
    protocol: dict[str, Any]

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the standard error."""
        return len(self.values) - 1 if self.source == "seeds" else math.inf

    @property
    def testable(self) -> bool:
        """Whether the mean may be tested: a mean over seeds needs three."""
        return self.source != "seeds" or len(self.values) >= LEAST_SEEDS


@dataclass
class Row:
    """Runs that differ only in their seed, with one setting of the evaluation."""

    model: str
    data: str
    trained: dict[str, Any]
    setting: dict[str, Any]
    runs: list[tuple[Record, dict[str, Any]]] = field(default_factory=list)
    label: str = ""
    failed: int = 0  # number of failed runs of this configuration
    cells: dict[str, Cell] = field(default_factory=dict)
    protocols: dict[str, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> list[Any]:
        return sorted({record.config.get("seed") for record, _ in self.runs}, key=str)

    @functools.cached_property
    def endings(self) -> set[str | None]:
        """The limits that ended the runs."""
        return {ended_by(record, metrics) for record, metrics in self.runs}


@dataclass
class Table:
    """Comparable rows."""

    data: str
    rows: list[Row] = field(default_factory=list)
    protocols: dict[str, Any] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)  # reasons not to be in an earlier table

    @property
    def metrics(self) -> list[str]:
        """All columns, headlines first."""
        names = dict.fromkeys(name for row in self.rows for name in row.cells)
        return sorted(names, key=lambda name: (order(name), name))

    @functools.cached_property
    def usual_ending(self) -> tuple[str, ...]:
        """The limits that ended the runs of most rows."""
        counts = Counter(tuple(sorted(filter(None, row.endings))) for row in self.rows)
        return max(counts, key=lambda ends: counts[ends])

    @property
    def headlines(self) -> list[str]:
        return [name for name in self.metrics if order(name) < len(HEADLINES)]


def order(name: str) -> int:
    """Index of a metric among the headlines, alike on the validation and the test split; their number for other metrics."""
    name = name.replace("validation/", "test/", 1)
    for i, headline in enumerate(HEADLINES):
        if name == headline or (headline.endswith("*") and name.startswith(headline[:-1]) and not _derived(name)):
            return i
    return len(HEADLINES)


def _derived(name: str) -> bool:
    return name.endswith("_infinity") or "/class" in name.removeprefix("test")


def is_partial(name: str) -> bool:
    """Whether a metric is meaningful only beside others, since poor samples may be best in it."""
    metric = catalogue.declared(name)
    return metric is not None and metric.noise_leads


def key(value: Any) -> str:
    """Canonical JSON of plain values."""
    return json.dumps(value, sort_keys=True, default=str)


# Rows


def rows(records: Iterable[Record]) -> list[Row]:
    """Group finished runs that differ only in their seed."""
    found: dict[str, list[Row]] = {}
    failed: dict[str, int] = {}
    for record in records:
        trained = record.trained
        what = key([record.model, record.data, trained])
        failed[what] = failed.get(what, 0) + (record.state == "failed")
        for result in record.results if record.state == "done" else ():
            metrics = {name: _with_draws(entry) for name, entry in result["metrics"].items()}
            setting = setting_of(metrics)
            protocols = {name: entry["card"]["protocol"] for name, entry in metrics.items() if not is_cost(name)}
            candidates = found.setdefault(key([what, setting]), [])
            for row in candidates:
                if not differences(row.protocols, protocols):
                    break
            else:
                row = Row(record.model, record.data, trained, setting)
                candidates.append(row)
            row.runs.append((record, metrics))
            row.protocols |= protocols
    all_rows = [row for candidates in found.values() for row in candidates]
    for row in all_rows:
        row.failed = failed[key([row.model, row.data, row.trained])]
        names = dict.fromkeys(name for _, metrics in row.runs for name in metrics)
        seeds = by_seed(row.runs)
        row.cells = {name: cell(name, [own[name] for own in seeds if name in own], len(seeds)) for name in names}
    _name(all_rows)
    return all_rows


def _with_draws(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Copy the number of draws of a lower bound into its protocol, where earlier releases omitted it."""
    protocol, setting = entry["card"]["protocol"], entry["card"]["setting"]
    if "LOWER" not in str(protocol.get("bound")) or "num_samples" in protocol or "num_samples" not in setting:
        return entry
    protocol = {**protocol, "num_samples": setting["num_samples"]}
    return {**entry, "card": {**entry["card"], "protocol": protocol}}


def setting_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Setting of the scores of one result, without seed-dependent parts."""
    setting: dict[str, Any] = {}
    for entry in metrics.values():
        setting |= {name: value for name, value in entry["card"]["setting"].items() if name not in OF_SEED}
    return setting


def by_seed(runs: Sequence[tuple[Record, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Latest score of each metric for each seed; repeated runs of a seed are not independent."""
    found: dict[str, dict[str, Any]] = {}
    for record, metrics in runs:
        found.setdefault(key(record.config.get("seed")), {}).update(metrics)
    return list(found.values())


def cell(name: str, entries: Sequence[Mapping[str, Any]], seeds: int) -> Cell:
    """Average a metric over seeds.

    Args:
        name: of the metric; its direction is that of the catalogue, or of the files for metrics that are not in it.
        entries: records of the seeds, with equal protocols except for machine-dependent metrics.
        seeds: number of seeds.
    """
    numbers = [entry["value"] for entry in entries]
    values = [float(v) for v in numbers if v is not None and math.isfinite(v)]
    mean = statistics.fmean(values) if values else None
    stderr: float | None = None
    source: Literal["seeds", "measurement"] | None = None
    if len(values) > 1:
        stderr, source = statistics.stdev(values) / math.sqrt(len(values)), "seeds"
    elif values:
        own: Any = next(entry.get("stderr") for entry, v in zip(entries, numbers, strict=True) if v is not None)
        if type(own) in (int, float) and math.isfinite(own):
            stderr, source = float(own), "measurement"
        elif all(type(number) is int for number in numbers):  # counts, such as NFE, have no error
            stderr = 0.0
    protocols = [entry["card"]["protocol"] for entry in entries]
    protocol = {part: value for part, value in protocols[0].items() if all(p.get(part) == value for p in protocols)}
    if any(p != protocols[0] for p in protocols):
        protocol[DIFFERENT] = ", ".join(sorted({part for p in protocols for part in p} - protocol.keys()))
    return Cell(
        values,
        seeds - len(values),
        mean,
        stderr,
        source,
        str(protocol.get("unit", "")),
        catalogue.direction(name, entries[0].get("better")),
        protocol,
    )


def _name(all_rows: Sequence[Row]) -> None:
    """Label each row by its family and the settings that distinguish it within the family."""
    families: dict[tuple[str, str], list[Row]] = {}
    for row in all_rows:
        families.setdefault((row.model, row.data), []).append(row)
    for (model, _), members in families.items():
        leaves = [
            {**row.trained, **{".".join(part): value for part, value in flatten(row.setting).items()}}
            for row in members
        ]
        chosen = distinguishing_keys(leaves)
        for row, own in zip(members, leaves, strict=True):
            shown = [*chosen, *(name for name in ("guidance.scale",) if name in own and name not in chosen)]
            settings = [f"{name}={_plain(own[name])}" for name in shown if own.get(name) is not None]
            row.label = ", ".join([model, *settings])


def distinguishing_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Greedily choose a small set of keys that distinguishes rows, the key with most distinct values first."""
    names = list(dict.fromkeys(name for own in rows for name in own))
    texts = {name: [key(own.get(name)) for own in rows] for name in names}
    varied = [name for name in names if len(set(texts[name])) > 1]
    whole = len(set(zip(*(texts[name] for name in varied), strict=True))) if varied else 1
    groups: list[tuple[str, ...]] = [()] * len(rows)
    chosen: list[str] = []
    while len(set(groups)) < whole:
        best = max(varied, key=lambda name: len(set(zip(groups, texts[name], strict=True))))
        groups = [(*before, text) for before, text in zip(groups, texts[best], strict=True)]
        chosen.append(best)
    return chosen


def _plain(value: Any) -> str:
    return value.rpartition(".")[2] if isinstance(value, str) else json.dumps(value, default=str)


# Tables


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """List the differences between the protocols of common metrics."""
    return [
        f"{name}: {part} is {_shortened(b[name].get(part))} here and {_shortened(a[name].get(part))} there"
        for name in a
        if name in b and a[name] != b[name]
        for part in dict.fromkeys([*a[name], *b[name]])
        if a[name].get(part) != b[name].get(part)
    ]


def _shortened(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def tables(all_rows: Iterable[Row]) -> list[Table]:
    """Group comparable rows: those of the same data with equal protocols of all common metrics."""
    all_rows = list(all_rows)
    protocols = [[key([row.data, name, protocol]) for name, protocol in row.protocols.items()] for row in all_rows]
    common = Counter(protocol for own in protocols for protocol in own)
    usual = [statistics.fmean(common[protocol] for protocol in own) if own else 0.0 for own in protocols]
    found: list[Table] = []
    # Rows with the most common protocols come first.
    for _, row in sorted(zip(usual, all_rows, strict=True), key=lambda pair: (pair[1].data, -pair[0], pair[1].label)):
        why: list[str] = []
        for table in (table for table in found if table.data == row.data):
            clash = differences(table.protocols, row.protocols)
            if not clash:
                break
            why.extend(clash[:3])
        else:
            table = Table(row.data, why=list(dict.fromkeys(why))[:6])
            found.append(table)
        table.rows.append(row)
        table.protocols |= row.protocols
    for table in found:
        first = next((name for name in table.headlines if not is_cost(name) and not is_partial(name)), None)
        table.rows.sort(key=lambda row: _worth(row, first))
    return found


def _worth(row: Row, name: str | None) -> tuple[bool, float, str]:
    """Sort key: the best first, missing values last."""
    measured = row.cells.get(name) if name else None
    if measured is None or measured.mean is None:
        return True, 0.0, row.label
    return False, -measured.mean if measured.better == "higher" else measured.mean, row.label


def ranked(table: Table, name: str) -> bool:
    """Whether a column may be ranked.

    Training cost, the likelihood of the data distribution and metrics in which noise may be best are not ranked.
    """
    if name.startswith("training/") or name.endswith("/nll_truth") or is_partial(name):
        return False
    cells = [row.cells[name] for row in table.rows if name in row.cells]
    return all(DIFFERENT not in c.protocol and c.protocol == cells[0].protocol and c.better for c in cells)


def leaders(table: Table, name: str) -> tuple[list[Row], list[Row]]:
    """Return the best rows of a column (several if equal), and the rows that do not differ significantly from them.

    The latter are empty for costs and if the best has two seeds, and never include rows of two seeds.
    """
    measured = [row for row in table.rows if name in row.cells and row.cells[name].mean is not None]
    if len(measured) < 2 or not ranked(table, name):
        return [], []
    sign = -1.0 if measured[0].cells[name].better == "higher" else 1.0
    first = min(measured, key=lambda row: sign * (row.cells[name].mean or 0.0)).cells[name]
    best = [row for row in measured if row.cells[name].mean == first.mean]
    if is_cost(name) or not first.testable:
        return best, []
    others = [row for row in measured if row.cells[name].mean != first.mean and row.cells[name].testable]
    return best, [row for row in others if not differ(first, row.cells[name])]


def differ(a: Cell, b: Cell, level: float = 0.05) -> bool:
    """Whether two means differ significantly by Welch's two-sided t-test; never if a standard error is missing."""
    return welch(a, b) < level


# Equal-compute comparison


@dataclass(frozen=True)
class ResourceUse:
    """Range of one resource over the rows of a table."""

    name: str
    unit: str
    limit: float | None  # common limit that ended all runs
    least: float | None
    most: float | None

    @property
    def equal(self) -> bool:
        """Whether all runs were ended by one limit, or used the same amount within 2 %."""
        if self.least is None or self.most is None:
            return False
        kept = self.limit is not None and self.least >= 0.9 * self.limit and self.most <= 1.1 * self.limit
        return kept or self.most <= 1.02 * self.least


def ended_by(record: Record, metrics: Mapping[str, Any]) -> str | None:
    """Return the limit that ended a run; inferred from the cost for runs of earlier releases, which did not record it.

    Args:
        record: the run.
        metrics: its scores, including the training cost.
    """
    recorded = record.status.get("ended_by")
    if recorded in LIMITS:
        return str(recorded)
    fractions: dict[str, float] = {}
    budget = record.config.get("budget")
    for name in LIMITS:
        limit: Any = budget.get(name) if isinstance(budget, Mapping) else None
        spent: Any = metrics.get(f"training/{name}", {}).get("value")
        if type(limit) in (int, float) and limit > 0 and type(spent) in (int, float):
            fractions[name] = spent / limit
    fraction, nearest = max(((fraction, name) for name, fraction in fractions.items()), default=(0.0, None))
    return nearest if 0.9 <= fraction <= 1.1 else None


def ending_note(table: Table, row: Row) -> str | None:
    """Describe the end of a row's runs if their limit is not that of most rows, or not the planned one."""
    own = tuple(sorted(filter(None, row.endings)))
    planned = sorted(
        {
            str(record.status["planned_by"])
            for record, metrics in row.runs
            if record.status.get("planned_by") in LIMITS and record.status["planned_by"] != ended_by(record, metrics)
        }
    )
    if not own or (not planned and own == table.usual_ending):
        return None
    return f"ended by {' or '.join(own)}" + (f", planned by {' or '.join(planned)}" if planned else "")


def resource_use(table: Table) -> list[ResourceUse]:
    """Compute limits and ranges of all resources of a table."""
    used = []
    for name in (*LIMITS, "parameters"):
        limits = {key(row.trained.get(f"budget.{name}")) for row in table.rows}
        bit = all(row.endings == {name} for row in table.rows)
        limit = json.loads(next(iter(limits))) if len(limits) == 1 and bit else None
        metric = "model/parameters" if name == "parameters" else f"training/{name}"
        spent = [row.cells[metric].mean if metric in row.cells else None for row in table.rows]
        recorded = [value for value in spent if value is not None]
        whole = len(recorded) == len(spent) and bool(recorded)
        used.append(
            ResourceUse(
                {"flops": "operations"}.get(name, name),
                catalogue.lookup(metric).unit,
                limit if isinstance(limit, int | float) else None,
                min(recorded) if whole else None,
                max(recorded) if whole else None,
            )
        )
    return used
