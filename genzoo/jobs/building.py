"""Checks of data, model and optimiser before a training, and the description of a model by its data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from genzoo.errors import REFUSALS, UsageError, one_line

CLASS_BYTES = 2**16  # of the names of all classes that a run keeps


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
