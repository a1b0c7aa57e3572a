"""Sheets of events, rows by columns, as a grid, an animation over the columns, plots of vectors, or an array."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from genzoo.cli.output import check_format, check_out
from genzoo.runs import write_atomically

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from genzoo.data.dataset import KnownDensity
    from genzoo.event import EventSpec

SUFFIXES = (".png", ".gif", ".mp4", ".npz")
ANIMATED = (".gif", ".mp4")


class Sheet(NamedTuple):
    """Events in rows and columns."""

    x: Tensor  # (rows, columns, *shape), on the CPU
    levels: int | None  # of images; None for vectors
    data: Tensor | None = None  # examples of vectors, (M, D), for the extent of plots
    density: KnownDensity | None = None  # of vectors
    titles: list[str] | None = None  # of the columns, in plots of vectors
    points: Literal["curves", "clouds"] = "curves"  # what the rows of vectors are joined to in a .png
    loop: bool = True  # whether an animation runs back from the last column


def check_sheet(out: Path, event: EventSpec, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Check that a sheet can be written, before any computation.

    Raises:
        ValueError: with a one-line message.
    """
    from genzoo.data.animation import check_animation

    check_out(out, suffixes)
    check_animation(out.suffix)
    check_format(out, event)


def is_animated(out: Path) -> bool:
    """Whether the output shows the columns one after another."""
    return out.suffix in ANIMATED


def write_sheet(out: Path, sheet: Sheet, **arrays: Any) -> None:
    """Write a sheet.

    Args:
        out: a file that ``check_sheet`` accepts.
        sheet: its events.
        arrays: further arrays of an .npz, beside ``samples``: images as uint8, (rows, columns, H, W, C), or vectors.
    """
    import numpy as np

    from genzoo.data.pictures import grid, save_png
    from genzoo.data.plots import save_curves, save_point_panels

    file = io.BytesIO()
    if out.suffix == ".npz":
        samples = sheet.x.numpy() if sheet.levels is None else _bytes(sheet.x, sheet.levels)
        np.savez(file, samples=samples, **arrays)
    elif is_animated(out):
        _save_animation(file, out.suffix, sheet)
    elif sheet.levels is not None:
        save_png(file, grid(_bytes(sheet.x, sheet.levels).reshape(-1, *_image_shape(sheet.x)), sheet.x.shape[1]))
    elif sheet.points == "clouds":
        assert sheet.data is not None
        save_point_panels(file, sheet.x.transpose(0, 1), sheet.data, sheet.density, sheet.titles)
    else:
        assert sheet.data is not None
        save_curves(file, sheet.x, sheet.data, sheet.density)
    write_atomically(out, file.getvalue())


def _save_animation(file: io.BytesIO, suffix: str, sheet: Sheet) -> None:
    from genzoo.data.animation import forward, save_gif, save_mp4, there_and_back
    from genzoo.data.pictures import grid
    from genzoo.data.plots import moving_points

    if sheet.levels is not None:
        images = _bytes(sheet.x, sheet.levels)
        frames = [grid(images[:, i]) for i in range(images.shape[1])]
    else:
        assert sheet.data is not None
        frames = moving_points(sheet.x.transpose(0, 1), sheet.data, sheet.density, sheet.titles)
    order, milliseconds = (there_and_back if sheet.loop else forward)(len(frames))
    save = save_gif if suffix == ".gif" else save_mp4
    save(file, [frames[i] for i in order], milliseconds)


def _image_shape(x: Tensor) -> tuple[int, int, int]:
    C, H, W = x.shape[-3:]
    return H, W, C


def _bytes(x: Tensor, levels: int) -> np.ndarray:
    """Convert images on [-1, 1], (rows, columns, C, H, W), to uint8, (rows, columns, H, W, C)."""
    from genzoo.data.pictures import as_bytes

    return as_bytes(x.flatten(0, 1).float(), levels).reshape(*x.shape[:2], *_image_shape(x))
