"""Trained models of commands: loading by a configuration, and conditions by class names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.devices import pick_device
from genzoo.environment import usable_cores
from genzoo.errors import UsageError

if TYPE_CHECKING:
    from genzoo.model import GenerativeModel


def open_model(config: dict[str, Any]) -> GenerativeModel:
    """Load the model of ``run=DIR`` with the weights, device, sampler and guidance of a configuration.

    Raises:
        ValueError: with a one-line message, for an invalid run or an unsuitable sampler or guidance.
    """
    import torch

    from genzoo.loading import load

    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))  # OpenMP ignores CPU quotas of containers
    return load(
        Path(config["run"]),
        ema=config["ema"],
        device=pick_device(config["device"]),
        sampler=config.get("sampler"),
        guidance=config.get("guidance"),
        trust=config["trust"],
    )


def class_indices(config: dict[str, Any], model: GenerativeModel) -> list[int] | None:
    """Return the classes of ``label=``, by index or by the class names of the run; None without labels.

    Raises:
        UsageError: for an unknown class, a class without training images, and a model without classes.
    """
    if config["label"] is None:
        return None
    from genzoo.conditions import ClassLabels
    from genzoo.labels import class_names, class_numbers

    n = model.condition.n if isinstance(model.condition, ClassLabels) else 0
    names = class_names(config["run"])
    found = class_numbers(config["label"], n, names)
    check_trained(found, model, names)
    return found


def check_trained(labels: Sequence[int], model: GenerativeModel, names: Sequence[str]) -> None:
    """Check that the training data had examples of each class.

    Raises:
        UsageError: naming the first class without any.
    """
    for label in labels:
        if model.conditioner.probs[label] == 0:
            raise UsageError(f"label={names[label] if names else label}: no training image has this class")
