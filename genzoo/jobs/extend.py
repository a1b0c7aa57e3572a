"""Going on with a finished run on a larger budget: ``resume=DIR budget.images=...``.

The longer run is a run of its own, so that the finished one keeps its weights and scores. It begins with the checkpoint of the
finished run up to which the learning rate did not depend on the budget: its end for a constant rate, the beginning of the decay
for ``wsd``. Up to there it is, bit for bit, the run that had the larger budget from the beginning; only decays are computed
twice. Where a model is trained in stages, the last one goes on and those before it stay as they were.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from genzoo.config.budgets import LIMITS
from genzoo.errors import UsageError
from genzoo.jobs.resume import checked_config, checked_status
from genzoo.runs import Run, RunError, job_id

SPENT = {"images": "images", "seconds": "train_seconds", "flops": "train_flops"}  # keys of a status
PATIENCE = 60  # seconds
COPIED = ("metrics.jsonl", "tokenizer.json", "parents", "precomputed")  # of a run, where they exist


def typed_limits(config: dict[str, Any]) -> dict[str, Any]:
    """Return the limits of a budget on a command line with ``resume=DIR``; empty without one."""
    keys = config.get("overridden", ())
    if not any(key == "budget" or key.removeprefix("budget.") in LIMITS for key in keys):
        return {}
    return {name: config["budget"][name] for name in LIMITS}


def extended(finished: Run, limits: dict[str, Any], *, first: bool = True) -> Run:
    """Create the run that goes on with a finished one, or find it where it was created before.

    Args:
        finished: the run.
        limits: of the larger budget: images, seconds and FLOPs, null for none.
        first: whether this is the first process of the training; the others wait for its run.

    Raises:
        UsageError: for a run that is not finished or cannot go on, and a budget that is no larger.
        RunError: for a damaged run.
    """
    from genzoo.jobs.sweep import best_of, runs_of

    status, config = checked_status(finished), checked_config(finished)
    said = " ".join(f"budget.{name}={value}" for name, value in limits.items() if value is not None)
    if status.get("state") != "done":
        raise UsageError(f"{said}: run={finished.path} is not finished: resume it first, without a budget")
    for name, value in limits.items():
        spent = status.get(SPENT[name]) or 0
        if value is not None and value <= spent:
            raise UsageError(f"budget.{name}={value}: run={finished.path} has spent {spent} already: give more")
    source = last_stable(finished, config)
    config = {**config, "outputs": str(finished.path.parent.parent), "budget": {**config["budget"], **limits}}
    family, job = str(status.get("model")), job_id(config)
    for attempt in range(1 if first else PATIENCE):
        time.sleep(float(attempt > 0))
        if found := best_of(list(runs_of(config, {"model": family}))):
            return found
    if not first:
        raise RunError(f"run={finished.path}: the first process has not begun to go on with it after {PATIENCE} s")

    def fill(path: Path) -> None:
        shutil.copytree(source, path / "checkpoints" / source.name)
        for name in COPIED:
            if (finished.path / name).is_dir():
                shutil.copytree(finished.path / name, path / name)
            elif (finished.path / name).is_file():
                shutil.copyfile(finished.path / name, path / name)

    finished.check_writable()  # no links are copied
    run = Run.create(config["outputs"], finished.path.parent.name, config, job, fill)
    kept = {key: status[key] for key in ("model", "data_sha256", "tokenizer_sha256", "threads") if key in status}
    run.update_status(**kept, extends={"run": finished.path.name, "step": int(source.name.removeprefix("step-"))})
    return run


def last_stable(finished: Run, config: dict[str, Any]) -> Path:
    """Return the last checkpoint of a finished run whose state does not depend on the budget.

    Raises:
        UsageError: where there is none.
    """
    from genzoo.training.checkpoints import STABLE, find, latest

    decay = config["trainer"]["learning_rate"].get("decay")
    if decay == "constant":
        return latest(finished.path)
    if decay != "wsd":
        raise UsageError(
            f"resume={finished.path}: its learning rate has come to its end (trainer.learning_rate.decay={decay}); train with "
            f"decay=wsd to go on later, or begin a new run from its weights by init={finished.path}"
        )
    found = find(finished.path / STABLE)
    if not found:
        raise RunError(f"run={finished.path}: no checkpoint from before the decay of its learning rate")
    return found[-1]
