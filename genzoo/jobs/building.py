"""Completion of a model's configuration by its data, and checks of data, model and optimizer before training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from genzoo.errors import BUILD_ERRORS, UsageError, one_line

CLASS_BYTES = 2**16  # limit of the class names in a status


def describe_model(config: dict[str, Any], make: Callable[[Any, str], Any]) -> Any:
    """Write the event and the condition of the data into the configuration of the model.

    Args:
        config: of the run.
        make: instantiates a node, given the node and its key.

    Returns:
        The data, if they were loaded to determine their condition; otherwise None.

    Raises:
        UsageError: for data without conditions.
    """
    section, data = config["data"], None
    condition: dict[str, Any] | None = None
    if section.get("conditional"):
        classes = section["num_classes"]
        if not classes:
            data = make_data(section, make)
            found = getattr(data, "condition", None)
            if found is None:
                raise UsageError("data.conditional=true: the data have no classes or conditions")
            condition = {
                "_target_": f"{type(found).__module__}.{type(found).__qualname__}",
                **dataclasses.asdict(found),
            }
        else:
            condition = {"_target_": "genzoo.conditions.ClassLabels", "n": classes}
    event = {"_target_": "genzoo.event.EventSpec", "shape": list(section["shape"]), "levels": section["levels"]}
    config["model"] = {**config["model"], "event": event, "condition": condition}
    return data


def make_data(section: dict[str, Any], make: Callable[[Any, str], Any]) -> Any:
    """Load the data of a configuration, with their validation split.

    Args:
        section: ``data`` of the configuration.
        make: instantiates a node, given the node and its key.

    Returns:
        The data set, or what else the source returns, which ``check_data`` refuses.
    """
    from genzoo.data import DataSet, with_validation

    data = make(section["source"], "data")
    return with_validation(data, section.get("validation", 0.0)) if isinstance(data, DataSet) else data


def check_optimizer(optimizer: Any, *, step: bool = True) -> None:
    """Check that an optimizer accepts its arguments and can step without a closure.

    Args:
        optimizer: constructor, given a list of parameters.
        step: whether to try a step.

    Raises:
        UsageError: with the message of the optimizer.
    """
    import torch

    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((1,), (1, 1))]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    try:
        made = optimizer(weights)
        if step:
            made.step()
    except BUILD_ERRORS as error:
        raise UsageError(f"optimizer: {one_line(error)}") from error


def check_data(config: dict[str, Any], data: Any, model: Any) -> None:
    """Check that the data match their configuration, and the model matches the data.

    Raises:
        UsageError: naming the mismatch.
    """
    from genzoo.data.dataset import DataSet

    if not isinstance(data, DataSet):
        raise UsageError(f"data.source._target_={config['source'].get('_target_')}: does not return a DataSet")
    if not (len(data.train.x) and len(data.test.x)):
        raise UsageError(
            "data: no test images: set data.test_fraction=0.1 or data.test_root, or add a folder test"
            if len(data.train.x)
            else "data: no training images"
        )
    expected, found = tuple(config["shape"]), data.shape
    if expected != found:
        raise UsageError(f"data.shape={list(expected)}: the data have {list(found)}")
    for name in ("levels", "num_classes"):
        expected, found = config[name], getattr(data, name)
        if expected != found and not (name == "num_classes" and expected is None):  # null for folders
            raise UsageError(f"data.{name}={'null' if expected is None else expected}: the data have {found}")
    if model.event != data.event:
        raise UsageError(f"model.event={model.event}: the data have {data.event}")
    if model.condition not in (None, data.condition):
        raise UsageError(f"model.condition={model.condition}: the data have {data.condition}")


def unseen_classes(data: Any) -> Iterator[str]:
    """Yield a warning for each class with test images but no training images."""
    import torch

    if not data.classes or data.train.y is None:
        return
    learned, tested = (
        torch.bincount(split.y, minlength=data.num_classes) if split.y is not None else torch.zeros(data.num_classes)
        for split in (data.train, data.test)
    )
    for name, of_train, of_test in zip(data.classes, learned.tolist(), tested.tolist(), strict=True):
        if not of_train:
            yield f"class {name} has {int(of_test)} test images and no training image: it is never sampled"


def class_names(data: Any) -> list[str]:
    """Class names for a run's status; empty if they exceed ``CLASS_BYTES``."""
    return list(data.classes) if len(json.dumps(data.classes)) <= CLASS_BYTES else []
