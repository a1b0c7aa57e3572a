"""``python -m genzoo evaluate``: score a run, or samples of any program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from genzoo.config.check import check_section
from genzoo.config.instantiate import build
from genzoo.console import log_stderr
from genzoo.devices import pick_device
from genzoo.environment import usable_cores
from genzoo.errors import UsageError
from genzoo.evaluation.density import check_settings
from genzoo.evaluation.records import ScoresNotSavedError, saving
from genzoo.evaluation.scores import compare, evaluate_run, name_training_split, pick_network
from genzoo.evaluation.settings import MAX_NFE, EvalData, EvalSettings
from genzoo.event import EventSpec
from genzoo.jobs.building import make_data
from genzoo.jobs.notes import note
from genzoo.jobs.resources import resources
from genzoo.report.terminal import show


def evaluate(config: dict[str, Any]) -> None:
    """Score a run or samples by a validated configuration, save the result, and print it.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
        ScoresNotSavedError: if the scores were printed but could not be saved.
    """
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # OpenMP ignores CPU quotas of containers
    evaluated = config["run"] if config["samples"] is None else config["samples"]
    try:
        with resources(Path(evaluated), config["metrics"]["batch_size"], "metrics.batch_size"):
            if config["samples"] is not None:
                score_samples(config)
            else:
                score_run(config)
    except ScoresNotSavedError as error:
        show(error.result)
        raise


def score_run(config: dict[str, Any]) -> None:
    """Score a run on its own data."""
    from genzoo.jobs.run_data import build_data, data_section, has_changed
    from genzoo.loading import load_trained, reranked, sampled_by
    from genzoo.metrics.sample_size import check_references
    from genzoo.model import GenerativeModel
    from genzoo.runs import Run

    run = Run(config["run"])
    run.check_writable()  # scores are written into it
    if not os.access(run.path, os.W_OK) or not os.access(run.path / "results", os.W_OK):
        log_stderr(f"run={run.path}: cannot be written to: the scores will be shown but not saved")
    section = data_section(run)
    at_training = run.config.get("metrics")
    at_training = at_training if isinstance(at_training, dict) else {}
    defaults = {name: at_training.get(name, default) for name, default in (("n", 0), ("num_samples", 1))}
    settings = {
        **config["metrics"],
        **{key: value for key, value in defaults.items() if config["metrics"][key] is None},
    }
    if settings.get("max_nfe") == "training":
        settings["max_nfe"] = at_training.get("max_nfe", MAX_NFE)
    try:
        settings = check_section("metrics", settings)
    except UsageError as error:
        raise UsageError(f"{run.path / 'config.yaml'}: {error}") from error
    device = pick_device(config["device"])
    sampler = config.get("sampler")
    model = load_trained(run.path, ema=config["ema"], device=device, trust=config["trust"])
    if isinstance(model, GenerativeModel) or sampler or config.get("guidance"):
        scales = config.get("augmentation"), config.get("prior_guidance")
        model = reranked(
            sampled_by(model, sampler, config.get("guidance"), *scales), config["ranker"], config["candidates"], run
        )
    options = EvalSettings(**settings if isinstance(model, GenerativeModel) else {**settings, "n": 0})
    check_settings(model, options)
    network = pick_network(options, section["name"], EventSpec(section["shape"], section["levels"]), needed=True)
    data = build_data(run, section, config["trust"]).scored_on(options.split)
    for line in data.notes:
        note(line)
    if has_changed(run, data):
        note(f"warning: run={run.path}: the data or their split have changed; it may have been trained on test images")
    check_references({name: len(split.x) for name, split in data.splits.items()}, network, options.force)
    result = evaluate_run(
        model,
        EvalData(data, section["name"], bool(section.get("flip"))),
        run,
        options,
        network and network.to(model.device),
        seed=config["seed"],
        ema=config["ema"],
        chosen=sampler is not None,
    )
    show(result)
    print(f"run: {run.path}")


def score_samples(config: dict[str, Any]) -> None:
    """Score samples of any program, a folder of images or an array."""
    import torch

    from genzoo.data.pictures import check_range, read_samples
    from genzoo.evaluation.samples import stored
    from genzoo.metrics.reference import tensor_sha256
    from genzoo.metrics.sample_size import check_references
    from genzoo.runs import now, to_json, write_atomically

    section = config["data"]
    if section["source"].get("test_fraction", 0) is None:  # by default the reference is the whole folder
        section = {**section, "source": {**section["source"], "test_fraction": 0}}
    path = Path(config["samples"])
    out = Path(config["out"] or f"{path.with_suffix('') if path.is_file() else path}.scores.json")
    check_out(out)
    data = make_data(section, build).scored_on(config["metrics"]["split"])
    for line in data.notes:
        note(line)
    x = read_samples(path, data.shape, data.levels, note)
    settings = EvalSettings(**{**config["metrics"], "n": len(x)})
    network = pick_network(settings, section["name"], data.event, needed=True)
    check_references({name: len(split.x) for name, split in data.splits.items()}, network, settings.force)
    mismatch = check_range(x, stored(next(iter(data.splits.values())).x, data.levels), data.levels)
    if mismatch and mismatch.certain and not settings.force:
        raise UsageError(f"samples={path}: {mismatch.text}; metrics.force=true scores them anyway, marked")
    setting = {
        "samples": path.name,
        "samples_sha256": tensor_sha256(x),
        **({"range": mismatch.text} if mismatch else {}),
    }
    device = torch.device(pick_device(config["device"]))
    eval_data = EvalData(data, section["name"], bool(section["flip"]))
    metrics, warnings = compare(x, None, eval_data, settings, setting, network and network.to(device), device)
    name_training_split(metrics, data)
    if mismatch:
        warnings = [f"samples={path}: {mismatch.text}", *warnings]
        note(f"warning: {warnings[0]}")
    result = {"scored": now(), "metrics": metrics, "warnings": warnings}
    with saving(result, out):
        write_atomically(out, to_json(result))
    show(result)
    print(f"scores: {out}")


def check_out(out: Path) -> None:
    """Check that the result file can be written.

    Raises:
        ValueError: naming the cause.
    """
    from genzoo.runs import check_writable

    if not out.parent.is_dir():
        raise UsageError(f"out={out}: there is no directory {out.parent}")
    if out.is_dir():
        raise UsageError(f"out={out}: is a folder")
    check_writable(out.parent, f"out={out}")
