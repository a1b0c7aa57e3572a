"""Who is better, and how sure are we: runs that differ in their seed alone become one row, rows that may be compared a table.

A cell holds the mean over seeds and its standard error, the standard deviation over seeds divided by the root of their
number. With one seed there is only the error of measuring, which knows nothing of how seeds differ; the cell says so.

Two numbers are compared only if their protocols are the same: network, reference, number of samples, split, bound. Rows
with unlike protocols come into separate tables. What is measured on a machine (speeds) may be in one table with unlike
protocols, and is then not ranked.

Beside the best of a column stand those that a Welch test does not tell apart from it at 5 %, and those whose error is not
known; no correction is made for the number of rows. No test is made of two seeds, of which one degree of freedom is left, nor
of costs, whose errors grow with them: of these the best alone is marked. Columns in which noise can be best have no best:
samples far from all data have few copies, and a wide cloud of noise may fall into the balls of precision and density.
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

from scipy.special import stdtrit

from genzoo import catalogue
from genzoo.report.records import OF_SEED, Record, flatten

UNLIKE = "unlike between seeds"  # in a protocol: the parts that differ
COSTS = ("sampling/", "model/", "training/")  # metrics that do not say how good a model is
LIMITS = ("images", "seconds", "flops")
LEAST_SEEDS = 3  # of a mean over seeds that is tested

# What a reader wants to see first, in this order; the page shows the rest on demand.
HEADLINES = (
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

    values: list[float]  # one a seed, those alone that are finite
    missing: int  # seeds that have no such number, or none that is finite
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
        """Whether the mean may be tested: one of seeds needs three of them."""
        return self.source != "seeds" or len(self.values) >= LEAST_SEEDS


@dataclass
class Row:
    """Runs that differ in their seed alone, scored in one way."""

    model: str
    data: str
    trained: dict[str, Any]
    setting: dict[str, Any]
    runs: list[tuple[Record, dict[str, Any]]] = field(default_factory=list)
    label: str = ""
    failed: int = 0  # runs of the same configuration that did not end well
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
    """Rows that may be compared."""

    data: str
    rows: list[Row] = field(default_factory=list)
    protocols: dict[str, Any] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)  # it is not part of an earlier table

    @property
    def metrics(self) -> list[str]:
        """All columns, those first that a reader wants first."""
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
    """Return the place of a metric among the headlines, their number for one that is none."""
    for i, headline in enumerate(HEADLINES):
        if name == headline or (headline.endswith("*") and name.startswith(headline[:-1]) and not _derived(name)):
            return i
    return len(HEADLINES)


def _derived(name: str) -> bool:
    return name.endswith("_infinity") or "/class" in name.removeprefix("test")


def is_cost(name: str) -> bool:
    """Whether a metric says what a model costs, and not how good it is."""
    return name.startswith(COSTS)


def is_partial(name: str) -> bool:
    """Whether a metric is read beside others alone, since samples that are no good may be best in it."""
    metric = catalogue.declared(name)
    return metric is not None and metric.noise_leads


def key(value: Any) -> str:
    """Return a text that is the same for equal plain values."""
    return json.dumps(value, sort_keys=True, default=str)


# Rows


def rows(records: Iterable[Record]) -> list[Row]:
    """Put together the finished runs that differ in their seed alone."""
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
                if not unlike(row.protocols, protocols):
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
    """Move the draws of a lower bound into its protocol, where earlier versions left them in the setting alone."""
    protocol, setting = entry["card"]["protocol"], entry["card"]["setting"]
    if "LOWER" not in str(protocol.get("bound")) or "num_samples" in protocol or "num_samples" not in setting:
        return entry
    protocol = {**protocol, "num_samples": setting["num_samples"]}
    return {**entry, "card": {**entry["card"], "protocol": protocol}}


def setting_of(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the scores of one result were made, seeds aside."""
    setting: dict[str, Any] = {}
    for entry in metrics.values():
        setting |= {name: value for name, value in entry["card"]["setting"].items() if name not in OF_SEED}
    return setting


def by_seed(runs: Sequence[tuple[Record, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Keep the latest score of each metric for each seed: repeating one teaches nothing of other seeds."""
    found: dict[str, dict[str, Any]] = {}
    for record, metrics in runs:
        found.setdefault(key(record.config.get("seed")), {}).update(metrics)
    return list(found.values())


def cell(name: str, entries: Sequence[Mapping[str, Any]], seeds: int) -> Cell:
    """Average a metric over seeds.

    Args:
        name: of the metric; its direction is that of the catalogue, or what the files say of a metric that is not in it.
        entries: of each seed that has it, in one protocol but for what is measured on a machine.
        seeds: how many there are.
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
        elif all(type(number) is int for number in numbers):  # evaluations or weights: a count has no error
            stderr = 0.0
    protocols = [entry["card"]["protocol"] for entry in entries]
    protocol = {part: value for part, value in protocols[0].items() if all(p.get(part) == value for p in protocols)}
    if any(p != protocols[0] for p in protocols):
        protocol[UNLIKE] = ", ".join(sorted({part for p in protocols for part in p} - protocol.keys()))
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
    """Give each row a label: the family, and what sets it apart from other rows of the family."""
    families: dict[tuple[str, str], list[Row]] = {}
    for row in all_rows:
        families.setdefault((row.model, row.data), []).append(row)
    for (model, _), members in families.items():
        leaves = [
            {**row.trained, **{".".join(part): value for part, value in flatten(row.setting).items()}}
            for row in members
        ]
        chosen = telling(leaves)
        for row, own in zip(members, leaves, strict=True):
            said = [f"{name}={_plain(own[name])}" for name in chosen if own.get(name) is not None]
            row.label = ", ".join([model, *said])


def telling(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Choose keys that tell rows apart, as few as the greedy choice finds: the one first that makes most of them unlike."""
    names = list(dict.fromkeys(name for own in rows for name in own))
    texts = {name: [key(own.get(name)) for own in rows] for name in names}
    varied = [name for name in names if len(set(texts[name])) > 1]
    whole = len(set(zip(*(texts[name] for name in varied), strict=True))) if varied else 1
    told: list[tuple[str, ...]] = [()] * len(rows)
    chosen: list[str] = []
    while len(set(told)) < whole:
        best = max(varied, key=lambda name: len(set(zip(told, texts[name], strict=True))))
        told = [(*before, text) for before, text in zip(told, texts[best], strict=True)]
        chosen.append(best)
    return chosen


def _plain(value: Any) -> str:
    return value.rpartition(".")[2] if isinstance(value, str) else json.dumps(value, default=str)


# Tables


def unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """List the metrics that both have and that were measured in unlike ways, and how."""
    return [
        f"{name}: {part} is {_said(b[name].get(part))} here and {_said(a[name].get(part))} there"
        for name in a
        if name in b and a[name] != b[name]
        for part in dict.fromkeys([*a[name], *b[name]])
        if a[name].get(part) != b[name].get(part)
    ]


def _said(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def tables(all_rows: Iterable[Row]) -> list[Table]:
    """Put rows that may be compared into one table: those of the same data whose protocols agree wherever both have one."""
    all_rows = list(all_rows)
    protocols = [[key([row.data, name, protocol]) for name, protocol in row.protocols.items()] for row in all_rows]
    common = Counter(protocol for own in protocols for protocol in own)
    usual = [statistics.fmean(common[protocol] for protocol in own) if own else 0.0 for own in protocols]
    found: list[Table] = []
    # Those first that are measured as most others are, so that the exceptions go elsewhere.
    for _, row in sorted(zip(usual, all_rows, strict=True), key=lambda pair: (pair[1].data, -pair[0], pair[1].label)):
        why: list[str] = []
        for table in (table for table in found if table.data == row.data):
            clash = unlike(table.protocols, row.protocols)
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
    """Sort the best first, and those that were not measured last."""
    measured = row.cells.get(name) if name else None
    if measured is None or measured.mean is None:
        return True, 0.0, row.label
    return False, -measured.mean if measured.better == "higher" else measured.mean, row.label


def ranked(table: Table, name: str) -> bool:
    """Whether the numbers of a column may be ranked.

    What training took is no score, nor is that of the data's own density, nor what noise may be best in.
    """
    if name.startswith("training/") or name == "test/nll_truth" or is_partial(name):
        return False
    cells = [row.cells[name] for row in table.rows if name in row.cells]
    return all(UNLIKE not in c.protocol and c.protocol == cells[0].protocol and c.better for c in cells)


def leaders(table: Table, name: str) -> tuple[list[Row], list[Row]]:
    """Return the best rows of a column, several where they are equal, and those that a test does not tell apart from them.

    Of costs, and where the best has two seeds, there are none of the latter; nor is a row of two seeds among them.
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
    """Whether two means differ by Welch's test, two-sided (Welch 1947, Biometrika 34, doi:10.1093/biomet/34.1-2.28).

    Nothing is told apart from a mean whose error is not known.
    """
    assert a.mean is not None and b.mean is not None
    if a.stderr is None or b.stderr is None:
        return False
    difference, variance = abs(a.mean - b.mean), a.stderr**2 + b.stderr**2
    if variance == 0:
        return difference > 0
    share = sum((c.stderr**2 / variance) ** 2 / c.freedom for c in (a, b) if c.stderr)
    freedom = 1 / share if share > 0 else math.inf
    return difference > float(stdtrit(freedom, 1 - level / 2)) * math.sqrt(variance)


# What was equal


@dataclass(frozen=True)
class Share:
    """What the rows of a table spent of one thing."""

    name: str
    unit: str
    limit: float | None  # that all of them had, and that ended all of them
    least: float | None
    most: float | None

    @property
    def equal(self) -> bool:
        """Whether all were ended by one limit, or spent the same within 2 %."""
        if self.least is None or self.most is None:
            return False
        kept = self.limit is not None and self.least >= 0.9 * self.limit and self.most <= 1.1 * self.limit
        return kept or self.most <= 1.02 * self.least


def ended_by(record: Record, metrics: Mapping[str, Any]) -> str | None:
    """Return the limit that ended a run; of an earlier release, which did not record it, the one that it came nearest to.

    Args:
        record: the run.
        metrics: its scores, which say what it spent.
    """
    said = record.status.get("ended_by")
    if said in LIMITS:
        return str(said)
    shares: dict[str, float] = {}
    budget = record.config.get("budget")
    for name in LIMITS:
        limit: Any = budget.get(name) if isinstance(budget, Mapping) else None
        spent: Any = metrics.get(f"training/{name}", {}).get("value")
        if type(limit) in (int, float) and limit > 0 and type(spent) in (int, float):
            shares[name] = spent / limit
    share, nearest = max(((share, name) for name, share in shares.items()), default=(0.0, None))
    return nearest if 0.9 <= share <= 1.1 else None


def ending_note(table: Table, row: Row) -> str | None:
    """Return what sets the end of a row's runs apart: another limit than that of most rows, or than they were planned by."""
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


def budgets(table: Table) -> list[Share]:
    """Say what the rows of a table were given, and what they took."""
    shares = []
    for name in (*LIMITS, "parameters"):
        limits = {key(row.trained.get(f"budget.{name}")) for row in table.rows}
        bit = all(row.endings == {name} for row in table.rows)
        limit = json.loads(next(iter(limits))) if len(limits) == 1 and bit else None
        metric = "model/parameters" if name == "parameters" else f"training/{name}"
        spent = [row.cells[metric].mean if metric in row.cells else None for row in table.rows]
        known = [value for value in spent if value is not None]
        whole = len(known) == len(spent) and bool(known)
        shares.append(
            Share(
                {"flops": "operations"}.get(name, name),
                catalogue.lookup(metric).unit,
                limit if isinstance(limit, int | float) else None,
                min(known) if whole else None,
                max(known) if whole else None,
            )
        )
    return shares
