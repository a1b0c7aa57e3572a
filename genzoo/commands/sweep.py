"""The jobs of a sweep: each in a process of its own, and none that is done already.

A job that fails, leaks or is killed hurts no other. What a job is follows from its resolved configuration alone, so that a
sweep that is started again runs only what is missing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from genzoo.runs import Run, RunError, job_id

TIMED_OUT = 4  # resources: the exit code of a job that took too long


class Outcome(NamedTuple):
    """How a job ended."""

    code: int  # of its exit; negative for the signal that killed it
    cause: str  # the last line that it wrote on stderr


def finished(config: dict[str, Any], choices: dict[str, str]) -> Path | None:
    """Find a finished run of the very same job.

    Args:
        config: validated, plain types.
        choices: what was chosen of each group.
    """
    wanted = job_id(config)
    for status in sorted(Path(config["outputs"], f"{choices['model']}-{config['data']['name']}").glob("*/status.json")):
        try:
            said = Run(status.parent).status
        except RunError:  # a run that was killed while it was made
            continue
        if said.get("job") == wanted and said.get("state") == "done":
            return status.parent
    return None


def run_job(words: Sequence[str], seconds: float | None) -> Outcome:
    """Type ``python -m genzoo`` and some words; what the job writes is shown as it comes.

    Args:
        words: verb, options and overrides.
        seconds: after which the job is stopped; None to wait for ever.
    """
    home = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    last, late = "", threading.Event()
    with subprocess.Popen(
        [sys.executable, "-m", "genzoo", *words],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as child:

        def stop() -> None:
            late.set()
            child.kill()

        watch = threading.Timer(seconds, stop) if seconds else None
        if watch:
            watch.start()
        try:
            for line in child.stderr or ():
                sys.stderr.write(line)
                last = line.strip() or last
        except BaseException:  # the user's interruption, which the child has heard too
            child.wait()
            raise
        finally:
            if watch:
                watch.cancel()
    if late.is_set():
        return Outcome(TIMED_OUT, f"stopped after timeout={seconds:g} seconds")
    if child.returncode < 0:
        return Outcome(child.returncode, f"killed by {signal.Signals(-child.returncode).name}")
    return Outcome(child.returncode, last.removeprefix("genzoo: "))
