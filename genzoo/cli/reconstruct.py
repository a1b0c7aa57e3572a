"""``python -m genzoo reconstruct``: examples above their reconstructions, with the mean squared error."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.cli.examples import open_examples
from genzoo.cli.output import check_format, check_out
from genzoo.cli.trained import on_run, open_model, require_encoder
from genzoo.runs import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from genzoo.model import GenerativeModel

COLUMNS = 8


@on_run
def reconstruct(config: dict[str, Any]) -> None:
    """Reconstruct examples, and print the mean squared error over them.

    Raises:
        ValueError: with a one-line message, for invalid input.
        ResourceError: if memory or disk are full.
    """
    from genzoo import explore

    out, size = Path(config["out"]), config["batch_size"]
    check_out(out, (".png", ".npz"))
    model = open_model(config)
    check_format(out, model.event)
    require_encoder(model)
    found = open_examples(config, model, config["n"])
    z = explore.encode(model, found.x, found.y, batch_size=size)
    x = explore.decode(model, z, found.y, batch_size=size)
    write_atomically(out, _rendered(out, found.x, x, model.levels))
    print(f"{len(x)} reconstructions, {_errors(model, found.x, x, z)}: {out}")


def _errors(model: GenerativeModel, x: Tensor, x_hat: Tensor, z: Tensor) -> str:
    """Describe the error of reconstructions: of bytes on [0, 1] for images, as ``evaluate`` does, or of vectors."""
    from genzoo.diffusion.denoiser import Denoiser
    from genzoo.distributions.discretization import to_bytes
    from genzoo.metrics.reconstruction import reconstruction_error
    from genzoo.model import Bijective, Decoder, Discrete

    if model.levels is None:
        parts = [f"mse {float((x - x_hat).double().square().mean()):.4g}"]
    else:
        a, b = (to_bytes(side, model.levels) for side in (x, x_hat))
        parts = [f"{name} {score.value:.4g}" for name, score in reconstruction_error(a, b).items()]
    if isinstance(model, Bijective | Denoiser):  # invertible, up to rounding or the tolerance of the solver
        parts.append(f"largest error {float((x - x_hat).abs().max()):.2g} on the scale of the data")
    if isinstance(model, Decoder) and isinstance(model.latent, Discrete):
        parts.append(f"{len(z.unique())} of {model.latent.levels} codes used")
    return ", ".join(parts)


def _rendered(out: Path, x: Tensor, x_hat: Tensor, levels: int | None) -> bytes:
    """Render a grid of originals above reconstructions, a plot of vectors, or an .npz with ``data`` and ``samples``."""
    import numpy as np

    from genzoo.data.pictures import as_bytes, grid, save_png
    from genzoo.data.plots import save_pairs

    file = io.BytesIO()
    sides = [side.numpy() if levels is None else as_bytes(side.float(), levels) for side in (x, x_hat)]
    if out.suffix == ".npz":
        np.savez(file, data=sides[0], samples=sides[1])
    elif levels is None:
        save_pairs(file, x_hat, x)
    else:
        width = min(COLUMNS, len(x))
        blank = np.full((-len(x) % width, *sides[0].shape[1:]), 255, dtype=np.uint8)
        rows = [np.concatenate([side, blank]).reshape(-1, width, *side.shape[1:]) for side in sides]
        save_png(file, grid(np.stack(rows, axis=1).reshape(-1, *sides[0].shape[1:]), width))
    return file.getvalue()
