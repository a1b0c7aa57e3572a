"""``python -m genzoo [train]``: train a model into a run directory, and say what came out."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from pathlib import Path
from typing import Any

from genzoo.commands.config import REFUSALS, UsageError, build, one_line, pick_device, pick_precision


def train(config: dict[str, Any], choices: dict[str, str]) -> Path:
    """Train as a validated configuration says, score the result, and return the run directory.

    Args:
        config: plain types.
        choices: what was chosen of each group, for the name of the run.

    Raises:
        UsageError: for what the user can mend; no directory has been made then.
        NonFiniteError: when a loss or gradient was not finite.
    """
    import torch

    from genzoo.commands.evaluate import show
    from genzoo.commands.load import check_sampler, inlined
    from genzoo.commands.score import Subject, check_settings, interim, pick_network, score
    from genzoo.data.loader import Batches
    from genzoo.model import GenerativeModel
    from genzoo.prob.random import seed_of
    from genzoo.runs import Run, job_id
    from genzoo.training.budget import Budget
    from genzoo.training.callbacks import fit
    from genzoo.training.module import GenerativeModule

    quiet()
    job = job_id(config)
    settings, seed = config["trainer"], config["seed"]
    torch.set_num_threads(settings["threads"] or len(os.sched_getaffinity(0)))
    device = pick_device(settings["accelerator"], "trainer.accelerator")
    settings["precision"] = pick_precision(settings["precision"], device)

    # What is cheap to refuse is refused before the data are read.
    torch.manual_seed(seed_of("weights", seed))
    model = build(config["model"], "model")
    if not isinstance(model, GenerativeModel):
        raise UsageError(f"model._target_={config['model'].get('_target_')}: is no generative model")
    check_sampler(model)
    check_settings(model, config["metrics"])
    optimizer = build(config["optimizer"], "optimizer")
    check_optimizer(optimizer)
    learning_rate = build(settings["learning_rate"], "trainer.learning_rate")
    records = build(config["logger"], "logger") if config.get("logger") else None
    data = build(config["data"]["source"], "data")
    check_data(config["data"], data, model)
    network = pick_network(config["metrics"], config["data"], needed=False)
    subject = Subject(data, config["data"]["name"], config["data"]["flip"])

    if model.num_classes:
        model.class_probs.copy_(torch.bincount(data.train.y, minlength=model.num_classes).float() / len(data.train.y))
    if settings["precision"] == "64-true":
        model.double()
    batches = Batches(data.train, settings["batch_size"], seed, flip=config["data"]["flip"])
    budget = Budget(*(config["budget"][name] for name in ("images", "seconds", "flops")))
    module = GenerativeModule(model, optimizer, batches, budget, learning_rate, settings["ema"], settings["clip"], seed)

    config = {**config, "model": inlined(config["model"])}
    run = Run.create(config["outputs"], f"{choices['model']}-{config['data']['name']}", config, job)
    run.update_status(model=choices["model"], threads=torch.get_num_threads(), diagnostics=module.diagnostics())
    logger, failed = None, True
    try:
        logger = records.open(run, config) if records else None
        fit(
            module,
            run,
            lambda model, path: draw_grid(model, data, path),
            grids=settings["grids"],
            saves=settings["saves"],
            score=lambda model: interim(model, subject, config["metrics"], settings["score_samples"], network, seed),
            scores=settings["scores"],
            loggers=[logger] if logger else [],
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            precision=settings["precision"],
        )
        network = network and network.to(module.ema.model.device)
        result = score(module.ema.model, subject, run, config["metrics"], network, seed=seed, ema=True)
        if logger:
            values = {name: entry["value"] for name, entry in result["metrics"].items()}
            logger.log_metrics({**values, "images": module.images}, step=module.images)
        failed = False
    except BaseException as error:
        cause = error
        if isinstance(error.__context__, KeyboardInterrupt):  # of which Lightning makes an exit, deaf to further ones
            cause = KeyboardInterrupt()
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run.update_status(state="failed", why=one_line(f"{type(cause).__name__}: {cause}").removesuffix(":"))
        raise cause from error.__cause__
    finally:
        if records and logger:
            records.close(logger, failed=failed)
    run.update_status(state="done", why=None)
    show(result)
    print(f"run: {run.path}", flush=True)
    return run.path


def quiet() -> None:
    """Keep Lightning's notices, which speak of settings that are ours, out of the user's terminal."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")
    warnings.filterwarnings("ignore", category=UserWarning, message=r".*(num_workers|dataloader|lr_scheduler).*")


def check_optimizer(optimizer: Any) -> None:
    """Refuse an optimiser that does not take its arguments, or that cannot step by itself.

    Raises:
        UsageError: in the optimiser's own words.
    """
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    try:
        optimizer([weight]).step()
    except REFUSALS as error:
        raise UsageError(f"optimizer: {one_line(error)}") from error


def check_data(config: dict[str, Any], data: Any, model: Any) -> None:
    """Refuse data that are not what their configuration says, and a model whose classes are not theirs.

    Raises:
        UsageError: saying what differs.
    """
    from genzoo.commands.schema import wrong_classes

    said, found = tuple(config["shape"]), data.shape
    if said != found:
        raise UsageError(f"data.shape={list(said)}: the data have {list(found)}")
    for name in ("levels", "num_classes"):
        said, found = config[name], getattr(data, name)
        if said != found and not (name == "num_classes" and said is None):  # a folder's are known once it is read
            raise UsageError(f"data.{name}={'null' if said is None else said}: the data have {found}")
    if model.shape != data.shape or model.levels != data.levels:
        raise UsageError(f"model.shape={list(model.shape)}, model.levels={model.levels}: leave both to the data")
    if model.num_classes not in (0, data.num_classes):
        raise UsageError(wrong_classes(model.num_classes, data.num_classes))


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
