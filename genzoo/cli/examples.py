"""Examples that commands encode: a split of a run's data, a folder of images, or an array."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from genzoo.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from genzoo.data import DataSet
    from genzoo.model import GenerativeModel

SPLITS = ("train", "validation", "test")
PRIOR = "prior"  # draws of latents in place of examples


class Examples(NamedTuple):
    """Examples in the form of a model's data, on the CPU."""

    x: Tensor  # images on [-1, 1] or vectors, (N, *shape)
    y: Tensor | None  # conditions of a conditional model
    labels: Tensor | None  # known conditions, also of an unconditional model

    def take(self, rows: Any) -> Examples:
        """Return some rows."""
        return Examples(*(None if part is None else part[rows] for part in self))  # type: ignore[arg-type]


def run_dataset(config: dict[str, Any], model: GenerativeModel) -> DataSet:
    """Load the data of a run, and check that they are those of its model.

    Raises:
        ValueError: with a one-line message, for a run without data, or data of another shape or condition.
    """
    from genzoo.jobs.notes import note
    from genzoo.jobs.run_data import build_data, data_section, has_changed
    from genzoo.runs import Run

    run = Run(config["run"])
    data = build_data(run, data_section(run), config["trust"])
    for line in data.notes:
        note(line)
    if has_changed(run, data):
        note(
            f"warning: run={run.path}: the data or their split have changed; test images may be among the training images"
        )
    if data.event != model.event:
        raise UsageError(f"run={run.path}: its data are {data.event}, and its model is of {model.event}")
    if model.condition is not None and data.condition != model.condition:
        raise UsageError(f"run={run.path}: the condition of its data is {data.condition}, not {model.condition}")
    return data


def split_of(data: DataSet, name: str, model: GenerativeModel) -> Examples:
    """Return a split in the form of a model's data.

    Raises:
        UsageError: for an empty split.
    """
    from genzoo.distributions.discretization import bin_center

    split = getattr(data, name)
    if split is None or not len(split.x):
        raise UsageError(f"examples={name}: the {name} split is empty")
    x = split.x if data.levels is None else bin_center(split.x, data.levels)
    return Examples(x.to(model.dtype), split.y if model.condition else None, split.y)


def open_examples(config: dict[str, Any], model: GenerativeModel, n: int | None, *, needed: int = 1) -> Examples:
    """Read the examples of ``examples=``, ``label=`` and ``seed=``.

    Example i of a split is a function of the seed and i; files keep their order.

    Args:
        config: of the command.
        model: whose form the examples get.
        n: number of examples, fewer if there are not as many; None for all, in the order of the data.
        needed: smallest number.

    Raises:
        ValueError: with a one-line message, for missing or unsuitable files, unknown classes, and too few examples.
    """
    from genzoo.cli.trained import class_indices

    source = config["examples"]
    if source in SPLITS:
        data = run_dataset(config, model)
        found = split_of(data, source, model)
        if n is not None:
            found = found.take(permutation(len(found.x), config["seed"]))
        found = of_classes(found, config["label"], data.classes)
    else:
        found = _read(Path(source), model)
        labels = class_indices(config, model) if config["label"] is not None and model.condition else None
        found = _labelled(found, labels, config["label"], source, model)
    if n is not None:
        found = found.take(slice(n))
    if len(found.x) < needed:
        raise UsageError(f"examples={source}: holds {len(found.x)} examples, and {needed} are needed")
    return found


def permutation(size: int, seed: int) -> Tensor:
    """Return the order in which a seed chooses examples of a split, (size,) int64."""
    import torch

    from genzoo.numerics.random import generator

    return torch.randperm(size, generator=generator("examples", seed))


def of_classes(found: Examples, label: Any, names: Sequence[str]) -> Examples:
    """Return the examples of the classes of ``label=``, all without it.

    Raises:
        UsageError: for data without classes, and an unknown class.
    """
    if label is None:
        return found
    import torch

    from genzoo.labels import class_numbers

    if not names or found.labels is None:
        raise UsageError(f"label={label}: the data have no classes")
    return found.take(torch.isin(found.labels, torch.tensor(class_numbers(label, len(names), names))))


def _read(path: Path, model: GenerativeModel) -> Examples:
    """Read a folder of images, or an array with its conditions ``y``."""
    from genzoo.data.arrays import array_names, read_array
    from genzoo.data.pictures import read_samples
    from genzoo.distributions.discretization import bin_center, from_bytes
    from genzoo.jobs.notes import note

    x = read_samples(path, model.shape, model.levels, note, "examples")
    if model.levels is not None:
        x = bin_center(from_bytes(x, model.levels), model.levels)
    labels = None
    if path.is_file() and "y" in array_names(path):
        labels = read_conditions(read_array(path, ("y",), "examples"), len(x), path, model)
    return Examples(x.to(model.dtype), labels if model.condition else None, labels)


def read_conditions(array: Any, n: int, path: Path, model: GenerativeModel) -> Tensor:
    """Convert the conditions of a file to those of a model, (N, ...).

    Raises:
        UsageError: for another number of them, or for values that are not among the conditions of the model.
    """
    import torch

    if array.dtype.kind not in "iuf" or not array.ndim or len(array) != n:
        raise UsageError(f"{path}: y holds {array.dtype} {array.shape}, not {n} numbers or vectors of numbers")
    y = torch.from_numpy(array.astype("float32" if array.dtype.kind == "f" else "int64"))
    if model.condition is not None:
        try:
            model.conditioner.check(y, n)
        except ValueError as error:
            raise UsageError(f"{path}: {error}") from error
    return y


def _labelled(found: Examples, labels: list[int] | None, label: Any, source: str, model: GenerativeModel) -> Examples:
    """Apply ``label=`` to the examples of a file: a choice where they have classes, else the class of all of them."""
    import torch

    if label is None:
        if model.condition is not None and found.y is None:
            raise UsageError(
                f"examples={source}: the model is conditional: set the class of all by label=, or store y in an .npz"
            )
        return found
    if labels is None:
        raise UsageError(f"label={label}: this model has no classes, and the examples come from a file")
    if found.labels is not None:
        return found.take(torch.isin(found.labels, torch.tensor(labels)))
    if len(labels) > 1:
        raise UsageError(f"label={label}: one class for all examples of {source}, which have no y")
    y = torch.full((len(found.x),), labels[0])
    return Examples(found.x, y, y)
