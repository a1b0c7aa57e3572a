"""The jobs of a sweep: each in a process of its own, none that is done already, and their comparison at the end.

A job that fails, leaks or is killed hurts no other. What a job is follows from its resolved configuration alone, so that a
sweep that is started again runs only what is missing, and two sweeps at a time share their jobs: each is claimed by whoever
trains it (``genzoo.runs.claims``). Jobs may run on other machines, by a launcher of Hydra's: each writes how it ended
into a folder
that all of them see.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from genzoo.console import BROKEN_PIPE, log_stderr, stderr
from genzoo.runs import Run, RunError, claims, job_id, to_json, write_atomically
from genzoo.runs.redact import redact_words
from genzoo.training.stopping import HEARD, Stopped, is_ignored

TIMED_OUT = 4  # resources: the exit code of a job that took too long
PATIENCE = 1.0  # seconds between two looks at a job that another process is busy with


class Outcome(NamedTuple):
    """How a job ended."""

    code: int  # of its exit; negative for the signal that killed it
    cause: str  # the last line that it wrote on stderr


@dataclass(frozen=True)
class JobResult:
    """What a sweep keeps of a job."""

    words: str
    code: int
    cause: str
    run: str | None  # the directory, where there is one

    def write(self, folder: Path, number: int) -> None:
        """Keep it where the sweep looks for it."""
        write_atomically(folder / f"{number:06d}.json", to_json(asdict(self)))

    @classmethod
    def read_all(cls, folder: Path) -> list[JobResult]:
        """Read what all jobs have written, in the order of their numbers."""
        return [cls(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def runs_of(config: dict[str, Any], choices: dict[str, str]) -> Iterator[Run]:
    """Find the runs of the very same job, the oldest first.

    Args:
        config: validated, plain types.
        choices: what was chosen of each group.
    """
    wanted = job_id(config)
    for status in sorted(Path(config["outputs"], f"{choices['model']}-{config['data']['name']}").glob("*/status.json")):
        with contextlib.suppress(RunError):  # a run that was killed while it was made
            run = Run(status.parent)
            if run.status.get("job") == wanted:
                yield run


def best_of(runs: Sequence[Run]) -> Run | None:
    """Pick a finished run, or else the latest."""
    return next((run for run in runs if run.status.get("state") == "done"), runs[-1] if runs else None)


def name_of(verb: str, overrides: Sequence[str]) -> str:
    """Name a sweep by what was asked for, so that it has the same name when it is started again."""
    return f"sweep-{hashlib.sha256(' '.join([verb, *overrides]).encode()).hexdigest()[:8]}"


def run_job(
    sweep: str,
    verb: str,
    options: Sequence[str],
    words: Sequence[str],
    config: dict[str, Any],
    choices: dict[str, str],
    *,
    wait: bool = True,
) -> JobResult | None:
    """Do one job of a sweep, unless it is done already; a training that another process is busy with is left to it.

    Args:
        sweep: the sweep's name.
        verb: the command.
        options: of the command line, for the job too.
        words: the job's overrides.
        config: validated, plain types.
        choices: what was chosen of each group.
        wait: whether to wait for the other process; its run is taken if it is finished then, or the job is done here.

    Returns:
        How it ended; None where another process is busy with it and nobody waits.
    """
    said = " ".join(redact_words(words))
    if verb != "train":
        outcome = run_process([verb, *options, *words], config.get("timeout"), GENZOO_SWEEP=sweep)
        return JobResult(said, outcome.code, outcome.cause, None if outcome.code else config.get("run"))

    def finished() -> JobResult | None:
        run = best_of(list(runs_of(config, choices)))
        if run is None or run.status.get("state") != "done":
            return None
        print(f"done before: {run.path}", flush=True)
        return JobResult(said, 0, "", str(run.path))

    job = job_id(config)
    path = claims.path_of(config["outputs"], job)
    begun = time.monotonic()
    waits = False
    while True:
        if ended := finished():
            return ended
        if claim := claims.try_lock(path):
            break
        if not wait:
            return None
        if not waits:
            log_stderr(f"job {said}: waits for {claims.owner(path)}, which trains the same job")
            waits = True
        time.sleep(min(PATIENCE, 0.1 + (time.monotonic() - begun) / 10))
    with claim:
        if ended := finished():  # between the look and the claim
            return ended
        outcome = run_process(
            [verb, *options, *words],
            config.get("timeout"),
            inherited=claim.descriptor,
            GENZOO_SWEEP=sweep,
            GENZOO_CLAIM=job,
        )
        run = best_of(list(runs_of(config, choices)))
        state = run.status.get("state") if run else None
        if run and outcome.code and state == "running":  # which it could not write itself
            run.update_status(state="failed", why=outcome.cause)
    if state == "done":  # whatever came after, such as nobody to read the results
        outcome = Outcome(0, "")
    return JobResult(said, outcome.code, outcome.cause, str(run.path) if run else None)


def run_jobs(jobs: list[tuple[int, Callable[[], JobResult | None]]]) -> Iterator[tuple[int, JobResult]]:
    """Do jobs that other processes were busy with, each as soon as it is finished or free.

    Args:
        jobs: numbers of jobs, and what does them without waiting.

    Yields:
        The numbers, and how the jobs ended.
    """
    left = list(jobs)
    if left:
        log_stderr(f"waits for {len(left)} {'job' if len(left) == 1 else 'jobs'} that other processes train")
    while left:
        busy = []
        for number, again in left:
            ended = again()
            if ended is None:
                busy.append((number, again))
            else:
                yield number, ended
        if len(busy) == len(left):
            time.sleep(PATIENCE)
        left = busy


def objective(ended: JobResult, name: str | None) -> float:
    """Return what a sweeper minimises: a score of the run that a job has made, infinite where it has none.

    A score that is better where it is higher is returned with the other sign.

    Args:
        ended: the job.
        name: of the metric; None for the first of the leaderboard.
    """
    from genzoo.catalogue import direction
    from genzoo.report.leaderboard import is_cost, order

    metrics = Run(ended.run).result.get("metrics", {}) if ended.run and not ended.code else {}
    if name is None:
        name = min((metric for metric in metrics if not is_cost(metric)), key=order, default=None)
    score = metrics.get(name, {})
    if score.get("value") is None:
        return float("inf")
    return float(-score["value"] if direction(str(name), score.get("better")) == "higher" else score["value"])


def finish(verb: str, ended: Sequence[JobResult]) -> None:
    """Compare the runs of a sweep, if any job did not fail.

    Raises:
        ValueError: in one line, where nothing can be read or written.
    """
    runs = list(dict.fromkeys(job.run for job in ended if job.run))
    if runs and any(not job.code for job in ended):
        from genzoo.report.comparison import write_comparison

        common = Path(os.path.commonpath([Path(run).resolve() for run in runs]))
        # Of trainings beside the runs of all families; of scorings of one run inside it.
        out = Path(runs[0]).parent.parent if verb == "train" else common
        print(f"comparison: {write_comparison(runs, out / 'comparison')}", flush=True)


def run_process(
    words: Sequence[str], seconds: float | None, *, inherited: int | None = None, **environment: str
) -> Outcome:
    """Type ``python -m genzoo`` and some words; what the job writes is shown as it comes.

    Args:
        words: verb, options and overrides.
        seconds: after which the job is stopped; None to wait for ever.
        inherited: a descriptor that stays open in the job, which keeps the claim should this process be killed.
        environment: variables, besides those that there are.

    Raises:
        Stopped: by a signal, which the job has got too and which has ended it.
    """
    home = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    last, late, stopped, progress = "", threading.Event(), list[int](), stderr()
    with subprocess.Popen(
        [sys.executable, "-m", "genzoo", *words],
        env={**os.environ, "PYTHONPATH": path, **environment},
        pass_fds=() if inherited is None else (inherited,),
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:

        def stop() -> None:
            late.set()
            child.kill()

        def pass_on(number: int, frame: Any) -> None:
            stopped.append(number)
            child.send_signal(number)  # which saves what it has, and ends

        watch = threading.Timer(seconds, stop) if seconds else None
        if watch:
            watch.start()
        in_main = threading.current_thread() is threading.main_thread()
        heard = [number for number in HEARD if not is_ignored(number)] if in_main else []
        before = [(number, signal.signal(number, pass_on)) for number in heard]
        try:
            for line in child.stderr or ():
                progress.write(line)
                progress.flush()
                last = line.strip() or last
            child.wait()
        finally:
            if watch:
                watch.cancel()
            for number, handler in before:
                signal.signal(number, handler)
    if stopped:
        raise Stopped(stopped[0])
    if child.returncode == BROKEN_PIPE:  # the work was done
        return Outcome(0, "")
    if late.is_set():
        return Outcome(TIMED_OUT, f"stopped after timeout={seconds:g} seconds")
    if child.returncode < 0:
        return Outcome(child.returncode, f"killed by {signal.Signals(-child.returncode).name}")
    return Outcome(child.returncode, last.removeprefix("genzoo: "))
