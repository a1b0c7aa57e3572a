"""``python -m genzoo [train]``: train a model into a run directory, and say what came out."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from genzoo.commands.config import UsageError, build, pick_device, pick_precision


def train(config: dict[str, Any]) -> Path:
    """Train as a validated configuration says, score the result, and return the run directory.

    Raises:
        UsageError: for what the user can mend; no directory has been made then.
        NonFiniteError: when a loss or gradient was not finite.
    """
    import torch

    from genzoo.data.dataset import DataSet
    from genzoo.data.loader import Batches
    from genzoo.model import Denoiser, GenerativeModel
    from genzoo.prob.random import seed_of
    from genzoo.runs import Run
    from genzoo.training.budget import Budget
    from genzoo.training.callbacks import fit
    from genzoo.training.module import GenerativeModule

    quiet()
    settings, seed = config["trainer"], config["seed"]
    torch.set_num_threads(settings["threads"] or len(os.sched_getaffinity(0)))
    device = pick_device(settings["accelerator"])
    settings["precision"] = pick_precision(settings["precision"], device)
    try:
        budget = Budget(**config["budget"])
    except ValueError as error:
        raise UsageError(str(error)) from error

    torch.manual_seed(seed_of("weights", seed))
    if config.get("sampler") and "sampler" not in config["model"]:
        raise UsageError(f"sampler: {config['model']['_target_'].rpartition('.')[2]} samples in one pass; leave it out")
    model: GenerativeModel = build(config["model"], "model")
    data: DataSet = build(config["data"]["source"], "data")
    check_fit(model, data)
    if model.num_classes:
        model.class_probs.copy_(torch.bincount(data.train.y, minlength=model.num_classes).float() / len(data.train.y))
    optimizer = build(config["optimizer"], "optimizer")
    learning_rate = build(settings["learning_rate"], "trainer.learning_rate")
    batches = Batches(data.train, settings["batch_size"], seed, flip=config["data"]["flip"])
    if isinstance(model, Denoiser):
        try:  # an impossible number of steps is said now, not after training
            model.path.schedule.times(model.sampler.steps)
        except ValueError as error:
            raise UsageError(f"sampler.steps: {error}") from error
    if settings["precision"] == "64-true":
        model.double()
    try:
        module = GenerativeModule(
            model, optimizer, batches, budget, learning_rate, settings["ema"], settings["clip"], seed
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"optimizer: {error}") from error

    name = f"{config['hydra_choices']['model']}-{config['data']['name']}"
    stored = {key: value for key, value in config.items() if key != "hydra_choices"}
    run = Run.create(config["outputs"], name, stored)
    try:
        logger = build(config["logger"], "logger", run=run, config=stored) if config.get("logger") else None
        fit(
            module,
            run,
            lambda model, path: draw_grid(model, data, path),
            grids=settings["grids"],
            saves=settings["saves"],
            loggers=[logger] if logger else [],
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision=settings["precision"],
        )
    except BaseException as error:
        run.update_status(state="failed", why=f"{type(error).__name__}: {error}")
        raise

    from genzoo.commands.evaluate import score, show

    result = score(module.ema.model, data, run, config["metrics"], seed=seed, ema=True)
    run.update_status(state="done", why=None)
    if logger is not None:
        logger.log_metrics({name: entry["value"] for name, entry in result["metrics"].items()}, step=module.images)
        logger.finalize("success")
        if isinstance(logger.experiment, object) and type(logger).__name__ == "WandbLogger":
            logger.experiment.finish()  # the next job of a sweep must not write into this run
    show(result)
    print(f"run: {run.path}")
    return run.path


def quiet() -> None:
    """Keep Lightning's notices, which speak of settings that are ours, out of the user's terminal."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")
    warnings.filterwarnings("ignore", category=UserWarning, message=r".*(num_workers|dataloader|lr_scheduler).*")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def check_fit(model: Any, data: Any) -> None:
    """Refuse a model whose event or classes are not those of the data.

    Raises:
        UsageError: saying what differs.
    """
    if model.shape != data.shape:
        raise UsageError(f"data.shape: the data are {data.shape}, the configuration says {model.shape}")
    if model.num_classes not in (0, data.num_classes):
        have = f"has {data.num_classes} classes" if data.num_classes else "has no classes"
        raise UsageError(f"model.num_classes={model.num_classes}: the data set {have}; say 0 or {data.num_classes}")


def draw_grid(model: Any, data: Any, path: Path, n: int = 64) -> None:
    """Draw samples of a model: a grid of images, or a cloud beside the data's."""
    import torch

    from genzoo.data.pictures import as_bytes, grid, save_png, save_scatter
    from genzoo.prob.random import SampleStreams

    was_training = model.training
    model.eval()
    if data.levels is None:
        n = 2000
        rng = SampleStreams(0, range(n), device=model.device)
        save_scatter(path, model.sample(n, rng=rng).x, data.test.x[:n])
    else:
        rng = SampleStreams(0, range(n), device=model.device)
        y = torch.arange(n, device=model.device) % model.num_classes if model.num_classes else None
        save_png(path, grid(as_bytes(model.sample(n, y, rng=rng).x.float(), data.levels), columns=8))
    model.train(was_training)
