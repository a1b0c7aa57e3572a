"""``python -m genzoo interpolate``: decoded points between pairs of latents, of examples or of draws from the prior."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.cli.examples import PRIOR, Examples, open_examples
from genzoo.cli.sheets import Sheet, check_sheet, is_animated, write_sheet
from genzoo.cli.trained import on_run, open_model, plot_background, prior_latents, source_of_latents
from genzoo.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from genzoo.model import GenerativeModel

STEPS, ANIMATED_STEPS = 9, 25


@on_run
def interpolate(config: dict[str, Any]) -> None:
    """Interpolate between pairs of latents, a row each.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    from genzoo import explore, latents

    out, n, size = Path(config["out"]), config["n"], config["batch_size"]
    model = open_model(config)
    check_sheet(out, model.event)
    latents.check_continuous(model, "interpolation")
    source = source_of_latents(config, model)
    if source == PRIOR:
        (start, end), y = prior_latents(config, model, n, 2)
    else:
        first, second = _pairs(open_examples({**config, "examples": source}, model, None), config, model)
        y = first.y
        start, end = (explore.encode(model, side.x, side.y, batch_size=size) for side in (first, second))
    steps = config["steps"] or (ANIMATED_STEPS if is_animated(out) else STEPS)
    x = explore.interpolate(model, start, end, steps, y, batch_size=size).transpose(0, 1)
    data, density = plot_background(config, model, x)
    write_sheet(out, Sheet(x, model.levels, data, density))
    path = "on great circles" if latents.has_normal_prior(model) else "on lines, as the prior is learned"
    of = "draws from the prior" if source == PRIOR else "latents of examples"
    print(f"{len(x)} interpolations of {steps} points {path}, between {of}: {out}")


def _pairs(found: Examples, config: dict[str, Any], model: GenerativeModel) -> tuple[Examples, Examples]:
    """Return the starts and the ends of n pairs of consecutive examples, of one class each if the model is conditional."""
    import torch

    from genzoo.cli.examples import SPLITS, permutation

    order = torch.arange(len(found.x))
    if config["examples"] in (None, *SPLITS):
        order = permutation(len(found.x), config["seed"])
    pairs: list[tuple[int, int]] = []
    waiting: dict[Any, int] = {}  # the example of each condition that has no partner yet
    for i in order.tolist():
        key = None if found.y is None else tuple(_flat(found.y[i]))
        if key in waiting:
            pairs.append((waiting.pop(key), i))
        else:
            waiting[key] = i
        if len(pairs) == config["n"]:
            break
    if not pairs:
        of = "" if found.y is None else " of one condition, as the model is conditional"
        raise UsageError(
            f"examples={config['examples'] or 'test'}: there are no two examples{of} to interpolate between"
        )
    return found.take([a for a, _ in pairs]), found.take([b for _, b in pairs])


def _flat(y: Tensor) -> list[float]:
    return y.flatten().tolist()
