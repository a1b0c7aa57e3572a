"""Time genzoo beside its peers: `python experiments/benchmarks/run.py [name ...]`.

A benchmark hands over pairs of ways to do one thing. Both run in this process, in turns, so that a busy machine slows both; a
ratio is the peer's time over genzoo's in one turn, and what is reported is the median of the turns with its quartiles. Ratios
travel between machines, seconds do not.
"""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
NAMES = ("frechet",)
TURNS = 7


@dataclass(frozen=True)
class Pair:
    """One thing, done in two ways.

    Attributes:
        name: of the thing.
        against: the peer.
        ours, theirs: do it once.
        target: the ratio that is aimed at.
    """

    name: str
    against: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    target: float


def seconds(work: Callable[[], Any]) -> float:
    """Time one go."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(pair: Pair, turns: int = TURNS) -> dict[str, Any]:
    """Run both sides in turns, after one that is not counted."""
    pair.ours()
    pair.theirs()
    ratios = []
    for _ in range(turns):
        ours = seconds(pair.ours)
        ratios.append(seconds(pair.theirs) / ours)
    q1, ratio, q3 = statistics.quantiles(ratios, n=4)
    return {
        "name": pair.name,
        "against": pair.against,
        "ratio": round(ratio, 3),
        "q1": round(q1, 3),
        "q3": round(q3, 3),
        "target": pair.target,
        "meets": ratio >= pair.target,
    }


def main() -> None:
    """Run the benchmarks that are named, or all, one thread each."""
    torch.set_num_threads(1)
    path = HERE / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for name in sys.argv[1:] or NAMES:
        rows = []
        for pair in importlib.import_module(name).pairs():
            rows.append(measure(pair))
            print("{name} against {against}: {ratio} ({q1} to {q3}), target {target}".format(**rows[-1]), flush=True)
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": 1}
        results[name] = {"machine": machine, "rows": rows}
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
