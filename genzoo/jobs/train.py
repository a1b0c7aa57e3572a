"""``python -m genzoo [train]``: train a model in a new or resumed run, and evaluate it."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from genzoo.config.instantiate import build, targets
from genzoo.devices import gpu_facts, pick_device, pick_precision
from genzoo.errors import UsageError, one_line
from genzoo.jobs.allocator import tune
from genzoo.jobs.building import check_data, check_optimizer, class_names, describe_model, make_data, unseen_classes
from genzoo.jobs.extend import extended, typed_limits
from genzoo.jobs.notes import note
from genzoo.jobs.processes import check_processes, claimed, rank_of, threads_of_each
from genzoo.jobs.resources import log_line, quiet, resources
from genzoo.jobs.resume import (
    check_parents,
    checked_status,
    find_resumable,
    plan_extension,
    restore,
    resume,
    resumed_config,
)
from genzoo.runs import ResourceError, Run, job_id
from genzoo.training.settings import TrainerSettings


def train(config: dict[str, Any], choices: dict[str, str]) -> Path | None:
    """Train a model by a validated configuration, evaluate it, and return the run directory.

    In distributed training only rank 0 writes, evaluates and returns the run.

    Args:
        config: plain types.
        choices: choice of each group, for the name of the run.

    Raises:
        UsageError, RunError: for invalid input; no directory is created then.
        NonFiniteError: for a non-finite loss or gradient.
        ResourceError: if the disk or memory is full, or a loader worker died.
        Stopped: by a signal, after writing a checkpoint.
    """
    settings = TrainerSettings(**config["trainer"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(resources(Path(config["outputs"]), settings.batch_size))
        if config.get("resume") == "auto":
            stack.enter_context(claimed(config["outputs"], job_id(config), settings.devices, needed=True))
        old = find_resumable(config, choices)
        if old is None:
            own = {key: value for key, value in config.items() if key not in ("resume", "trust")}
            return _train(own, choices["model"])
        if limits := typed_limits(config):
            old = extended(old, limits, first=rank_of(settings.devices) == 0)
        status = checked_status(old)
        if status.get("state") == "done":
            print(f"already done: {old.path}", flush=True)
            return old.path
        old.check_writable()  # before loading the data
        # The configuration of a run is untrusted, except for the classes on the command line.
        trust = [*config.get("trust", []), *(targets(config) if config["resume"] == "auto" else ())]
        return _train(resumed_config(old, config), str(status.get("model")), old, trust)


CAPTIONED = 24  # samples of a grid with captions


class Parts(NamedTuple):
    """Objects of a training."""

    module: Any  # a GenerativeModule
    eval_data: Any  # EvalData
    metrics: Any  # EvalSettings
    network: Any  # feature network, or None
    logger_factory: Any  # factory of a logger, or None
    device: str
    parents: dict[str, Any]  # finished models used in training, by configuration key


def prepare(config: dict[str, Any], old: Run | None, trust: list[str]) -> Parts:
    """Instantiate the objects of a configuration.

    Cheap checks come first, before loading the data and importing Lightning, which takes seconds.

    Args:
        config: of the run; updated with the precision chosen for "auto".
        old: the resumed run, if any.
        trust: allowed classes outside genzoo.

    Raises:
        UsageError: naming the invalid key.
    """
    from genzoo.evaluation.density import check_settings
    from genzoo.evaluation.scores import pick_network
    from genzoo.evaluation.settings import EvalData, EvalSettings
    from genzoo.event import EventSpec
    from genzoo.loading import check_tokenizers
    from genzoo.training.budget import Budget

    make = functools.partial(build, trusted=old is None, trust=trust)
    settings = TrainerSettings(**config["trainer"])
    device = _configure_machine(config, settings, old)
    model, parents, data = _build_model(config, make, old)
    learning_rate = make(settings.learning_rate, "trainer.learning_rate")
    metrics = EvalSettings(**config["metrics"])
    check_settings(model, metrics)
    logger_factory = make(config["logger"], "logger") if config.get("logger") else None
    event = EventSpec(config["data"]["shape"], config["data"]["levels"])
    pick = functools.partial(pick_network, metrics, config["data"]["name"], event, needed=False)
    network = pick() if config["metrics"]["features"] != "auto" else None
    budget = Budget(*(config["budget"][name] for name in ("images", "seconds", "flops")))
    optimizer = make(config["optimizer"], "optimizer")
    check_optimizer(optimizer, step=False)
    data = make_data(config["data"], make) if data is None else data
    check_data(config["data"], data, model)
    if old is None:
        check_tokenizers(config["model"], data.tokenizer)
    if rank_of(settings.devices) == 0:
        for line in [*data.notes, *unseen_classes(data)]:
            note(line)
    network = network or pick()  # the default network is optional
    check_optimizer(optimizer)  # torch imports its compiler for the first step, which takes seconds
    eval_data = EvalData(data.scored_on(metrics.split), config["data"]["name"], config["data"]["flip"])
    settings = TrainerSettings(**config["trainer"])  # with the precision of this machine
    module = _build_module(model, eval_data, optimizer, budget, learning_rate, settings, config["seed"], device)
    return Parts(module, eval_data, metrics, network, logger_factory, device, parents)


def _configure_machine(config: dict[str, Any], settings: TrainerSettings, old: Run | None) -> str:
    """Set threads and determinism, write the precision into the configuration, and return the device."""
    import torch

    from genzoo.numerics.precision import deterministic

    threads = settings.threads or threads_of_each(settings.devices)
    if old:  # bounded, since the status is untrusted
        threads = min(checked_status(old).get("threads") or threads, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    device = pick_device(settings.accelerator, "trainer.accelerator")
    check_processes(settings, device)
    config["trainer"]["precision"] = pick_precision(settings.precision, device)
    deterministic(settings.deterministic)
    return device


def _build_model(config: dict[str, Any], make: Callable[..., Any], old: Run | None) -> tuple[Any, dict[str, Any], Any]:
    """Build the model with the initial weights of the seed.

    Returns:
        The model, the finished models that it is trained from, and the data if they had to be loaded for it.

    Raises:
        UsageError, RunError: naming the invalid key or file.
    """
    import torch

    from genzoo.loading import PARENTS, check_sampler, with_parents
    from genzoo.model import GenerativeModel, TrainableModel
    from genzoo.numerics.random import reseed, seed_of

    torch.manual_seed(seed_of("weights", config["seed"]))
    reseed(torch.default_generator, "weights", config["seed"])  # manual_seed uses only 32 bits on a CPU
    data = describe_model(config, make) if old is None else None
    described, parents = with_parents(config["model"], "model", make, old.path / PARENTS if old else None)
    model = make(described, "model")
    if not isinstance(model, TrainableModel):
        raise UsageError(f"model._target_={config['model'].get('_target_')}: is not a GenerativeModel")
    if old:
        check_parents(old, model, parents)
    if isinstance(model, GenerativeModel):
        check_sampler(model)
    return model, parents, data


def _build_module(
    model: Any,
    eval_data: Any,
    optimizer: Any,
    budget: Any,
    learning_rate: Any,
    settings: TrainerSettings,
    seed: int,
    device: str,
) -> Any:
    """Build the module that trains the model, in its precision and memory format."""
    import torch

    from genzoo.data.loader import Batches
    from genzoo.training.module import GenerativeModule

    train = eval_data.data.train
    if settings.precision == "64-true":
        model.double()
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    return GenerativeModule(
        model,
        optimizer,
        Batches(train, settings.batch_size, seed, eval_data.flip, workers=settings.workers),
        budget,
        learning_rate,
        ema_half_life=settings.ema_half_life,
        clip=settings.clip,
        seed=seed,
        scaler=torch.amp.GradScaler(device) if settings.precision == "16-mixed" else None,
        compiled=settings.compile,
        channels_last=settings.channels_last,
    )


def _train(config: dict[str, Any], family: str, old: Run | None = None, trust: Sequence[str] = ()) -> Path | None:
    """Train a new run, or resume an old one, and score it.

    Args:
        config: of the run.
        family: what was chosen as ``model=``.
        old: the run to resume.
        trust: classes that its configuration may name besides genzoo's own.
    """
    from genzoo.evaluation.records import ScoresNotSavedError
    from genzoo.evaluation.scores import evaluate_run
    from genzoo.loading import PARENTS, inline_runs
    from genzoo.report.terminal import show
    from genzoo.runs import write_atomically
    from genzoo.text import TOKENIZER

    job = job_id(config)
    parts = prepare(config, old, list(trust))

    from genzoo.jobs.init import INIT, fitting_weights, kept_weights
    from genzoo.training.checkpoints import clean, keep_models, keep_tensors, latest_valid
    from genzoo.training.precompute import take_precomputed
    from genzoo.training.stopping import Signals

    quiet()
    config = {**config, "model": inline_runs(config["model"])}
    module, metrics, settings = parts.module, parts.metrics, TrainerSettings(**config["trainer"])
    weights = sum(tensor.nbytes for tensor in module.model.state_dict().values())
    newest = functools.partial(latest_valid, limit=16 * weights + 2**24)  # bytes of state, at most
    fit_run = _fitting(parts, settings, config["seed"], old.path if old else Path(config["outputs"]))
    if old:
        take_precomputed(module, old)
        module.initial = kept_weights(old.path, module.model)
    elif config.get("init"):
        module.initial, said = fitting_weights(config["init"], module.model)
        if rank_of(settings.devices) == 0:
            note(said)
    if rank_of(settings.devices) > 0 and settings.processes > 1:  # only the first process writes
        if old and (found := newest(old.path / "checkpoints", lambda _: None, remove_damaged=False)):
            restore(module, *found)
            plan_extension(module, old)
        with Signals() as signals:
            fit_run(run=None, loggers=[], signals=signals)
        return None

    tokenizer = tokenizer_of(parts)

    def fill(path: Path) -> None:
        if parts.parents:
            keep_models(path / PARENTS, parts.parents)
        if module.initial:
            keep_tensors(path / INIT, {"weights": module.initial})
        if tokenizer:
            write_atomically(path / TOKENIZER, tokenizer.to_json().encode())

    facts = _facts(parts, family)
    # The configuration of a resumed run holds the precision that was chosen for it, and its job does not.
    began_as = (old and checked_status(old).get("job")) or ""
    job = began_as if re.fullmatch("[0-9a-f]{64}", began_as) else job
    held = claimed(config["outputs"], job, settings.devices, needed=False)
    with held, Signals() as signals, contextlib.ExitStack() as stack:
        run = old or Run.create(config["outputs"], f"{family}-{config['data']['name']}", config, job, fill)
        parts.parents.clear()  # the model has those that it needs
        stack.enter_context(run.training())
        if old:
            run.complete()
            clean(run.path / "checkpoints")
            clean(run.path)
            resume(module, run, facts, newest(run.path / "checkpoints", log_line))
        run.update_status(**facts, state="running", why=None, pid=os.getpid(), diagnostics=module.diagnostics())
        logger = None
        try:
            logger = parts.logger_factory.open(run, config) if parts.logger_factory else None
            with resources(run.path, settings.batch_size):
                fit_run(run=run, loggers=[logger] if logger else [], signals=signals)
            with resources(run.path, metrics.batch_size, "metrics.batch_size"):
                model = module.ema.model
                network = parts.network and parts.network.to(model.device)
                options = {"seed": config["seed"], "ema": True, "note": log_line}
                result = evaluate_run(model, parts.eval_data, run, metrics, network, **options)
            if logger:
                values = {name: entry["value"] for name, entry in result["metrics"].items()}
                logger.log_metrics({**values, "images": module.images}, step=module.images)
        except BaseException as error:
            if isinstance(error, ScoresNotSavedError):
                show(error.result)
            with contextlib.suppress(OSError, ResourceError):  # the disk may be full
                run.update_status(state="failed", why=one_line(f"{type(error).__name__}: {error}").removesuffix(":"))
                if logger:
                    parts.logger_factory.close(logger, failed=True)
            raise
        if logger:
            parts.logger_factory.close(logger, failed=False)
        run.update_status(state="done", why=None)
    show(result)
    print(f"run: {run.path}", flush=True)
    return run.path


def _fitting(parts: Parts, settings: TrainerSettings, seed: int, path: Path) -> Callable[..., None]:
    """Return ``fit`` of a module with its pictures and interim scores, without run, loggers and signals.

    Args:
        parts: of the training.
        settings: of the trainer.
        seed: of interim scores.
        path: where files are written.
    """
    from genzoo.evaluation.scores import interim
    from genzoo.model import GenerativeModel
    from genzoo.training.fit import fit

    has_samples = isinstance(parts.module.model, GenerativeModel)

    def score(model: Any) -> dict[str, float | None]:
        with resources(path, parts.metrics.batch_size, "metrics.batch_size"):
            return interim(model, parts.eval_data, parts.metrics, settings.score_samples, parts.network, seed)

    def draw(model: Any, picture: Path) -> None:
        draw_grid(model, parts.eval_data.data, picture)

    return functools.partial(
        fit,
        parts.module,
        draw=draw if has_samples else None,
        grids=settings.grids,
        saves=settings.saves,
        save_seconds=settings.save_seconds,
        score=score,
        scores=settings.scores if has_samples else 0,
        accelerator="gpu" if parts.device == "cuda" else "cpu",
        devices=settings.devices,
        nodes=settings.nodes,
        precision=settings.precision,
    )


def _facts(parts: Parts, family: str) -> dict[str, Any]:
    """Return what a run's status holds about its model, data and machine."""
    import torch

    return {
        "model": family,
        "threads": torch.get_num_threads(),
        "allocator": tune(),
        "device": parts.device,
        "gpu": gpu_facts(torch.device(parts.device)),
        "data_sha256": parts.eval_data.data.sha256,
        "classes": class_names(parts.eval_data.data),
        **({"tokenizer_sha256": tokenizer.sha256} if (tokenizer := tokenizer_of(parts)) else {}),
    }


def tokenizer_of(parts: Parts) -> Any:
    """Return the tokenizer of the captions on which the model is conditioned, or None."""
    return parts.eval_data.data.tokenizer if parts.module.model.condition is not None else None


def draw_grid(model: Any, data: Any, path: Path, n: int = 64) -> None:
    """Draw samples of a model: a grid of images, or a scatter plot beside the data."""
    from genzoo.data.pictures import as_bytes, captioned_grid, grid, save_png, save_scatter
    from genzoo.numerics.random import SampleStreams
    from genzoo.runs import write_atomically

    was_training, file = model.training, io.BytesIO()
    model.eval()
    if data.levels is None:
        n = 2000
        rng = SampleStreams(0, range(n), device=model.device)
        save_scatter(file, model.sample(n, rng=rng).x, data.test.x[:n])
    else:
        has_captions = data.tokenizer is not None and model.condition is not None
        n = min(n, CAPTIONED) if has_captions else n
        rng = SampleStreams(0, range(n), device=model.device)
        y = model.conditioner.distinct(n)
        images = as_bytes(model.sample(n, y, rng=rng).x.float(), data.levels)
        save_png(file, captioned_grid(images, data.tokenizer.decode(y)) if has_captions else grid(images, columns=8))
    write_atomically(path, file.getvalue())
    model.train(was_training)
