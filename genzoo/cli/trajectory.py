"""``python -m genzoo trajectory``: the states of a sampler from noise to data, as an animation or step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.cli.sheets import Sheet, check_sheet, is_animated, write_sheet
from genzoo.cli.trained import chosen_conditions, on_run, open_model, plot_background

if TYPE_CHECKING:
    from torch import Tensor

    from genzoo.diffusion.trajectory import SamplingPath
    from genzoo.model import GenerativeModel

IMAGES, ROWS, POINTS = 16, 8, 1000  # default numbers of samples: images in an animation, rows of a .png, points
FRAMES, COLUMNS = 60, 10  # default numbers of states: at most, in an animation, and in a .png


@on_run
def trajectory(config: dict[str, Any]) -> None:
    """Draw the samples of ``genzoo sample`` with the states of their sampler.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    from genzoo import explore
    from genzoo.diffusion.trajectory import path_denoiser

    out = Path(config["out"])
    model = open_model(config)
    check_sheet(out, model.event)
    denoiser = path_denoiser(model)
    chosen = chosen_conditions(config, model)
    each = config["n"] or (POINTS if model.levels is None else ROWS if out.suffix == ".png" else IMAGES)
    y = None if chosen is None else chosen.y.repeat_interleave(each, dim=0)
    path = explore.trajectory(
        model,
        each * (len(chosen.y) if chosen else 1),
        y,
        frames=config["frames"] or (COLUMNS if out.suffix == ".png" else FRAMES),
        estimate=config["show"] == "estimate",
        seed=config["seed"],
        batch_size=config["batch_size"],
    )
    x = path.x if path.estimate is None else path.estimate
    in_time = denoiser.path.schedule.coordinates == "time"
    noise = path.times if in_time else path.noise
    data, density = plot_background(config, model, path.x[-1])
    name = "t" if in_time else "sigma/alpha"
    titles = [f"{name} = {level:.3g}" for level in noise]
    shown = x if out.suffix == ".npz" else _displayed(model, path, x)
    levels = None if out.suffix == ".npz" else model.levels  # states are no images: an array holds them as they are
    sheet = Sheet(shown.transpose(0, 1), levels, data, density, titles, points="clouds", loop=False)
    write_sheet(out, sheet, times=path.times, noise=path.noise)
    columns = "" if is_animated(out) else f", {name} = {', '.join(f'{level:.3g}' for level in noise)}"
    print(f"{x.shape[1]} samples, {path.nfe} evaluations each, {len(x)} states{columns}: {out}")


def _displayed(model: GenerativeModel, path: SamplingPath, x: Tensor) -> Tensor:
    """Scale states of images to unit noise, ``x_t / sqrt(alpha^2 + sigma^2)``: no change for variance-preserving paths.

    States of a variance-exploding path would show nothing but saturated pixels. Estimates, vectors, and the decoded states of
    latent models are on the scale of the data.
    """
    import torch

    from genzoo.diffusion.denoiser import PathModel
    from genzoo.diffusion.guidance import GuidedModel

    if isinstance(model, GuidedModel):
        model = model.prior
    if model.levels is None or path.estimate is not None or not isinstance(model, PathModel):
        return x
    c = model.path.schedule.at(torch.tensor(path.times, dtype=torch.float64))
    scale = torch.sqrt(c.alpha**2 + c.sigma**2).to(x)
    return x / scale.view(-1, *[1] * (x.ndim - 1))
