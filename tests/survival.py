"""Runs that are killed, cut and filled up, as a user's are: ``python -m tests.survival kills|saves|signals|disk [--count N]``.

Each experiment prints a line a trial and writes its figures to ``experiments/reliability/<name>.json``. The tests do a
handful of each; the whole takes from minutes to half an hour.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
OUT = REPOSITORY / "experiments" / "reliability"

COMMON = [
    "data=digits", "budget=smoke", "budget.images=38400", "trainer.batch_size=64", "trainer.threads=1", "trainer.saves=7",
    "trainer.grids=3", "trainer.scores=2", "trainer.score_samples=16", "metrics.n=64", "metrics.events=32",
    "metrics.num_samples=2", "metrics.throughput=16",
]  # fmt: skip
FAMILIES = {
    "vae": ["model=vae", "model.encoder.width=8", "model.decoder.width=8", "trainer.ema=0.99"],
    "vqvae": ["model=vqvae", "model.codec.encoder.width=8", "model.codec.decoder.width=8"],  # in two stages
    "gan": ["model=gan", "model.generator.width=8", "model.critic.width=8"],
    "wgan_gp": ["model=wgan_gp", "model.generator.width=8", "model.critic.width=8"],
    "realnvp": ["model=realnvp", "model.network.width=8", "model.couplings=1"],
    "ddpm": ["model=ddpm", "model.network.channels=16", "model.network.multipliers=[1]", "model.schedule.num_steps=50",
             "sampler=ddim", "sampler.steps=10"],
    "hvae": ["model=hvae"],
    "flow_matching": ["model=flow_matching", "model.network.channels=16", "model.network.multipliers=[1]",
                      "sampler=euler", "sampler.steps=10"],
}  # fmt: skip

# What the clock says, which no two runs share.
CLOCKS = {"seconds", "images_per_second", "train_seconds", "begun", "fitted", "speeds", "logged"}


def start(words: Sequence[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Type ``python -m genzoo`` and some words in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "genzoo", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(words: Sequence[str], folder: Path) -> float:
    """Do the same to the end, which must be a good one; return the seconds that it took."""
    begun = time.monotonic()
    with start(words, folder) as process:
        out, _ = process.communicate(timeout=500)
    assert process.returncode == 0, out
    return time.monotonic() - begun


def only_run(folder: Path) -> Path:
    """Return the one run under ``outputs/``."""
    (run,) = folder.glob("outputs/*/*")
    return run


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Wait until something is there, or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.01)


def trains(process: int, folder: Path) -> bool:
    """Whether a process has begun to train."""
    return any(str(process) in path.read_text() for path in folder.glob("outputs/*/*/.lock"))


def without_clocks(value: Any) -> Any:
    """Leave out of plain values what the clock says."""
    if isinstance(value, dict):
        return {key: without_clocks(entry) for key, entry in value.items() if key not in CLOCKS}
    return [without_clocks(entry) for entry in value] if isinstance(value, list | tuple) else value


def differences(a: Path, b: Path) -> list[str]:
    """Name what is not the same in every bit of two finished runs, but for what the clock says."""
    import torch

    from genzoo.training.checkpoints import find, load

    found = []
    last = [find(run / "checkpoints")[-1] for run in (a, b)]
    if last[0].name != last[1].name:
        found.append(f"checkpoints {last[0].name}, {last[1].name}")
    one, two = map(load, last)

    def alike(x: Any, y: Any) -> bool:
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(alike(x[key], y[key]) for key in x)
        if isinstance(x, list | tuple):
            return len(x) == len(y) and all(map(alike, x, y))
        return bool(x == y)

    for part in ("weights", "ema", "state"):
        x, y = without_clocks(getattr(one, part)), without_clocks(getattr(two, part))
        found += [
            f"{part}: {key}" for key in x.keys() | y.keys() if key not in x or key not in y or not alike(x[key], y[key])
        ]

    def pictures(run: Path) -> dict[str, bytes]:
        return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.png"))}

    shots = pictures(a), pictures(b)
    found += [name for name in shots[0].keys() | shots[1].keys() if shots[0].get(name) != shots[1].get(name)]

    def events(run: Path) -> list[Any]:
        lines = [without_clocks(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.get("values", {}).update(dict.fromkeys(("sampling/samples_per_second", "training/seconds"), None))
        return lines

    for i, pair in enumerate(zip(events(a), events(b), strict=False)):
        if pair[0] != pair[1]:
            found.append(f"metrics.jsonl: line {i + 1}: {pair[0]} {pair[1]}")
            break
    if len(events(a)) != len(events(b)):
        found.append(f"metrics.jsonl: {len(events(a))} and {len(events(b))} lines")

    def scores(run: Path) -> dict[str, Any]:
        metrics = json.loads((run / "result.json").read_text())["metrics"]
        return {name: score["value"] for name, score in metrics.items() if "second" not in name}

    if scores(a) != scores(b):
        found.append("result.json")
    return found


def kill_and_go_on(words: Sequence[str], seconds: float, folder: Path, rng: random.Random, kills: int) -> Path:
    """Train by a command that is killed at random moments, going on each time; return the run.

    Args:
        words: of the command.
        seconds: that the part of it takes in which there is a run directory.
        folder: to work in.
        rng: of the moments and of the number of loader workers.
        kills: how many times.
    """
    said = list(words)
    while kills:
        with start([*said, f"trainer.workers={rng.choice([0, 2])}"], folder) as process:
            wait_for(functools.partial(trains, process.pid, folder), process)
            time.sleep(rng.uniform(0, seconds))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills -= 1
            process.communicate()
        run = only_run(folder)
        if json.loads((run / "status.json").read_text())["state"] == "done":
            return run
        said = [f"resume={run}"]
    finish(said, folder)
    return only_run(folder)


def kills(folder: Path, count: int, families: Sequence[str] = tuple(FAMILIES)) -> Iterator[dict[str, Any]]:
    """Kill runs at random moments, one to three times each, and compare them with those that nobody killed."""
    wholes: dict[str, tuple[Path, float]] = {}
    done, trial = 0, 0
    while done < count:
        family, rng = families[trial % len(families)], random.Random(trial)
        words = [*COMMON, *FAMILIES[family]]
        if family not in wholes:
            whole = folder / f"whole-{family}"
            whole.mkdir()
            took = finish(words, whole)
            status = json.loads((only_run(whole) / "status.json").read_text())
            wholes[family] = only_run(whole), max(took - 6.0, status["train_seconds"])
        work = folder / f"{family}-{trial}"
        work.mkdir()
        times = min(rng.choice([1, 2, 3]), count - done)
        begun = time.monotonic()
        run = kill_and_go_on(words, wholes[family][1], work, rng, times)
        resumed = json.loads((run / "status.json").read_text()).get("resumed", [])
        done += times
        trial += 1
        yield {
            "family": family,
            "kills": times,
            "went_on_from": [entry["step"] for entry in resumed],
            "differs": differences(wholes[family][0], run),
            "seconds": round(time.monotonic() - begun, 1),
        }
        shutil.rmtree(work)


EXPERIMENTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {"kills": kills}


def main() -> None:
    """Do one experiment and write down what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        extra = {"families": asked.families} if asked.name == "kills" else {}
        for row in EXPERIMENTS[asked.name](Path(scratch), asked.count, **extra):
            print(row, flush=True)
            rows.append(row)
    OUT.mkdir(exist_ok=True)
    (OUT / f"{asked.name}.json").write_text(json.dumps({"count": asked.count, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
