"""Jobs of a sweep: each in a process of its own, skipped if finished, and compared at the end.

A job that fails, leaks memory or is killed does not affect others. A job is identified by its resolved configuration, so that a
restarted sweep runs only missing jobs, and concurrent sweeps divide their common jobs by claims (``genzoo.runs.claims``). With
a Hydra launcher jobs run on other machines, and write their results into a shared folder.
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
from genzoo.errors import UsageError
from genzoo.runs import Run, RunError, claims, job_id, to_json, write_atomically
from genzoo.runs.redact import redact_words
from genzoo.training.stopping import HEARD, Stopped, is_ignored

TIMED_OUT = 4  # exit code (resources) of a job after its timeout
PATIENCE = 1.0  # polling interval for a job of another process, in seconds


class Outcome(NamedTuple):
    """Exit of a job's process."""

    code: int  # exit code; negative signal number if killed
    cause: str  # last line on stderr


@dataclass(frozen=True)
class JobResult:
    """Result of a job of a sweep."""

    words: str
    code: int
    cause: str
    run: str | None  # run directory, if any

    def write(self, folder: Path, number: int) -> None:
        """Write it into the folder of the sweep."""
        write_atomically(folder / f"{number:06d}.json", to_json(asdict(self)))

    @classmethod
    def read_all(cls, folder: Path) -> list[JobResult]:
        """Read the results of all jobs, sorted by number."""
        return [cls(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def runs_of(config: dict[str, Any], choices: dict[str, str]) -> Iterator[Run]:
    """Find the runs of the same job, oldest first.

    Args:
        config: validated, plain types.
        choices: choice of each group.
    """
    wanted = job_id(config)
    for status in sorted(Path(config["outputs"], f"{choices['model']}-{config['data']['name']}").glob("*/status.json")):
        with contextlib.suppress(RunError):  # killed during its creation
            run = Run(status.parent)
            if run.status.get("job") == wanted:
                yield run


def best_of(runs: Sequence[Run]) -> Run | None:
    """Return a finished run, or else the latest."""
    return next((run for run in runs if run.status.get("state") == "done"), runs[-1] if runs else None)


def name_of(verb: str, overrides: Sequence[str]) -> str:
    """Name of a sweep, a hash of its overrides, reproducible when it is restarted."""
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
    """Run one job of a sweep, unless it is finished or running in another process.

    Args:
        sweep: the sweep's name.
        verb: the command.
        options: command-line options of the job.
        words: overrides of the job.
        config: validated, plain types.
        choices: choice of each group.
        wait: whether to wait for another process that runs the job.

    Returns:
        The result; None if another process runs the job and ``wait`` is false.
    """
    label = " ".join(redact_words(words))
    if verb != "train":
        outcome = run_process([verb, *options, *words], config.get("timeout"), GENZOO_SWEEP=sweep)
        return JobResult(label, outcome.code, outcome.cause, None if outcome.code else config.get("run"))

    def finished() -> JobResult | None:
        run = best_of(list(runs_of(config, choices)))
        if run is None or run.status.get("state") != "done":
            return None
        print(f"already done: {run.path}", flush=True)
        return JobResult(label, 0, "", str(run.path))

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
            log_stderr(f"job {label}: waiting for {claims.owner(path)}, which trains the same job")
            waits = True
        time.sleep(min(PATIENCE, 0.1 + (time.monotonic() - begun) / 10))
    with claim:
        if ended := finished():  # since the last check
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
        if run and outcome.code and state == "running":  # killed before it could update its status
            run.update_status(state="failed", why=outcome.cause)
    if state == "done":  # later errors, such as a broken pipe, are ignored
        outcome = Outcome(0, "")
    return JobResult(label, outcome.code, outcome.cause, str(run.path) if run else None)


def run_jobs(jobs: list[tuple[int, Callable[[], JobResult | None]]]) -> Iterator[tuple[int, JobResult]]:
    """Wait for jobs of other processes, and run those that become free.

    Args:
        jobs: job numbers with functions that run them without waiting.

    Yields:
        Job numbers and results.
    """
    left = list(jobs)
    if left:
        log_stderr(f"waiting for {len(left)} {'job' if len(left) == 1 else 'jobs'} of other processes")
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


def chooses_on_validation(words: Sequence[str]) -> str:
    """Return the override that scores a trial of a search on the validation split.

    Args:
        words: overrides of the trial.

    Raises:
        UsageError: if they choose by the test split.
    """
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if (key, value) == ("metrics.split", "test") or (key == "objective" and value.startswith("test/")):
            raise UsageError(
                f"{word}: a search chooses on the validation split: "
                + (f"objective={value.replace('test/', 'validation/')}" if key == "objective" else "omit it")
            )
    return "metrics.split=validation"


def objective(ended: JobResult, name: str | None) -> float:
    """Objective of a sweeper, to be minimised: a score of the job's run, negated if higher is better; infinite if missing.

    Args:
        ended: the job.
        name: of the metric; None for the leaderboard's first.
    """
    from genzoo.catalogue import direction, is_cost
    from genzoo.report.leaderboard import order

    metrics = Run(ended.run).result.get("metrics", {}) if ended.run and not ended.code else {}
    if name is None:
        name = min((metric for metric in metrics if not is_cost(metric)), key=order, default=None)
    score = metrics.get(name, {})
    if score.get("value") is None:
        return float("inf")
    return float(-score["value"] if direction(str(name), score.get("better")) == "higher" else score["value"])


def finish(verb: str, ended: Sequence[JobResult]) -> None:
    """Compare the runs of a sweep, unless all jobs failed.

    Raises:
        ValueError: with a one-line message, if the comparison cannot be read or written.
    """
    if verb not in ("train", "evaluate"):
        return  # nothing was scored
    runs = list(dict.fromkeys(job.run for job in ended if job.run))
    if runs and any(not job.code for job in ended):
        from genzoo.report.comparison import write_comparison

        common = Path(os.path.commonpath([Path(run).resolve() for run in runs]))
        # For trainings in the folder of all families, for evaluations of one run inside it.
        out = Path(runs[0]).parent.parent if verb == "train" else common
        print(f"comparison: {write_comparison(runs, out / 'comparison')}", flush=True)


def run_process(
    words: Sequence[str], seconds: float | None, *, inherited: int | None = None, **environment: str
) -> Outcome:
    """Run ``python -m genzoo`` in a subprocess and forward its stderr.

    Args:
        words: verb, options and overrides.
        seconds: timeout; None for no limit.
        inherited: descriptor inherited by the job, which keeps the claim if this process is killed.
        environment: additional environment variables.

    Raises:
        Stopped: by a signal, which is forwarded to the job.
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
            child.send_signal(number)  # it saves a checkpoint and exits

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
    if child.returncode == BROKEN_PIPE:  # the job itself succeeded
        return Outcome(0, "")
    if late.is_set():
        return Outcome(TIMED_OUT, f"stopped after timeout={seconds:g} seconds")
    if child.returncode < 0:
        return Outcome(child.returncode, f"killed by {signal.Signals(-child.returncode).name}")
    return Outcome(child.returncode, last.removeprefix("genzoo: "))
