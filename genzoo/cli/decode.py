"""``python -m genzoo decode``: events of latents, the inverse of ``encode``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.cli.examples import read_conditions
from genzoo.cli.output import check_format, check_out, write_samples
from genzoo.cli.trained import chosen_conditions, on_run, open_model
from genzoo.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from genzoo.model import GenerativeModel


@on_run
def decode(config: dict[str, Any]) -> None:
    """Decode the latents of a file into a grid, an .npz, or a folder of PNGs.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    from genzoo import explore

    out = Path(config["out"])
    check_out(out)
    model = open_model(config)
    check_format(out, model.event)
    z, y = _read_latents(config, model)
    x = explore.decode(model, z, y, batch_size=config["batch_size"])
    write_samples(out, x, model.levels, y)
    print(f"{len(x)} latents decoded: {out}")


def _read_latents(config: dict[str, Any], model: GenerativeModel) -> tuple[Tensor, Tensor | None]:
    """Read latents and the conditions of a conditional model."""
    import numpy as np
    import torch

    from genzoo.data.arrays import array_names, read_array
    from genzoo.latents import latent_space
    from genzoo.model import Discrete

    path, space = Path(config["latents"]), latent_space(model)
    if not path.is_file():
        raise UsageError(f"latents={path}: no such file")
    array = read_array(path, ("z", "latents", "arr_0"), "latents")
    kinds, kind = ("iu", "integers") if isinstance(space, Discrete) else ("f", "floats")
    sides = ", ".join(map(str, space.shape))
    if array.dtype.kind not in kinds or array.ndim == 0 or array.shape[1:] != space.shape or not len(array):
        raise UsageError(f"latents={path}: holds {array.dtype} {array.shape}, not {kind} (N, {sides})")
    if isinstance(space, Discrete):
        if not 0 <= int(array.min()) <= int(array.max()) < space.levels:
            raise UsageError(
                f"latents={path}: holds {array.min()}..{array.max()}, and the codes are 0..{space.levels - 1}"
            )
        z = torch.from_numpy(array.astype(np.int64))
    else:
        if not np.isfinite(array).all():
            raise UsageError(f"latents={path}: holds NaN or infinity")
        z = torch.from_numpy(array.astype(np.float32))
    chosen = chosen_conditions(config, model)
    if model.condition is None:
        return z, None
    if chosen is not None:
        if len(chosen.y) > 1:
            raise UsageError(f"label={config['label']}: one class for all latents")
        return z, chosen.y.expand(len(z), *chosen.y.shape[1:])
    if "y" not in array_names(path):
        raise UsageError(f"latents={path}: the model is conditional: set label= or text=, or store y in the .npz")
    return z, read_conditions(read_array(path, ("y",), "latents"), len(z), path, model)
