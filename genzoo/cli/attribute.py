"""``python -m genzoo attribute``: images of a class, moved towards another one by the difference of the mean latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.cli.examples import Examples, of_classes, permutation, run_dataset, split_of
from genzoo.cli.sheets import Sheet, check_sheet, write_sheet
from genzoo.cli.trained import on_run, open_model, require_encoder
from genzoo.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from genzoo.data import DataSet
    from genzoo.model import GenerativeModel


@on_run
def attribute(config: dict[str, Any]) -> None:
    """Add the direction from the class ``minus`` to the class ``plus``, by training images, to test images of ``minus``.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    import torch

    from genzoo import explore, latents

    out, size = Path(config["out"]), config["batch_size"]
    model = open_model(config)
    check_sheet(out, model.event)
    latents.check_continuous(model, "an attribute direction")
    require_encoder(model)
    data = run_dataset(config, model)
    plus, minus = (_class(config, key, data) for key in ("plus", "minus"))
    if plus == minus:
        raise UsageError(f"plus={config['plus']}, minus={config['minus']}: are one class, and the direction is zero")

    def encoded(split: str, label: int, n: int) -> tuple[Tensor, Examples]:
        found = _chosen(data, split, label, n, config["seed"], model)
        return explore.encode(model, found.x, found.y, batch_size=size), found

    without, having = (encoded("train", label, config["images"])[0] for label in (minus, plus))
    direction = latents.attribute_direction(without, having)
    z, found = encoded("test", minus, config["n"])
    strengths = torch.tensor(config["strengths"])
    x = explore.add_direction(model, z, direction, strengths, found.y, batch_size=size).transpose(0, 1)
    write_sheet(out, Sheet(x, model.levels, data.test.x if model.levels is None else None, data.density))
    names = [data.classes[label] for label in (minus, plus)]
    print(
        f"{len(x)} examples of {names[0]} towards {names[1]} by {', '.join(f'{s:g}' for s in config['strengths'])} times a "
        f"direction of length {float(direction.norm()):.3g}, from {len(without)} and {len(having)} examples: {out}"
    )


def _class(config: dict[str, Any], key: str, data: DataSet) -> int:
    """Return the index of a class by its key.

    Raises:
        UsageError: for data without classes, and an unknown class.
    """
    from genzoo.labels import class_number

    if not data.classes:
        raise UsageError(f"{key}={config[key]}: the data have no classes, whose means would define a direction")
    try:
        return class_number(config[key], len(data.classes), data.classes)
    except UsageError as error:
        raise UsageError(str(error).replace("label=", f"{key}=").replace("this model has", "the data have")) from error


def _chosen(data: DataSet, split: str, label: int, n: int, seed: int, model: GenerativeModel) -> Examples:
    """Choose at most ``n`` examples of a class."""
    found = split_of(data, split, model)
    found = of_classes(found.take(permutation(len(found.x), seed)), label, data.classes).take(slice(n))
    if not len(found.x):
        raise UsageError(f"class {data.classes[label]}: the {split} split has no example of it")
    return found
