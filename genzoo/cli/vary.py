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

ANIMATED_STEPS = 25


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

    out = Path(config["out"])
    opened = open_model(config)
    model = variations.varied_model(opened.prior if isinstance(opened, GuidedModel) else opened)
    check_sheet(out, model.event)
    if config["invert"] and isinstance(opened, GuidedModel):
        raise UsageError("invert: the noise of an image is that of the model without guidance; omit guidance")
    if is_animated(out) and config["to"] is None and config["text"] is None:
        raise UsageError(f"out={out}: variations have no order to be animated in: use a .png or an .npz")
    given = [read(config, key, model).to(model.device) for key in ("image", "to") if config[key] is not None]
    texts = None
    if config["text"] is not None:
        texts = _condition(config, "from_text", model), _condition(config, "text", model)
        if torch.equal(*texts):
            raise UsageError("from_text, text: are equal, and have no difference to follow")
    with full_float32():
        drawn, nfe = variations.vary(
            model,
            *given[:1],
            to=given[1] if len(given) > 1 else None,
            texts=texts,
            n=config["n"],
            steps=config["steps"] or (ANIMATED_STEPS if is_animated(out) else variations.STEPS),
            strength=config["strength"],
            invert=config["invert"],
            seed=config["seed"],
            batch_size=config["batch_size"],
        )
    shown = drawn
    if not is_animated(out):
        ends = [x.float().cpu().expand(len(drawn), 1, *model.shape) for x in given]
        shown = torch.cat([ends[0], drawn, *ends[1:]], dim=1)
    write_sheet(out, Sheet(shown, model.levels, shown.flatten(0, 1) if model.levels is None else None))
    work = f"{nfe} evaluations each" if nfe else "by the ODE from its own noise"
    print(f"{_said(config, *drawn.shape[:2])}, {work}: {out}")


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


def _condition(config: dict[str, Any], key: str, model: ImageEmbedding) -> Tensor:
    """Encode the text of a key for a model of captions, or the name of a class, (*condition.shape).

    Raises:
        UsageError: for a text that is empty or too long, and an unknown class.
    """
    import torch

    from genzoo.conditions import ClassLabels
    from genzoo.labels import class_names, class_number

    text = str(config[key])
    if not isinstance(model.condition, ClassLabels):
        return text_conditions(Path(config["run"]), model, [text]).y[0].to(model.device)
    try:
        label = class_number(int(text) if text.isdigit() else text, model.condition.n, class_names(config["run"]))
    except UsageError as error:
        raise UsageError(str(error).replace("label=", f"{key}=", 1)) from error
    return torch.tensor(label, device=model.device)


def _said(config: dict[str, Any], rows: int, columns: int) -> str:
    if config["to"] is not None:
        return f"{_paths(rows)} of {columns} points on the great circle from {config['image']} to {config['to']}"
    if config["text"] is not None:
        return f"{_paths(rows)} of {columns} points from {config['from_text']!r} to {config['text']!r}"
    return f"{rows * columns} variations of {config['image']}"


def _paths(rows: int) -> str:
    return "1 path" if rows == 1 else f"{rows} paths"
