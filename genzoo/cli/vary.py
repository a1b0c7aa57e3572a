"""``python -m genzoo vary``: variations of a picture, paths between two, and changes that two texts describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.cli.sheets import Sheet, check_sheet, is_animated, write_sheet
from genzoo.cli.trained import on_run, open_model, text_conditions
from genzoo.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from genzoo.model import ImageEmbedding

VARIATIONS, ROWS = 8, 3  # default numbers: of variations, and of rows of a path
STEPS, ANIMATED_STEPS = 8, 25


@on_run
def vary(config: dict[str, Any]) -> None:
    """Draw variations by a validated configuration.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    import torch

    from genzoo import variations
    from genzoo.diffusion.guidance import GuidedModel
    from genzoo.numerics.precision import full_float32

    out, size = Path(config["out"]), config["batch_size"]
    opened = open_model(config)
    model = variations.varied_model(opened.prior if isinstance(opened, GuidedModel) else opened)
    check_sheet(out, model.event)
    if config["invert"] and isinstance(opened, GuidedModel):
        raise UsageError("invert: the noise of an image is that of the model without guidance; omit guidance")
    pictures = [read(config, key, model) for key in ("image", "to") if config[key] is not None]
    with torch.no_grad(), full_float32():
        x = torch.stack(pictures).to(model.device)
        e = model.embed_image(x)
        path = _path(config, model, e)
        noise = None
        if config["invert"]:
            noise = model.invert(x, e)
            between = (
                [noise[:1]] * len(path) if len(noise) == 1 else variations.image_path(noise[:1], noise[1:], len(path))
            )
            noise = torch.cat(list(between))
        rows = 1 if config["invert"] else config["n"] or (ROWS if len(path) > 1 else VARIATIONS)
        numbers = [row for row in range(rows) for _ in range(len(path))]
        drawn, nfe = variations.draw(
            model, path.repeat(rows, 1), numbers, noise=noise, seed=config["seed"], batch_size=size
        )
    columns = len(path) if len(path) > 1 else rows
    drawn = drawn.unflatten(0, (-1, columns))
    given = x.float().cpu()[None].expand(len(drawn), *[-1] * (1 + len(model.shape)))
    shown = drawn if is_animated(out) else torch.cat([given[:, :1], drawn, given[:, 1:]], dim=1)
    write_sheet(out, Sheet(shown, model.levels, shown.flatten(0, 1) if model.levels is None else None))
    work = f"{nfe} evaluations each" if nfe else "by the ODE from its own noise"
    print(f"{_said(config, len(drawn), columns)}, {work}: {out}")


def read(config: dict[str, Any], key: str, model: ImageEmbedding) -> Tensor:
    """Read the picture, or the vector, of a key, (*shape).

    Raises:
        UsageError: for a missing file, and one of another kind or size.
    """
    from genzoo.diffusion.inverse import Identity
    from genzoo.editing.task import read_observation

    try:
        value, _ = read_observation(Path(config[key]), Identity(model.shape), model.event)
    except ValueError as error:
        raise UsageError(str(error).replace("image=", f"{key}=", 1)) from error
    return value[0].to(model.dtype)


def _path(config: dict[str, Any], model: ImageEmbedding, e: Tensor) -> Tensor:
    """Return the embeddings of a row, (steps, d), of which there is one for variations."""
    from genzoo import variations

    steps = config["steps"] or (ANIMATED_STEPS if is_animated(Path(config["out"])) else STEPS)
    if config["to"] is not None:
        return variations.image_path(e[:1], e[1:], steps)[:, 0]
    if config["text"] is None:
        if is_animated(Path(config["out"])):
            raise UsageError(f"out={config['out']}: variations have no order to be animated in: use a .png or an .npz")
        return e
    before, after = (model.embed_text(_condition(config, key, model)) for key in ("from_text", "text"))
    try:
        return variations.text_path(e, before, after, steps, config["strength"])[:, 0]
    except ValueError as error:
        raise UsageError(f"from_text, text: {error}") from error


def _condition(config: dict[str, Any], key: str, model: ImageEmbedding) -> Tensor:
    """Encode the text of a key for a model of captions, or the name of a class, (1, *condition.shape).

    Raises:
        UsageError: for a text that is empty or too long, and an unknown class.
    """
    import torch

    from genzoo.conditions import ClassLabels
    from genzoo.labels import class_names, class_number

    text = str(config[key])
    if not isinstance(model.condition, ClassLabels):
        return text_conditions(Path(config["run"]), model, [text]).y.to(model.device)
    try:
        label = class_number(int(text) if text.isdigit() else text, model.condition.n, class_names(config["run"]))
    except UsageError as error:
        raise UsageError(str(error).replace("label=", f"{key}=", 1)) from error
    return torch.tensor([label], device=model.device)


def _said(config: dict[str, Any], rows: int, columns: int) -> str:
    if config["to"] is not None:
        return f"{_paths(rows)} of {columns} points on the great circle from {config['image']} to {config['to']}"
    if config["text"] is not None:
        return f"{_paths(rows)} of {columns} points from {config['from_text']!r} to {config['text']!r}"
    return f"{rows * columns} variations of {config['image']}"


def _paths(rows: int) -> str:
    return "1 path" if rows == 1 else f"{rows} paths"
