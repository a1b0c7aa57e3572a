"""``python -m genzoo [train]``: train a model into a run directory, or go on with one, and say what came out."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from genzoo.commands.allocator import tune
from genzoo.commands.config import (
    REFUSALS,
    UsageError,
    build,
    check,
    check_section,
    one_line,
    pick_device,
    pick_precision,
    targets,
)
from genzoo.runs import OF_NO_MATTER, ResourceError, Run, RunError, job_id, now, provenance, storing

PROCESSES = ("devices", "nodes", "workers")  # keys of the trainer that start processes


def train(config: dict[str, Any], choices: dict[str, str]) -> Path | None:
    """Train as a validated configuration says, score the result, and return the run directory.

    Of several processes that train together the first one alone writes, scores and returns it.

    Args:
        config: plain types.
        choices: what was chosen of each group, for the name of the run.

    Raises:
        UsageError, RunError: for what the user can mend; no directory has been made then.
        NonFiniteError: when a loss or gradient was not finite.
        ResourceError: when the disk, the memory or a helping process gave out.
        Stopped: by a signal; a checkpoint was written first.
    """
    old = to_go_on(config, choices)
    with resources(Path(config["outputs"]), config["trainer"]["batch_size"]):
        if old is None:
            own = {key: value for key, value in config.items() if key not in ("resume", "trust")}
            return _train(own, choices["model"])
        status = its_status(old)
        if status.get("state") == "done":
            print(f"done before: {old.path}", flush=True)
            return old.path
        old.check_writable()  # sooner than data are read
        # What came with a run is trusted with less than what is typed, even if it should be the same.
        trust = [*config.get("trust", []), *(targets(config) if config["resume"] == "auto" else ())]
        its = its_config(old)
        began = {name: its["trainer"].get(name, 1) for name in ("devices", "nodes")}
        for key in OF_NO_MATTER:  # of what is typed, or of a whole command line
            section, _, name = key.rpartition(".")
            if section != "trainer":
                continue
            if name in PROCESSES:  # which nobody else's file starts
                its[section].pop(name, None)
            if name in config[section] and (name in PROCESSES or key in config.get("said", OF_NO_MATTER)):
                its[section][name] = config[section][name]
        for name, was in began.items():
            if was != (present := its["trainer"].get(name, 1)):
                tell(
                    f"began with trainer.{name}={was}, goes on with {present}: say trainer.{name}={was} for as many processes"
                )
        return _train(its, str(status.get("model")), old, trust)


def to_go_on(config: dict[str, Any], choices: dict[str, str]) -> Run | None:
    """Find the run that ``resume=`` asks for: the one that is named, or the latest of the very same job.

    Raises:
        RunError: where the named one is none.
    """
    from genzoo.commands.sweep import best_of, runs_of

    resume = config.get("resume")
    if resume == "auto":
        return best_of(list(runs_of(config, choices)))
    if resume and not Path(resume, "config.yaml").is_file():
        raise RunError(f"resume={resume}: no run directory, it has no config.yaml")
    return Run(resume) if resume else None


def its_config(run: Run) -> dict[str, Any]:
    """Read the configuration that a run was trained by, as far as it is one.

    Raises:
        RunError: naming the key that is wrong.
    """
    try:
        return check("train", run.config)
    except UsageError as error:
        raise RunError(f"{run.path / 'config.yaml'}: {error}") from error


def its_status(run: Run) -> dict[str, Any]:
    """Read the status of a run that is gone on with, which may be anybody's: what is taken over of it is what it should be.

    Raises:
        RunError: naming the key that is wrong.
    """
    try:
        return check_section("status", run.status)
    except UsageError as error:
        raise RunError(f"{run.path / 'status.json'}: {str(error).removeprefix('status.')}") from error


class Parts(NamedTuple):
    """What a configuration describes."""

    module: Any  # a GenerativeModule
    subject: Any  # the data, as scores take them
    network: Any  # what features are made of, or None
    records: Any  # a kind of logger, or None
    device: str


def prepare(config: dict[str, Any], old: Run | None, trust: list[str]) -> Parts:
    """Make what a configuration describes.

    What is cheap to refuse is refused before the data are read, and before Lightning is imported, which takes seconds.

    Args:
        config: of the run; its precision, if it is chosen by the machine, is written into it.
        old: the run to go on with, if it is not a new one.
        trust: classes that its configuration may name besides genzoo's own.

    Raises:
        UsageError: for what does not do, naming the key.
    """
    import torch

    from genzoo.commands.load import check_sampler
    from genzoo.commands.score import Subject, check_settings, pick_network
    from genzoo.data.loader import Batches
    from genzoo.model import GenerativeModel
    from genzoo.prob.random import seed_of
    from genzoo.training.budget import Budget

    make = functools.partial(build, trusted=old is None, trust=trust)
    settings, seed = config["trainer"], config["seed"]
    devices, nodes = settings.get("devices", 1), settings.get("nodes", 1)
    threads = settings["threads"] or max(len(os.sched_getaffinity(0)) // devices, 1)
    if old:  # whatever the run's files ask for
        threads = min(its_status(old).get("threads") or threads, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    device = pick_device(settings["accelerator"], "trainer.accelerator")
    check_processes(devices, nodes, settings["batch_size"], device)
    settings["precision"] = pick_precision(settings["precision"], device)

    torch.manual_seed(seed_of("weights", seed))
    model = make(config["model"], "model")
    if not isinstance(model, GenerativeModel):
        raise UsageError(f"model._target_={config['model'].get('_target_')}: is no generative model")
    check_sampler(model)
    learning_rate = make(settings["learning_rate"], "trainer.learning_rate")
    check_settings(model, config["metrics"])
    records = make(config["logger"], "logger") if config.get("logger") else None
    pick = functools.partial(pick_network, config["metrics"], config["data"], needed=False)
    network = pick() if config["metrics"]["features"] != "auto" else None
    budget = Budget(*(config["budget"][name] for name in ("images", "seconds", "flops")))
    optimizer = make(config["optimizer"], "optimizer")
    check_optimizer(optimizer, step=False)
    data = make(config["data"]["source"], "data")
    check_data(config["data"], data, model)
    network = network or pick()  # one that nobody asked for by name may be missing, which is said
    check_optimizer(optimizer)  # torch imports its compiler for the first step, which takes seconds
    subject = Subject(data, config["data"]["name"], config["data"]["flip"])

    from genzoo.training.module import GenerativeModule

    if model.num_classes:
        model.class_probs.copy_(torch.bincount(data.train.y, minlength=model.num_classes).float() / len(data.train.y))
    if settings["precision"] == "64-true":
        model.double()
    if settings.get("channels_last"):
        model.to(memory_format=torch.channels_last)
    module = GenerativeModule(
        model,
        optimizer,
        Batches(data.train, settings["batch_size"], seed, subject.flip, workers=settings.get("workers", 0)),
        budget,
        learning_rate,
        settings["ema"],
        settings["clip"],
        seed,
        torch.amp.GradScaler(device) if settings["precision"] == "16-mixed" else None,
        settings.get("compile", False),
        settings.get("channels_last", False),
    )
    return Parts(module, subject, network, records, device)


def _train(config: dict[str, Any], family: str, old: Run | None = None, trust: Sequence[str] = ()) -> Path | None:
    """Train a new run, or go on with an old one.

    Args:
        config: of the run.
        family: what was chosen as ``model=``.
        old: the run to go on with.
        trust: classes that its configuration may name besides genzoo's own.
    """
    import torch

    from genzoo.commands.evaluate import show
    from genzoo.commands.load import inlined
    from genzoo.commands.score import interim, score

    job = job_id(config)
    module, subject, network, records, device = prepare(config, old, list(trust))

    from genzoo.training.callbacks import fit
    from genzoo.training.checkpoints import clean, newest_whole
    from genzoo.training.stopping import Signals

    quiet()
    config = {**config, "model": inlined(config["model"])}
    settings, metrics, seed = config["trainer"], config["metrics"], config["seed"]
    devices, nodes = settings.get("devices", 1), settings.get("nodes", 1)
    training = functools.partial(
        fit,
        module,
        draw=lambda model, path: draw_grid(model, subject.data, path),
        grids=settings["grids"],
        saves=settings["saves"],
        save_seconds=settings.get("save_seconds"),
        score=lambda model: interim(model, subject, metrics, settings["score_samples"], network, seed),
        scores=settings["scores"],
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=devices,
        nodes=nodes,
        precision=settings["precision"],
    )
    weights = sum(tensor.nbytes for tensor in module.model.state_dict().values())
    newest = functools.partial(newest_whole, limit=16 * weights + 2**24)  # bytes of state, at most
    if rank_of(devices) > 0 and devices * nodes > 1:  # one of those that help the first one, which alone writes
        if old and (found := newest(old.path / "checkpoints", lambda _: None, remove_damaged=False)):
            restore(module, *found)
        with Signals() as signals:
            training(run=None, loggers=[], signals=signals)
        return None

    run = old or Run.create(config["outputs"], f"{family}-{config['data']['name']}", config, job)
    facts = {
        "model": family,
        "threads": torch.get_num_threads(),
        "allocator": tune(),
        "device": device,
        "data_sha256": sha256_of(subject.data),
    }
    with run.training(), Signals() as signals:
        if old:
            run.complete()
            clean(run.path / "checkpoints")
            go_on(module, run, facts, newest(run.path / "checkpoints", tell))
        run.update_status(**facts, state="running", why=None, pid=os.getpid(), diagnostics=module.diagnostics())
        logger = None
        try:
            logger = records.open(run, config) if records else None
            with resources(run.path, settings["batch_size"]):
                training(run=run, loggers=[logger] if logger else [], signals=signals)
                network = network and network.to(module.ema.model.device)
                result = score(module.ema.model, subject, run, metrics, network, seed=seed, ema=True)
            if logger:
                values = {name: entry["value"] for name, entry in result["metrics"].items()}
                logger.log_metrics({**values, "images": module.images}, step=module.images)
        except BaseException as error:
            with contextlib.suppress(OSError, ResourceError):  # on a full disk this cannot be written either
                run.update_status(state="failed", why=one_line(f"{type(error).__name__}: {error}").removesuffix(":"))
                if records and logger:
                    records.close(logger, failed=True)
            raise
        if records and logger:
            records.close(logger, failed=False)
        run.update_status(state="done", why=None)
    show(result)
    print(f"run: {run.path}", flush=True)
    return run.path


def check_processes(devices: int, nodes: int, batch_size: int, device: str) -> None:
    """Refuse processes that a machine or a batch has no place for.

    Raises:
        UsageError: naming the key.
    """
    import torch

    if device == "cuda" and devices > torch.cuda.device_count():
        raise UsageError(f"trainer.devices={devices}: this machine has {torch.cuda.device_count()} GPUs")
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or devices * nodes)
    if started != devices * nodes:
        raise UsageError(f"trainer.devices={devices}, trainer.nodes={nodes}: {started} processes were started in all")
    if batch_size % (devices * nodes):
        raise UsageError(
            f"trainer.batch_size={batch_size}: cannot be shared equally among {devices * nodes} processes "
            "(trainer.devices times trainer.nodes)"
        )


def rank_of(devices: int) -> int:
    """Return which of the processes that train together this one is, as torchrun, SLURM or Lightning have told it.

    Args:
        devices: processes on each machine.
    """
    told = os.environ
    if "RANK" in told:
        return int(told["RANK"])
    if "LOCAL_RANK" in told:
        return int(told.get("NODE_RANK", "0")) * devices + int(told["LOCAL_RANK"])
    return int(told.get("SLURM_PROCID", "0")) if "SLURM_STEP_NUM_TASKS" in told else 0


def go_on(module: Any, run: Run, facts: dict[str, Any], found: tuple[Path, Any] | None) -> None:
    """Restore a run's newest checkpoint, and forget what it has recorded since.

    Args:
        module: as it is at the start of a run.
        run: the run.
        facts: of this machine and these data.
        found: the checkpoint and what it holds; None for the start.

    Raises:
        RunError: where the data are others, or the checkpoint belongs to another model.
    """
    status = its_status(run)
    if status.get("data_sha256") not in (None, facts["data_sha256"]):
        raise RunError(f"run={run.path}: the data have changed since it began; a new run is needed")
    if found:
        run.forget_events(restore(module, *found))
    else:
        run.forget_events(0)
    here, versions, machine = provenance(), status.get("versions") or {}, status.get("machine") or {}
    began = {**versions, "cpu": machine.get("cpu"), "device": status.get("device"), "threads": status.get("threads")}
    goes_on = {**here["versions"], "cpu": here["machine"]["cpu"], **{k: facts[k] for k in ("device", "threads")}}
    for name, was in began.items():
        if was is not None and was != goes_on.get(name):
            tell(f"began with {name} {was}, goes on with {goes_on.get(name)}: the last bits may differ")
    tell(f"goes on from step {module.steps}" + (f" of {module.planned_steps}" if module.planned_steps else ""))
    times = status.get("resumed") or []
    run.update_status(resumed=[*times, {"at": now(), "step": module.steps, "command": here["command"]}])


def restore(module: Any, checkpoint: Path, contents: Any) -> int:
    """Give a module what a checkpoint holds; return how many bytes of events there were.

    Raises:
        RunError: naming the file that is not of this model and this training.
    """
    from genzoo.training.restored import StateError, whole

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


def sha256_of(data: Any) -> str | None:
    """Name the images and classes of a data set by their SHA-256; points, which are made anew each time, have no such name."""
    if data.levels is None:
        return None
    digest = hashlib.sha256()
    for split in (data.train, data.test):
        for tensor in (split.x, split.y):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def tell(message: str) -> None:
    """Say something about the run that is no part of its result."""
    print(f"genzoo: {one_line(message)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def resources(path: Path, batch_size: int) -> Iterator[None]:
    """Name what has given out: the memory, the disk, or a process that loads data.

    Args:
        path: the run.
        batch_size: of the training.

    Raises:
        ResourceError: with what may help.
    """
    import torch

    try:
        with storing(path):
            yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, ResourceError):
            raise
        text = one_line(error)
        smaller = f"try trainer.batch_size={max(batch_size // 2, 1)}"
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise ResourceError(
                f"out of memory with trainer.batch_size={batch_size}: {smaller}: {text[:200]}"
            ) from error
        if "DataLoader worker" in text:
            raise ResourceError(f"a process that loads data has died: {text[:200]}; say trainer.workers=0") from error
        raise


def quiet() -> None:
    """Keep Lightning's notices, which speak of settings that are ours, out of the user's terminal."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")
    warnings.filterwarnings("ignore", category=UserWarning, message=r".*(num_workers|dataloader|lr_scheduler).*")


def check_optimizer(optimizer: Any, *, step: bool = True) -> None:
    """Refuse an optimiser that does not take its arguments, or that cannot step by itself.

    Args:
        optimizer: makes one from a list of parameters.
        step: whether it is tried too.

    Raises:
        UsageError: in the optimiser's own words.
    """
    import torch

    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    try:
        made = optimizer([weight])
        if step:
            made.step()
    except REFUSALS as error:
        raise UsageError(f"optimizer: {one_line(error)}") from error


def check_data(config: dict[str, Any], data: Any, model: Any) -> None:
    """Refuse data that are not what their configuration says, and a model whose classes are not theirs.

    Raises:
        UsageError: saying what differs.
    """
    from genzoo.commands.schema import wrong_classes
    from genzoo.data.dataset import DataSet

    if not isinstance(data, DataSet):
        raise UsageError(f"data.source._target_={config['source'].get('_target_')}: makes no data set")
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
    from genzoo.runs import write_atomically

    was_training, file = model.training, io.BytesIO()
    model.eval()
    if data.levels is None:
        n = 2000
        rng = SampleStreams(0, range(n), device=model.device)
        save_scatter(file, model.sample(n, rng=rng).x, data.test.x[:n])
    else:
        rng = SampleStreams(0, range(n), device=model.device)
        y = torch.arange(n, device=model.device) % model.num_classes if model.num_classes else None
        save_png(file, grid(as_bytes(model.sample(n, y, rng=rng).x.float(), data.levels), columns=8))
    write_atomically(path, file.getvalue())
    model.train(was_training)
