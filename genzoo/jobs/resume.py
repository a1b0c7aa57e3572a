"""Resuming of interrupted runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genzoo.config.check import check, check_section
from genzoo.errors import BUILD_ERRORS, UsageError, one_line
from genzoo.jobs.resources import log_line
from genzoo.runs import UNHASHED_KEYS, Run, RunError, now, provenance
from genzoo.training.settings import TrainerSettings

PROCESSES = ("devices", "nodes", "workers")  # keys of the trainer: numbers of processes


def find_resumable(config: dict[str, Any], choices: dict[str, str]) -> Run | None:
    """Find the run to resume: the given directory, or with ``resume=auto`` the latest run of the same job.

    Raises:
        RunError: if the directory is not a run.
    """
    from genzoo.jobs.sweep import best_of, runs_of

    resume = config.get("resume")
    if resume == "auto":
        return best_of(list(runs_of(config, choices)))
    if resume and not Path(resume, "config.yaml").is_file():
        raise RunError(f"resume={resume}: not a run directory, it has no config.yaml")
    return Run(resume) if resume else None


def resumed_config(run: Run, typed: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a run, updated by the trainer keys that may change on resuming.

    Args:
        run: the resumed run.
        typed: configuration of the command line; its key ``overridden`` lists the keys set there, all if missing.

    Raises:
        RunError: for an invalid configuration.
    """
    config = checked_config(run)
    before = TrainerSettings(**config["trainer"])
    for key in UNHASHED_KEYS:
        section, _, name = key.rpartition(".")
        if section != "trainer":
            continue
        if name in PROCESSES:  # set by the command line alone
            config[section].pop(name, None)
        if name in typed[section] and (name in PROCESSES or key in typed.get("overridden", UNHASHED_KEYS)):
            config[section][name] = typed[section][name]
    after = TrainerSettings(**config["trainer"])
    for name in ("devices", "nodes"):
        was, present = getattr(before, name), getattr(after, name)
        if was != present:
            log_line(
                f"started with trainer.{name}={was}, resuming with {present}: set trainer.{name}={was} for as many processes"
            )
    return config


def checked_config(run: Run) -> dict[str, Any]:
    """Read and validate the configuration of a run.

    Raises:
        RunError: naming the invalid key.
    """
    try:
        return check("train", run.config)
    except UsageError as error:
        raise RunError(f"{run.path / 'config.yaml'}: {error}") from error


def checked_status(run: Run) -> dict[str, Any]:
    """Read and validate the (untrusted) status of a resumed run.

    Raises:
        RunError: naming the invalid key.
    """
    try:
        return check_section("status", run.status)
    except UsageError as error:
        raise RunError(f"{run.path / 'status.json'}: {str(error).removeprefix('status.')}") from error


def check_parents(run: Run, model: Any, parents: dict[str, Any]) -> None:
    """Check that the weights of all parent models are stored in a resumed run.

    Args:
        run: the resumed run.
        model: its model.
        parents: finished models used in training, by configuration key.

    Raises:
        RunError: naming the folder and the key.
    """
    from genzoo.loading import PARENTS
    from genzoo.training.checkpoints import find

    if (run.path / PARENTS).is_dir():
        return
    kept = {id(weight) for weight in model.parameters()} if find(run.path / "checkpoints") else set()
    for key, parent in parents.items():
        # A parent that is a part of the model, such as a codec, is in the checkpoints.
        if not kept.intersection(map(id, parent.parameters())):
            raise RunError(f"{run.path / PARENTS}: is missing: cannot resume without the weights of {key}")


def resume(module: Any, run: Run, facts: dict[str, Any], found: tuple[Path, Any] | None) -> None:
    """Restore a run's latest checkpoint, and truncate later events.

    Args:
        module: a freshly initialised module.
        run: the run.
        facts: of this machine and these data.
        found: path and contents of the checkpoint; None to start from step 0.

    Raises:
        RunError: if the data have changed, or the checkpoint does not match the model.
    """
    status = checked_status(run)
    if status.get("data_sha256") not in (None, facts["data_sha256"]):
        raise RunError(f"run={run.path}: the data have changed since it started; start a new run")
    if found:
        run.forget_events(restore(module, *found))
        plan_extension(module, run)
    else:
        run.forget_events(0)
    here, versions, machine = provenance(), status.get("versions") or {}, status.get("machine") or {}
    before = {
        **versions,
        "cpu": machine.get("cpu"),
        "device": status.get("device"),
        "threads": status.get("threads"),
        **gpu(status.get("gpu")),
    }
    current = {
        **here["versions"],
        "cpu": here["machine"]["cpu"],
        "device": facts["device"],
        "threads": facts["threads"],
        **gpu(facts["gpu"]),
    }
    for name, was in before.items():
        if was is not None and was != current.get(name):
            log_line(f"started with {name} {was}, resuming with {current.get(name)}: results may not be bit-identical")
    log_line(f"resuming from step {module.steps}" + (f" of {module.plan.planned_steps}" if module.plan.known else ""))
    times = status.get("resumed") or []
    run.update_status(resumed=[*times, {"at": now(), "step": module.steps, "command": here["command"]}])


def gpu(facts: dict[str, Any] | None) -> dict[str, Any]:
    """Facts of a GPU that may change floating-point results."""
    return {f"GPU {name}": (facts or {}).get(name) for name in ("name", "driver", "cuda", "cudnn")}


def plan_extension(module: Any, run: Run) -> None:
    """Plan a run that goes on with a finished one by its own budget, at the step where it begins."""
    if (checked_status(run).get("extends") or {}).get("step") == module.steps:
        module.extend_plan()


def restore(module: Any, checkpoint: Path, contents: Any) -> int:
    """Restore a module from a checkpoint; return the size of the events in bytes.

    Raises:
        RunError: naming a file that does not match the model or the training.
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
    except (*BUILD_ERRORS, OverflowError) as error:
        raise RunError(f"{checkpoint}: does not fit the model of config.yaml: {one_line(error)[:200]}") from error
