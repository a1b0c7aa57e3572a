"""``python -m genzoo [train]``: train a model into a run directory, or go on with one, and say what came out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from genzoo.config.check import check, check_section
from genzoo.config.instantiate import build, targets
from genzoo.console import log_stderr
from genzoo.devices import gpu_facts, pick_device, pick_precision
from genzoo.environment import usable_cores
from genzoo.errors import REFUSALS, UsageError, one_line
from genzoo.jobs.allocator import tune
from genzoo.jobs.notes import note
from genzoo.runs import UNHASHED_KEYS, ResourceError, Run, RunError, claims, job_id, now, provenance, writing

CLASS_BYTES = 2**16  # of the names of all classes that a run keeps
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
    with contextlib.ExitStack() as stack:
        stack.enter_context(resources(Path(config["outputs"]), config["trainer"]["batch_size"]))
        if config.get("resume") == "auto":
            devices = config["trainer"].get("devices", 1)
            stack.enter_context(claimed(config["outputs"], job_id(config), devices, needed=True))
        old = find_resumable(config, choices)
        if old is None:
            own = {key: value for key, value in config.items() if key not in ("resume", "trust")}
            return _train(own, choices["model"])
        status = checked_status(old)
        if status.get("state") == "done":
            print(f"done before: {old.path}", flush=True)
            return old.path
        old.check_writable()  # sooner than data are read
        # What came with a run is trusted with less than what is typed, even if it should be the same.
        trust = [*config.get("trust", []), *(targets(config) if config["resume"] == "auto" else ())]
        its = checked_config(old)
        began = {name: its["trainer"].get(name, 1) for name in ("devices", "nodes")}
        for key in UNHASHED_KEYS:  # of what is typed, or of a whole command line
            section, _, name = key.rpartition(".")
            if section != "trainer":
                continue
            if name in PROCESSES:  # which nobody else's file starts
                its[section].pop(name, None)
            if name in config[section] and (name in PROCESSES or key in config.get("said", UNHASHED_KEYS)):
                its[section][name] = config[section][name]
        for name, was in began.items():
            if was != (present := its["trainer"].get(name, 1)):
                log_line(
                    f"began with trainer.{name}={was}, goes on with {present}: say trainer.{name}={was} for as many processes"
                )
        return _train(its, str(status.get("model")), old, trust)


@contextlib.contextmanager
def claimed(outputs: str, job: str, devices: int, *, needed: bool) -> Iterator[None]:
    """Hold the claim of a job, by which sweeps see that it is being trained, unless a process above this one holds it.

    Args:
        outputs: the folder of all runs.
        job: its name.
        devices: processes on each machine, of which the first one holds it.
        needed: whether to go on where another process holds it, as a run that was asked for twice does.

    Raises:
        RunError: where another process holds a claim that is needed.
    """
    if os.environ.get("GENZOO_CLAIM") == job or rank_of(devices) > 0:
        yield
        return
    path = claims.path_of(outputs, job)
    for _ in range(5 if needed else 1):
        if claim := claims.try_lock(path):
            break
        time.sleep(0.1)  # somebody may only be looking whether its holder has ended
    if claim is None and needed:
        raise RunError(f"resume=auto: this very job is being trained by {claims.owner(path)}")
    before = os.environ.get("GENZOO_CLAIM")
    os.environ["GENZOO_CLAIM"] = job  # for the processes that Lightning starts
    try:
        with claim or contextlib.nullcontext():
            yield
    finally:
        os.environ.pop("GENZOO_CLAIM")
        if before is not None:
            os.environ["GENZOO_CLAIM"] = before


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


class Parts(NamedTuple):
    """What a configuration describes."""

    module: Any  # a GenerativeModule
    subject: Any  # the data, as scores take them
    network: Any  # what features are made of, or None
    records: Any  # a kind of logger, or None
    device: str
    parents: dict[str, Any]  # finished models that training builds on, by the keys of their configurations


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

    from genzoo.data.loader import Batches
    from genzoo.evaluation.density import check_settings
    from genzoo.evaluation.scores import pick_network
    from genzoo.evaluation.settings import EvalData, EvalSettings
    from genzoo.event import EventSpec
    from genzoo.loading import PARENTS, check_sampler, with_parents
    from genzoo.model import GenerativeModel
    from genzoo.numerics.precision import deterministic
    from genzoo.numerics.random import reseed, seed_of
    from genzoo.training.budget import Budget

    make = functools.partial(build, trusted=old is None, trust=trust)
    settings, seed = config["trainer"], config["seed"]
    devices, nodes = settings.get("devices", 1), settings.get("nodes", 1)
    threads = settings["threads"] or threads_of_each(devices)
    if old:  # whatever the run's files ask for
        threads = min(checked_status(old).get("threads") or threads, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    device = pick_device(settings["accelerator"], "trainer.accelerator")
    check_processes(devices, nodes, settings["batch_size"], device)
    settings["precision"] = pick_precision(settings["precision"], device)
    deterministic(settings.get("deterministic", False))

    torch.manual_seed(seed_of("weights", seed))
    reseed(torch.default_generator, "weights", seed)  # of whose seed a CPU takes but 32 bits
    data = None
    if old is None:
        data = describe_model(config, make)
    described, parents = with_parents(config["model"], "model", make, old.path / PARENTS if old else None)
    model = make(described, "model")
    if not isinstance(model, GenerativeModel):
        raise UsageError(f"model._target_={config['model'].get('_target_')}: is no generative model")
    if old:
        check_parents(old, model, parents)
    check_sampler(model)
    learning_rate = make(settings["learning_rate"], "trainer.learning_rate")
    metrics = EvalSettings(**config["metrics"])
    check_settings(model, metrics)
    records = make(config["logger"], "logger") if config.get("logger") else None
    event = EventSpec(config["data"]["shape"], config["data"]["levels"])
    pick = functools.partial(pick_network, metrics, config["data"]["name"], event, needed=False)
    network = pick() if config["metrics"]["features"] != "auto" else None
    budget = Budget(*(config["budget"][name] for name in ("images", "seconds", "flops")))
    optimizer = make(config["optimizer"], "optimizer")
    check_optimizer(optimizer, step=False)
    data = make(config["data"]["source"], "data") if data is None else data
    check_data(config["data"], data, model)
    if rank_of(devices) == 0:
        for line in [*data.notes, *unseen_classes(data)]:
            note(line)
    network = network or pick()  # one that nobody asked for by name may be missing, which is said
    check_optimizer(optimizer)  # torch imports its compiler for the first step, which takes seconds
    subject = EvalData(data, config["data"]["name"], config["data"]["flip"])

    from genzoo.training.module import GenerativeModule

    if data.train.y is not None:
        model.conditioner.fit(data.train.y)
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
        ema_decay=settings["ema"],
        clip=settings["clip"],
        seed=seed,
        scaler=torch.amp.GradScaler(device) if settings["precision"] == "16-mixed" else None,
        compiled=settings.get("compile", False),
        channels_last=settings.get("channels_last", False),
    )
    return Parts(module, subject, network, records, device, parents)


def describe_model(config: dict[str, Any], make: Callable[[Any, str], Any]) -> Any:
    """Write the event and the condition of the data into the configuration of the model.

    Args:
        config: of the run.
        make: builds what a node describes, given the node and its key.

    Returns:
        The data, where they had to be read to know their condition; otherwise None.

    Raises:
        UsageError: for data without conditions.
    """
    section, data = config["data"], None
    condition: dict[str, Any] | None = None
    if section.get("conditional"):
        classes = section["num_classes"]
        if not classes:
            data = make(section["source"], "data")
            found = getattr(data, "condition", None)
            if found is None:
                raise UsageError("data.conditional=true: the data have no classes")
            condition = {
                "_target_": f"{type(found).__module__}.{type(found).__qualname__}",
                **dataclasses.asdict(found),
            }
        else:
            condition = {"_target_": "genzoo.conditions.ClassLabels", "n": classes}
    event = {"_target_": "genzoo.event.EventSpec", "shape": list(section["shape"]), "levels": section["levels"]}
    config["model"] = {**config["model"], "event": event, "condition": condition}
    return data


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


def _train(config: dict[str, Any], family: str, old: Run | None = None, trust: Sequence[str] = ()) -> Path | None:
    """Train a new run, or go on with an old one.

    Args:
        config: of the run.
        family: what was chosen as ``model=``.
        old: the run to go on with.
        trust: classes that its configuration may name besides genzoo's own.
    """
    import torch

    from genzoo.evaluation.records import NotKept
    from genzoo.evaluation.scores import evaluate_run, interim
    from genzoo.evaluation.settings import EvalSettings
    from genzoo.loading import PARENTS, inline_runs
    from genzoo.report.terminal import show

    job = job_id(config)
    module, subject, network, records, device, parents = prepare(config, old, list(trust))

    from genzoo.training.callbacks import fit, take_precomputed
    from genzoo.training.checkpoints import clean, keep_models, latest_valid
    from genzoo.training.stopping import Signals

    quiet()
    config = {**config, "model": inline_runs(config["model"])}
    settings, metrics, seed = config["trainer"], EvalSettings(**config["metrics"]), config["seed"]
    devices, nodes = settings.get("devices", 1), settings.get("nodes", 1)

    def scoring(model: Any) -> dict[str, float | None]:
        with resources(old.path if old else Path(config["outputs"]), metrics.batch_size, "metrics.batch_size"):
            return interim(model, subject, metrics, settings["score_samples"], network, seed)

    training = functools.partial(
        fit,
        module,
        draw=lambda model, path: draw_grid(model, subject.data, path),
        grids=settings["grids"],
        saves=settings["saves"],
        save_seconds=settings.get("save_seconds"),
        score=scoring,
        scores=settings["scores"],
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=devices,
        nodes=nodes,
        precision=settings["precision"],
    )
    weights = sum(tensor.nbytes for tensor in module.model.state_dict().values())
    newest = functools.partial(latest_valid, limit=16 * weights + 2**24)  # bytes of state, at most
    if old:
        take_precomputed(module, old)
    if rank_of(devices) > 0 and devices * nodes > 1:  # one of those that help the first one, which alone writes
        if old and (found := newest(old.path / "checkpoints", lambda _: None, remove_damaged=False)):
            restore(module, *found)
        with Signals() as signals:
            training(run=None, loggers=[], signals=signals)
        return None

    def keep_parents(path: Path) -> None:
        if parents:
            keep_models(path / PARENTS, parents)

    facts = {
        "model": family,
        "threads": torch.get_num_threads(),
        "allocator": tune(),
        "device": device,
        "gpu": gpu_facts(torch.device(device)),
        "data_sha256": subject.data.sha256,
        "classes": class_names(subject.data),
    }
    # A run that is gone on with has the precision that was chosen for it in its configuration, and its job has not.
    began_as = (old and checked_status(old).get("job")) or ""
    held = claimed(
        config["outputs"], began_as if re.fullmatch("[0-9a-f]{64}", began_as) else job, devices, needed=False
    )
    with held, Signals() as signals, contextlib.ExitStack() as stack:
        run = old or Run.create(config["outputs"], f"{family}-{config['data']['name']}", config, job, keep_parents)
        parents.clear()  # the model has those that it needs
        stack.enter_context(run.training())
        if old:
            run.complete()
            clean(run.path / "checkpoints")
            clean(run.path)
            resume(module, run, facts, newest(run.path / "checkpoints", log_line))
        run.update_status(**facts, state="running", why=None, pid=os.getpid(), diagnostics=module.diagnostics())
        logger = None
        try:
            logger = records.open(run, config) if records else None
            with resources(run.path, settings["batch_size"]):
                training(run=run, loggers=[logger] if logger else [], signals=signals)
            with resources(run.path, metrics.batch_size, "metrics.batch_size"):
                network = network and network.to(module.ema.model.device)
                result = evaluate_run(
                    module.ema.model, subject, run, metrics, network, seed=seed, ema=True, note=log_line
                )
            if logger:
                values = {name: entry["value"] for name, entry in result["metrics"].items()}
                logger.log_metrics({**values, "images": module.images}, step=module.images)
        except BaseException as error:
            if isinstance(error, NotKept):
                show(error.result)
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


def threads_of_each(devices: int) -> int:
    """Return how many threads each of the processes on this machine computes with.

    Args:
        devices: processes on this machine; ``OMP_NUM_THREADS`` is a number for each of them.
    """
    return usable_cores() if os.environ.get("OMP_NUM_THREADS") else max(usable_cores() // devices, 1)


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


def unseen_classes(data: Any) -> Iterator[str]:
    """Name the classes that have test images and no training images, of which nothing is learned and nothing drawn."""
    import torch

    if not data.classes or data.train.y is None:
        return
    learned, tested = (
        torch.bincount(split.y, minlength=data.num_classes) if split.y is not None else torch.zeros(data.num_classes)
        for split in (data.train, data.test)
    )
    for name, of_train, of_test in zip(data.classes, learned.tolist(), tested.tolist(), strict=True):
        if not of_train:
            yield f"class {name} has {int(of_test)} test images and no training image: it is never drawn"


def class_names(data: Any) -> list[str]:
    """Return the names of the classes as a run keeps them; none where they would not fit into its status."""
    return list(data.classes) if len(json.dumps(data.classes)) <= CLASS_BYTES else []


def log_line(message: str) -> None:
    """Say something about the run that is no part of its result."""
    log_stderr(one_line(message))


@contextlib.contextmanager
def resources(path: Path, batch_size: int, key: str = "trainer.batch_size") -> Iterator[None]:
    """Name what has given out: the memory, the disk, or a process that loads data.

    Args:
        path: where files are written.
        batch_size: of the work.
        key: where the size of a batch is set.

    Raises:
        ResourceError: with what may help.
        UsageError: for an operator that has no deterministic implementation where one was asked for.
    """
    import torch

    try:
        with writing(path):
            yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, ResourceError):
            raise
        text = one_line(error)
        smaller = f"try {key}={max(batch_size // 2, 1)}"
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise ResourceError(f"out of memory with {key}={batch_size}: {smaller}: {text[:200]}") from error
        if "deterministic implementation" in text:
            raise UsageError(f"trainer.deterministic=true: {text[:200]}") from error
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
    from genzoo.data.dataset import DataSet

    if not isinstance(data, DataSet):
        raise UsageError(f"data.source._target_={config['source'].get('_target_')}: makes no data set")
    if not (len(data.train.x) and len(data.test.x)):
        raise UsageError(
            "data: there are no test images to score on: say data.test_fraction=0.1, data.test_root, or have a folder test"
            if len(data.train.x)
            else "data: there are no training images"
        )
    said, found = tuple(config["shape"]), data.shape
    if said != found:
        raise UsageError(f"data.shape={list(said)}: the data have {list(found)}")
    for name in ("levels", "num_classes"):
        said, found = config[name], getattr(data, name)
        if said != found and not (name == "num_classes" and said is None):  # a folder's are known once it is read
            raise UsageError(f"data.{name}={'null' if said is None else said}: the data have {found}")
    if model.event != data.event:
        raise UsageError(f"model.event={model.event}: the data have {data.event}")
    if model.condition not in (None, data.condition):
        raise UsageError(f"model.condition={model.condition}: the data have {data.condition}")


def draw_grid(model: Any, data: Any, path: Path, n: int = 64) -> None:
    """Draw samples of a model: a grid of images, or a cloud beside the data's."""
    from genzoo.data.pictures import as_bytes, grid, save_png, save_scatter
    from genzoo.numerics.random import SampleStreams
    from genzoo.runs import write_atomically

    was_training, file = model.training, io.BytesIO()
    model.eval()
    if data.levels is None:
        n = 2000
        rng = SampleStreams(0, range(n), device=model.device)
        save_scatter(file, model.sample(n, rng=rng).x, data.test.x[:n])
    else:
        rng = SampleStreams(0, range(n), device=model.device)
        y = model.conditioner.distinct(n)
        save_png(file, grid(as_bytes(model.sample(n, y, rng=rng).x.float(), data.levels), columns=8))
    write_atomically(path, file.getvalue())
    model.train(was_training)
