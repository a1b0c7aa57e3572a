"""Runs that are killed, cut and filled up, as a user's are: ``python -m tests.survival NAME [--count N]``.

Each experiment prints a line a trial and writes its figures to ``experiments/reliability/<name>.json``. The tests do a
handful of each; the whole takes from minutes to half an hour.
"""

from __future__ import annotations

import argparse
import functools
import itertools
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
    "metrics.num_samples=4", "metrics.throughput=16",
]  # fmt: skip
FAMILIES = {
    "vae": ["model=vae", "model.encoder.width=8", "model.decoder.width=8", "trainer.ema_half_life=1000"],
    "vqvae": ["model=vqvae", "codec.encoder.width=8", "codec.decoder.width=8"],  # in two stages
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


def start(
    words: Sequence[str], folder: Path, *, process: Callable[..., subprocess.Popen[str]] = subprocess.Popen
) -> subprocess.Popen[str]:
    """Type ``python -m genzoo`` and some words in a folder, in a new process or another kind of one."""
    return process(
        [sys.executable, "-m", "genzoo", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(
    words: Sequence[str], folder: Path, *, process: Callable[..., subprocess.Popen[str]] = subprocess.Popen
) -> float:
    """Do the same to the end, which must be a good one; return the seconds that it took."""
    begun = time.monotonic()
    with start(words, folder, process=process) as started:
        out, _ = started.communicate(timeout=500)
    assert started.returncode == 0, out
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


def alike(x: Any, y: Any) -> bool:
    """Whether plain values and tensors are the same in every bit."""
    import torch

    if isinstance(x, torch.Tensor):
        return x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(alike(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(alike, x, y))
    return bool(x == y)


def differences(a: Path, b: Path) -> list[str]:
    """Name what is not the same in every bit of two finished runs, but for what the clock says."""
    from genzoo.training.checkpoints import find, load

    found = []
    last = [find(run / "checkpoints")[-1] for run in (a, b)]
    if last[0].name != last[1].name:
        found.append(f"checkpoints {last[0].name}, {last[1].name}")
    one, two = map(load, last)
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


def kill_and_go_on(
    words: Sequence[str],
    seconds: float,
    folder: Path,
    rng: random.Random,
    kills: int,
    kind: Callable[..., subprocess.Popen[str]],
) -> Path:
    """Train by a command that is killed at random moments, going on each time; return the run.

    Args:
        words: of the command.
        seconds: that the part of it takes in which there is a run directory.
        folder: to work in.
        rng: of the moments and of the number of loader workers.
        kills: how many times.
        kind: of processes.
    """
    said = list(words)
    while kills:
        with start([*said, f"trainer.workers={rng.choice([0, 2])}"], folder, process=kind) as process:
            wait_for(functools.partial(trains, process.pid, folder), process)
            time.sleep(rng.uniform(0, seconds))
            process.kill()
            process.communicate()
        run = only_run(folder)
        if json.loads((run / "status.json").read_text())["state"] == "done":
            shutil.rmtree(folder / "outputs")  # too late: nothing was left to kill
            said = list(words)
            continue
        kills -= 1
        said = [f"resume={run}"]
    finish(said, folder, process=kind)
    return only_run(folder)


def kills(
    folder: Path,
    count: int,
    families: Sequence[str] = tuple(FAMILIES),
    kind: Callable[..., subprocess.Popen[str]] = subprocess.Popen,
) -> Iterator[dict[str, Any]]:
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
        run = kill_and_go_on(words, wholes[family][1], work, rng, times, kind)
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


def saves(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Kill processes that save one checkpoint after the other, and look at every folder that is called one."""
    import torch
    from torch import nn

    from genzoo.runs import RunError
    from genzoo.training import checkpoints

    model = nn.Linear(512, 512)
    rng = random.Random(0)
    for trial in range(count):
        work = folder / f"saves-{trial}"
        work.mkdir()
        child = os.fork()
        if not child:
            for step in itertools.count():
                with torch.no_grad():
                    model.weight.fill_(step)
                checkpoints.save(work, step, model, model, {"steps": step})
        while len(checkpoints.find(work)) < 2:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn, left = [], len(list(work.glob(".*")))
        found = checkpoints.find(work)
        for path in found:
            try:
                contents = checkpoints.load(path)
            except RunError as error:
                torn.append(str(error))
            else:
                assert bool((contents.weights["weight"] == contents.state["steps"]).all())
        checkpoints.clean(work)
        yield {"torn": torn, "checkpoints": len(found), "leftovers": left, "after_cleaning": len(list(work.glob(".*")))}
        shutil.rmtree(work)


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file in one of several ways; return which."""
    whole = path.read_bytes()
    place = rng.randrange(len(whole))
    kind = rng.choice(["bit", "byte", "cut", "grown", "zeros", "swapped"])
    broken = bytearray(whole)
    if kind == "bit":
        broken[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        broken[place] = (broken[place] + rng.randrange(1, 256)) % 256
    elif kind == "cut":
        del broken[place:]
    elif kind == "grown":
        broken += rng.randbytes(rng.randrange(1, 5000))
    elif kind == "zeros":
        size = min(4096, len(whole) - place)
        broken[place : place + size] = bytes(size)
    else:  # two pages have changed places
        other = rng.randrange(len(whole))
        size = min(512, abs(other - place), len(whole) - max(place, other))
        broken[place : place + size], broken[other : other + size] = (
            whole[other : other + size],
            whole[place : place + size],
        )
    path.write_bytes(broken)
    return kind if bytes(broken) != whole else "none"


def mutations(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Damage checkpoints in one of four files, and try to load them."""
    import torch
    from torch import nn

    from genzoo.runs import RunError
    from genzoo.training import checkpoints

    rng, model = random.Random(0), nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 32))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 32)).sum().backward()
    optimizer.step()
    state = {"steps": 3, "optimizers": [optimizer.state_dict()]}
    for step in (1, 2):
        checkpoints.save(folder, step, model, model, state)
    newest = folder / "step-2"
    kept = {path.name: path.read_bytes() for path in newest.iterdir()}
    whole = checkpoints.load(newest)
    for _ in range(count):
        name = rng.choice([*kept, "weights.safetensors", "ema.safetensors", "state.pt"])
        row: dict[str, Any] = {"file": name, "damage": damage(newest / name, rng)}
        try:
            found = checkpoints.load(newest)
        except RunError as error:
            row["said"] = str(error).replace(str(folder), "")
            row["named"] = "\n" not in str(error) and (name in str(error) or name == "manifest.json")
        else:
            row["alike"] = alike(found, whole)
        if "said" in row:  # and the one before is taken
            messages: list[str] = []
            path, contents = checkpoints.latest_valid(folder, messages.append, remove_damaged=False) or (None, None)
            row["fell_back"] = path == folder / "step-1" and alike(contents, whole) and len(messages) == 1
        yield row
        for name, data in kept.items():
            (newest / name).write_bytes(data)


def signals(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Send SIGTERM or SIGINT at random moments of a training; it must leave soon, saved, and go on to the same end."""
    families = [name for name in FAMILIES if name != "hvae"]
    wholes: dict[str, tuple[Path, float]] = {}
    done = 0
    for trial in itertools.count():
        if done == count:
            return
        rng = random.Random(trial)
        family = families[trial % min(len(families), 4)]
        words = [*COMMON, *FAMILIES[family]]
        if family not in wholes:
            (folder / family).mkdir()
            took = finish(words, folder / family)
            wholes[family] = only_run(folder / family), took
        work = folder / f"{family}-{trial}"
        work.mkdir()
        number = rng.choice([signal.SIGTERM, signal.SIGINT])
        with start(words, work) as process:
            wait_for(functools.partial(trains, process.pid, work), process)
            time.sleep(rng.uniform(0, max(wholes[family][1] - 6.0, 1.0)))
            over = json.loads((only_run(work) / "status.json").read_text())["state"] == "done"
            process.send_signal(number)
            sent = time.monotonic()
            out, _ = process.communicate()
        left = time.monotonic() - sent
        if over or "run: " in out:  # too late: nothing was left to stop
            shutil.rmtree(work)
            continue
        done += 1
        row = {"family": family, "signal": number.name, "code": process.returncode, "seconds": round(left, 2)}
        run = only_run(work)
        before = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
        finish([f"resume={run}"], work)
        status = json.loads((run / "status.json").read_text())
        row["saved"] = (
            f"step-{status['resumed'][0]['step']}" in before if status.get("resumed") else process.returncode == 0
        )
        row["differs"] = differences(wholes[family][0], run)
        row["said"] = out.splitlines()[-1]
        yield row
        shutil.rmtree(work)


def disk(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Train on disks that fill up at different points; only root can make them."""
    from genzoo.runs import RunError
    from genzoo.training import checkpoints

    words = [*COMMON, *FAMILIES["vae"], "budget.images=6400"]
    whole = folder / "whole"
    whole.mkdir()
    finish(words, whole)
    needed = sum(path.stat().st_size + 4096 for path in whole.rglob("*"))
    for trial in range(count):
        size = int(needed * (trial + 0.5) / count)
        place = folder / f"disk-{trial}"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
        try:
            with start([*words, f"outputs={place}"], folder) as process:
                out, _ = process.communicate(timeout=300)
            damaged, found = [], list(place.glob("*/*/checkpoints/step-*"))
            for path in found:
                try:
                    checkpoints.load(path)
                except RunError as error:
                    damaged.append(str(error))
        finally:
            subprocess.run(["umount", str(place)], check=True)
        said = out.splitlines()[-1].replace(str(folder), "") if out else ""
        yield {"bytes": size, "code": process.returncode, "checkpoints": len(found), "damaged": damaged, "said": said}


def starts(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Make runs in many processes at one instant, by one clock that stands still."""
    import datetime

    from genzoo.runs import run as run_module

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Frozen:
            return cls(2026, 1, 2, 3, 4, 5, 6, tzinfo=tz)

    run_module.datetime.datetime = Frozen  # type: ignore[misc]
    read, write = os.pipe()
    children = []
    for _ in range(count):
        child = os.fork()
        if not child:
            os.close(write)
            os.read(read, 1)  # until the pipe is closed, for all at once
            run_module.Run.create(folder, "vae-digits", {"seed": 0})
            os._exit(0)
        children.append(child)
    os.close(read)
    os.close(write)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    found = [path for path in (folder / "vae-digits").iterdir() if (path / "status.json").is_file()]
    yield {"started": count, "directories": len(found), "failed": sum(map(bool, codes))}


def refusals(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Type lines that cannot be right; each must be refused at once, before anything is made."""
    from tests.commands.test_bad_configs import check, draw

    for i, bad in enumerate(draw(1, count)):
        here = folder / str(i)
        here.mkdir()
        before, begun = os.times(), time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "genzoo", *bad.words],
            cwd=here,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        took, after = time.monotonic() - begun, os.times()
        row: dict[str, Any] = {"words": " ".join(bad.words), "code": done.returncode, "said": done.stderr.strip()}
        row["seconds"] = round(took, 2)
        row["processor_seconds"] = round(after.children_user + after.children_system - sum(before[2:4]), 2)
        try:
            check(bad, here, done.returncode, done.stdout, done.stderr)
            row["right"] = True
        except AssertionError:
            row["right"] = False
        yield row


EXPERIMENTS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "kills": kills,
    "saves": saves,
    "mutations": mutations,
    "signals": signals,
    "disk": disk,
    "starts": starts,
    "refusals": refusals,
}


def told(name: str, rows: list[dict[str, Any]]) -> tuple[str, str]:
    """Say in a line of a table what was tried, and what came out."""
    n = len(rows)

    def count(holds: Callable[[dict[str, Any]], Any]) -> int:
        return sum(bool(holds(row)) for row in rows)

    if name == "kills":
        families = len({row["family"] for row in rows})
        return (
            f"{sum(row['kills'] for row in rows)} SIGKILLs at random moments of {n} runs of {families} families, "
            "with 0 and 2 loader workers",
            f"{count(lambda row: not row['differs'])} of {n} ended in the same bits as the run that nobody killed",
        )
    if name == "saves":
        torn, left = sum(len(row["torn"]) for row in rows), sum(row["leftovers"] for row in rows)
        two = count(lambda row: row["checkpoints"] >= 2)
        return (
            f"{n} SIGKILLs while checkpoints are saved",
            f"{torn} torn, two whole ones {two} times; {left} leftovers, all swept",
        )
    if name == "mutations":
        refused = count(lambda row: "said" in row)
        named = count(lambda row: row.get("named") and row.get("fell_back"))
        other = count(lambda row: "said" not in row and not row["alike"])
        return (
            f"{n} checkpoints mutated or cut",
            f"{other} loaded with other weights; {refused} refused, {named} of them by file and cause in one line, and the "
            "one before taken; "
            f"{n - refused - other} mutations changed nothing that is read",
        )
    if name == "signals":
        right = count(lambda row: row["code"] in (130, 143) and row["saved"] and not row["differs"])
        slowest = max(row["seconds"] for row in rows)
        return (
            f"{n} SIGTERMs and SIGINTs at random moments",
            f"{right} left with 143 or 130, saved, and went on to the same bits; the slowest left after {slowest:.1f} s",
        )
    if name == "disk":
        right = count(lambda row: row["code"] == 4 and not row["damaged"] and " free; " in row["said"])
        return (
            f"disks that fill up at {n} points",
            f"{right} of {n} left with 4, naming file and bytes; every checkpoint whole",
        )
    if name == "starts":
        row = rows[0]
        return (
            f"{row['started']} runs made at one instant of a clock that stands still",
            f"{row['directories']} directories",
        )
    right = count(lambda row: row["right"])
    times = sorted(row["seconds"] for row in rows)
    return (
        f"{n} command lines that cannot be right",
        f"{right} refused with 2, in one line with the key, before anything is made; half within {times[n // 2]:.1f} s, "
        f"all within {times[-1]:.1f} s",
    )


def table() -> str:
    """Return what all experiments have found, as rows of Markdown."""
    lines = ["| what was tried | what came out | `python -m tests.survival` |", "|---|---|---|"]
    for name in EXPERIMENTS:
        path = OUT / f"{name}.json"
        if path.is_file():
            found = json.loads(path.read_text())
            lines.append("| {} | {} | `{} --count {}` |".format(*told(name, found["rows"]), name, found["count"]))
    return "\n".join(lines)


def main() -> None:
    """Do one experiment and write down what came out, or show what all of them have."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*EXPERIMENTS, "table"])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    asked = parser.parse_args()
    if asked.name == "table":
        print(table())
        return
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
