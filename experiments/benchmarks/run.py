"""Time genzoo beside its peers: `python experiments/benchmarks/run.py [name ...] [--turns N]`.

A benchmark is a module of this folder whose ``pairs()`` lists one thing done in two ways. Each side lives in a process of its
own, so that neither has the other's settings, and the two take turns, so that a busy machine slows both. A ratio is that of
one turn; what is reported is the median of the turns with its quartiles. Ratios travel between machines, seconds do not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

HERE = Path(__file__).parent
NAMES = (
    "diffusion",
    "unet",
    "flows",
    "vae",
    "quantizer",
    "critic",
    "samplers",
    "solvers",
    "autoregressive",
    "frechet",
    "metrics",
    "data",
    "loop",
    "start",
    "memory",
    "choices",
)
TURNS = 9
MARK = "<!-- benchmarks -->"
LEAST = 0.3  # seconds that a side works in a turn, at least

Go = Callable[[], Any]
Setting = Literal["float32", "best"]


@dataclass(frozen=True)
class Pair:
    """One thing, done in two ways.

    Attributes:
        name: of the thing.
        against: the peer.
        ours, theirs: set it up and return what does it once; called in a process of their own.
        target: the ratio that is aimed at.
        setting: "float32", both sides alike; "best", genzoo in bfloat16 where it pays, against the peer as it is shipped.
        at_most: the ratio is ours over theirs, and the target its upper limit; otherwise theirs over ours, and the lower.
        measure: processor seconds, which a busy neighbour hardly changes; "seconds" on the clock where several processes
            work; "returned" for what the side itself returns, such as bytes.
    """

    name: str
    against: str
    ours: Callable[[], Go]
    theirs: Callable[[], Go]
    target: float
    setting: Setting = "float32"
    at_most: bool = False
    measure: Literal["processor", "seconds", "returned"] = "processor"


def processor_seconds() -> float:
    """Return what this process and the children that it has waited for have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def work(connection: Any, module: str, side: str) -> None:
    """Be one side: build what is asked for, and do it as often as is asked for."""
    sys.path.insert(0, str(HERE))
    if side == "ours":  # as every command of genzoo does
        from genzoo.jobs.allocator import tune

        tune()
    import torch

    torch.set_num_threads(1)
    pairs = list(importlib.import_module(module).pairs())
    go: Go = lambda: None  # noqa: E731
    measure = "processor"
    while (asked := connection.recv()) is not None:
        kind, number = asked
        if kind == "build":
            go, measure = getattr(pairs[number], side)(), pairs[number].measure
            start = time.perf_counter()
            go()
            start, first = time.perf_counter(), time.perf_counter() - start
            if first < 20:  # the first time may compile or fill caches
                go()
                first = time.perf_counter() - start
            connection.send(first)
            continue
        clock = processor_seconds if measure == "processor" else time.perf_counter
        start = clock()
        result = [go() for _ in range(number)][-1]
        connection.send(result if measure == "returned" else (clock() - start) / number)


class Side:
    """A process that does one side of the pairs of a benchmark."""

    def __init__(self, module: str, side: str):
        context = multiprocessing.get_context("spawn")
        self.connection, its = context.Pipe()
        self.process = context.Process(target=work, args=(its, module, side))  # not a daemon: it has children
        self.process.start()
        its.close()
        self.repeats = 1

    def build(self, pair: int, measure: str) -> None:
        """Set one pair up, and find how often it is done in a turn."""
        self.connection.send(("build", pair))
        first = self.connection.recv()
        self.repeats = 1 if measure == "returned" else max(1, math.ceil(LEAST / first))

    def __call__(self) -> float:
        """Do the pair that is set up, and return what one time costs."""
        self.connection.send(("do", self.repeats))
        return self.connection.recv()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):  # where it has ended by itself
            self.connection.send(None)
        self.process.join()


def measure(pair: Pair, ours: Side, theirs: Side, turns: int) -> dict[str, Any]:
    """Let both sides, which are set up, take turns."""
    ratios = []
    for _ in range(turns):
        mine, its = ours(), theirs()
        ratios.append(mine / its if pair.at_most else its / mine)
    q1, ratio, q3 = statistics.quantiles(ratios, n=4)
    return {
        "name": pair.name,
        "against": pair.against,
        "setting": pair.setting,
        "ratio": float(f"{ratio:.3g}"),
        "q1": float(f"{q1:.3g}"),
        "q3": float(f"{q3:.3g}"),
        "target": pair.target,
        "at_most": pair.at_most,
        "meets": ratio <= pair.target if pair.at_most else ratio >= pair.target,
    }


def benchmark(name: str, turns: int, only: str) -> list[dict[str, Any]]:
    """Measure the pairs of a module, or those whose name or peer holds ``only``."""
    module = importlib.import_module(name)
    sides: dict[str, Side] = {}
    rows = []
    try:
        for i, pair in enumerate(module.pairs()):
            if only not in f"{pair.name} {pair.against} {pair.setting}":
                continue
            both = []
            for side in ("ours", "theirs"):
                sides[side] = sides.get(side) or Side(name, side)
                sides[side].build(i, pair.measure)
                both.append(sides[side])
            row = measure(pair, *both, turns)
            rows.append({"benchmark": name, **row})
            sign = "at most" if pair.at_most else "at least"
            print("{name}, {setting}, against {against}: {ratio} ({q1} to {q3}),".format(**row), end=" ")
            print(f"{sign} {pair.target}{'' if row['meets'] else ': MISSED'}", flush=True)
    finally:
        for side in sides.values():
            side.close()
    return rows


def main() -> None:
    """Run the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}, gpu; all but gpu if none is given"
    )
    parser.add_argument("--turns", type=int, default=TURNS, help="of both sides, at least 7 for figures that count")
    parser.add_argument("--only", default="", help="pairs whose name, peer or setting holds this; nothing is written")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in (*NAMES, "gpu"):
            parser.error(f"unknown benchmark {name!r}: choose from {', '.join(NAMES)}, gpu")
    sys.path.insert(0, str(HERE))
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # of both sides and their children
        os.environ[variable] = "1"
    path = HERE / "results.json"
    with FileLock(Path(tempfile.gettempdir(), "genzoo-benchmarks.lock")):  # two at once would only slow each other
        for name in arguments.names or NAMES:
            rows = benchmark(name, arguments.turns, arguments.only)
            if arguments.only or arguments.turns < 7:
                continue
            import torch

            machine = {"cpu": cpu(), "torch": torch.__version__, "threads": 1, "turns": arguments.turns}
            known = json.loads(path.read_text())["rows"] if path.is_file() else []
            kept = [row for row in known if row["benchmark"] != name]
            rows = sorted([*kept, *({**row, "machine": machine} for row in rows)], key=position)
            path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            show(rows)


def cell(row: dict[str, Any] | None) -> str:
    """Show a ratio with its quartiles and its target."""
    if row is None:
        return ""
    word, met = ("at most " if row["at_most"] else ""), "" if row["meets"] else " (missed)"
    ratio = f"**{row['ratio']}**" if row["meets"] else row["ratio"]
    return f"{ratio} ({row['q1']} to {row['q3']}); {word}{row['target']}{met}"


def table(rows: list[dict[str, Any]]) -> str:
    """Show all rows as Markdown, both settings of a pair in one line."""
    lines = ["| what | against | float32 | at its best |", "|---|---|---|---|"]
    for name, against in dict.fromkeys((row["name"], row["against"]) for row in rows):
        of_pair = {row["setting"]: row for row in rows if (row["name"], row["against"]) == (name, against)}
        lines.append(f"| {name} | {against} | {cell(of_pair.get('float32'))} | {cell(of_pair.get('best'))} |")
    return "\n".join(lines)


def show(rows: list[dict[str, Any]]) -> None:
    """Put the table into this folder's README."""
    path = HERE / "README.md"
    head, _, rest = path.read_text().partition(MARK)
    tail = rest.partition(MARK)[2]
    path.write_text(f"{head}{MARK}\n{table(rows)}\n{MARK}{tail}")


def cpu() -> str:
    """Name the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def position(row: dict[str, Any]) -> int:
    """Sort rows by benchmark."""
    return [*NAMES, "gpu"].index(row["benchmark"])


if __name__ == "__main__":
    main()
