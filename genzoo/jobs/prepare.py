"""Building what a configuration describes: data, model, optimiser, evaluator, and the module that trains the model."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from genzoo.config.instantiate import build
from genzoo.devices import pick_device, pick_precision
from genzoo.errors import REFUSALS, UsageError, one_line
from genzoo.jobs.notes import note
from genzoo.jobs.processes import check_processes, rank_of, threads_of_each
from genzoo.jobs.resume import check_parents, checked_status
from genzoo.runs import Run
from genzoo.training.settings import TrainerSettings

CLASS_BYTES = 2**16  # of the names of all classes that a run keeps


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
    settings, seed = TrainerSettings(**config["trainer"]), config["seed"]
    threads = settings.threads or threads_of_each(settings.devices)
    if old:  # whatever the run's files ask for
        threads = min(checked_status(old).get("threads") or threads, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    device = pick_device(settings.accelerator, "trainer.accelerator")
    check_processes(settings, device)
    precision = config["trainer"]["precision"] = pick_precision(settings.precision, device)
    deterministic(settings.deterministic)

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
    learning_rate = make(settings.learning_rate, "trainer.learning_rate")
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
    if rank_of(settings.devices) == 0:
        for line in [*data.notes, *unseen_classes(data)]:
            note(line)
    network = network or pick()  # one that nobody asked for by name may be missing, which is said
    check_optimizer(optimizer)  # torch imports its compiler for the first step, which takes seconds
    subject = EvalData(data, config["data"]["name"], config["data"]["flip"])

    from genzoo.training.module import GenerativeModule

    if data.train.y is not None:
        model.conditioner.fit(data.train.y)
    if precision == "64-true":
        model.double()
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    module = GenerativeModule(
        model,
        optimizer,
        Batches(data.train, settings.batch_size, seed, subject.flip, workers=settings.workers),
        budget,
        learning_rate,
        ema_decay=settings.ema,
        clip=settings.clip,
        seed=seed,
        scaler=torch.amp.GradScaler(device) if precision == "16-mixed" else None,
        compiled=settings.compile,
        channels_last=settings.channels_last,
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
