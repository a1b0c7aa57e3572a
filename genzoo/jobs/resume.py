"""Going on with a run that was interrupted: which one, what is taken over from it, and what must fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genzoo.config.check import check, check_section
from genzoo.errors import REFUSALS, UsageError, one_line
from genzoo.jobs.resources import log_line
from genzoo.runs import UNHASHED_KEYS, Run, RunError, now, provenance
from genzoo.training.settings import TrainerSettings

PROCESSES = ("devices", "nodes", "workers")  # keys of the trainer that start processes


def find_resumable(config: dict[str, Any], choices: dict[str, str]) -> Run | None:
    """Find the run that ``resume=`` asks for: the one that is named, or the latest of the very same job.

    Raises:
        RunError: where the named one is none.
    """
    from genzoo.jobs.sweep import best_of, runs_of

    resume = config.get("resume")
    if resume == "auto":
        return best_of(list(runs_of(config, choices)))
    if resume and not Path(resume, "config.yaml").is_file():
        raise RunError(f"resume={resume}: no run directory, it has no config.yaml")
    return Run(resume) if resume else None


def resumed_config(run: Run, typed: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run, with those keys of the trainer replaced that may change on the way.

    Args:
        run: that is resumed.
        typed: the configuration of the command line; ``said`` are the keys that were typed, all of them where it is missing.

    Raises:
        RunError: for a configuration that is not valid.
    """
    config = checked_config(run)
    before = TrainerSettings(**config["trainer"])
    for key in UNHASHED_KEYS:
        section, _, name = key.rpartition(".")
        if section != "trainer":
            continue
        if name in PROCESSES:  # which nobody else's file starts
            config[section].pop(name, None)
        if name in typed[section] and (name in PROCESSES or key in typed.get("said", UNHASHED_KEYS)):
            config[section][name] = typed[section][name]
    after = TrainerSettings(**config["trainer"])
    for name in ("devices", "nodes"):
        was, present = getattr(before, name), getattr(after, name)
        if was != present:
            log_line(
                f"began with trainer.{name}={was}, goes on with {present}: say trainer.{name}={was} for as many processes"
            )
    return config


def checked_config(run: Run) -> dict[str, Any]:
    """Read the configuration that a run was trained by, as far as it is one.

    Raises:
        RunError: naming the key that is wrong.
    """
    try:
        return check("train", run.config)
    except UsageError as error:
        raise RunError(f"{run.path / 'config.yaml'}: {error}") from error


def checked_status(run: Run) -> dict[str, Any]:
    """Read the status of a run that is gone on with, which may be anybody's: what is taken over of it is what it should be.

    Raises:
        RunError: naming the key that is wrong.
    """
    try:
        return check_section("status", run.status)
    except UsageError as error:
        raise RunError(f"{run.path / 'status.json'}: {str(error).removeprefix('status.')}") from error


def check_parents(run: Run, model: Any, parents: dict[str, Any]) -> None:
    """Refuse to go on where the weights of a finished model that training builds on were not kept.

    Args:
        run: what is gone on with.
        model: its model.
        parents: the finished models, by the keys of their configurations.

    Raises:
        RunError: naming the folder and the key.
    """
    from genzoo.loading import PARENTS
    from genzoo.training.checkpoints import find

    if (run.path / PARENTS).is_dir():
        return
    kept = {id(weight) for weight in model.parameters()} if find(run.path / "checkpoints") else set()
    for key, parent in parents.items():
        # Checkpoints hold a parent that is a part of the model, such as a codec.
        if not kept.intersection(map(id, parent.parameters())):
            raise RunError(f"{run.path / PARENTS}: is missing, without the weights of {key} it cannot train on")


def resume(module: Any, run: Run, facts: dict[str, Any], found: tuple[Path, Any] | None) -> None:
    """Restore a run's newest checkpoint, and forget what it has recorded since.

    Args:
        module: as it is at the start of a run.
        run: the run.
        facts: of this machine and these data.
        found: the checkpoint and what it holds; None for the start.

    Raises:
        RunError: where the data are others, or the checkpoint belongs to another model.
    """
    status = checked_status(run)
    if status.get("data_sha256") not in (None, facts["data_sha256"]):
        raise RunError(f"run={run.path}: the data have changed since it began; a new run is needed")
    if found:
        run.forget_events(restore(module, *found))
    else:
        run.forget_events(0)
    here, versions, machine = provenance(), status.get("versions") or {}, status.get("machine") or {}
    began = {
        **versions,
        "cpu": machine.get("cpu"),
        "device": status.get("device"),
        "threads": status.get("threads"),
        **gpu(status.get("gpu")),
    }
    goes_on = {
        **here["versions"],
        "cpu": here["machine"]["cpu"],
        "device": facts["device"],
        "threads": facts["threads"],
        **gpu(facts["gpu"]),
    }
    for name, was in began.items():
        if was is not None and was != goes_on.get(name):
            log_line(f"began with {name} {was}, goes on with {goes_on.get(name)}: the last bits may differ")
    log_line(f"goes on from step {module.steps}" + (f" of {module.plan.planned_steps}" if module.plan.known else ""))
    times = status.get("resumed") or []
    run.update_status(resumed=[*times, {"at": now(), "step": module.steps, "command": here["command"]}])


def gpu(facts: dict[str, Any] | None) -> dict[str, Any]:
    """Name what of a GPU may change the last bits."""
    return {f"GPU {name}": (facts or {}).get(name) for name in ("name", "driver", "cuda", "cudnn")}


def restore(module: Any, checkpoint: Path, contents: Any) -> int:
    """Give a module what a checkpoint holds; return how many bytes of events there were.

    Raises:
        RunError: naming the file that is not of this model and this training.
    """
    from genzoo.training.state_checks import StateError, whole

    try:
        module.restore(*contents)
        logged = whole(contents.state.get("logged"), "logged")
        if checkpoint.name != f"step-{module.steps}":
            raise StateError(f"steps={module.steps}: this is {checkpoint.name}")
        return logged
    except StateError as error:
        raise RunError(f"{checkpoint / 'state.pt'}: {one_line(error)[:300]}") from error
    except (*REFUSALS, OverflowError) as error:
        raise RunError(f"{checkpoint}: does not fit the model of config.yaml: {one_line(error)[:200]}") from error
