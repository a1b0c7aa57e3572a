"""Output files of commands: a PNG, an .npz, or a folder of PNGs whose older samples are replaced."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genzoo.errors import UsageError
from genzoo.runs import check_writable, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from genzoo.event import EventSpec

CAPTIONS = "captions.jsonl"  # in a folder of samples
SAMPLE_NAME = re.compile(r"\d{6,}\.png")  # in a folder of samples
SUFFIXES = (".png", ".npz", "")  # "" for a folder


def check_out(out: Path, suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Check that the output can be written, before any computation.

    Args:
        out: the file or folder.
        suffixes: that the command writes; "" for a folder.

    Raises:
        ValueError: naming the cause.
    """
    if out.suffix not in suffixes:
        files = " or ".join(f"a {suffix}" for suffix in suffixes if suffix)
        raise UsageError(f"out={out}: must be {files}{', or a folder without a suffix' if '' in suffixes else ''}")
    if not out.parent.is_dir():
        raise UsageError(f"out={out}: there is no directory {out.parent}")
    if out.exists() and out.is_dir() == bool(out.suffix):
        raise UsageError(f"out={out}: is an existing {'folder' if out.is_dir() else 'file'}")
    if out.is_dir():
        older_samples(out)
    check_writable(out if out.is_dir() else out.parent, f"out={out}")


def check_format(out: Path, event: EventSpec) -> None:
    """Check that samples of an event can be written into a file of this kind.

    Raises:
        UsageError: naming the formats that can.
    """
    from genzoo.data.pictures import CHANNELS

    if event.levels is not None and out.suffix != ".npz" and event.shape[0] not in CHANNELS:
        raise UsageError(f"out={out}: images of {event.shape[0]} channels need an .npz; a PNG has 1 or 3")
    if event.levels is None and not out.suffix:
        raise UsageError(f"out={out}: vectors need a .png or an .npz")


def older_samples(out: Path) -> list[Path]:
    """List the samples of an earlier call in a folder, which will be replaced; hidden files are ignored.

    Raises:
        UsageError: if the folder contains any other file.
    """
    from genzoo.data.pictures import is_marked

    found = sorted(path for path in out.iterdir() if not path.name.startswith(".") and path.name != CAPTIONS)
    others = [path.name for path in found if not (SAMPLE_NAME.fullmatch(path.name) and is_marked(path))]
    if others:
        raise UsageError(
            f"out={out}: contains files not written by genzoo sample, such as {others[0]} ({len(others)} in total): "
            "choose a new or an empty folder"
        )
    return found


def write_samples(
    out: Path,
    x: Tensor,
    levels: int | None,
    y: Tensor | None = None,
    columns: int | None = None,
    captions: Sequence[str] | None = None,
) -> None:
    """Write samples as a grid or scatter plot, an .npz with ``samples`` and optionally ``y`` and ``captions``, or one PNG each.

    A grid of images with captions has the captions above them, a folder the file captions.jsonl.

    Args:
        out: checked by ``check_out`` and ``check_format``.
        x: images on [-1, 1] or vectors, (n, *shape).
        levels: of images, stored as uint8 (n, H, W, C); None for vectors.
        y: conditions of the samples, (n, ...).
        columns: of a grid.
        captions: of the samples.
    """
    import numpy as np

    from genzoo.data.pictures import as_bytes, captioned_grid, grid, save_png, save_scatter

    file = io.BytesIO()
    images = as_bytes(x.float(), levels) if levels is not None else None
    if out.suffix == ".npz":
        conditions: dict[str, Any] = {} if y is None else {"y": y.cpu().numpy()}
        conditions |= {} if captions is None else {"captions": np.array(captions)}
        np.savez(file, samples=x.numpy() if images is None else images, **conditions)
    elif images is None:
        save_scatter(file, x)
    elif out.suffix == ".png":
        save_png(file, grid(images, columns) if captions is None else captioned_grid(images, captions, columns))
    else:
        out.mkdir(exist_ok=True)
        for path in older_samples(out):
            path.unlink()
        (out / CAPTIONS).unlink(missing_ok=True)
        for i, image in enumerate(images):
            file = io.BytesIO()
            save_png(file, image, marked=True)
            write_atomically(out / f"{i:06d}.png", file.getvalue(), durable=False)
        if captions is not None:
            lines = [json.dumps({"file": f"{i:06d}.png", "caption": text}) for i, text in enumerate(captions)]
            write_atomically(out / CAPTIONS, "\n".join([*lines, ""]).encode())
    if out.suffix:
        write_atomically(out, file.getvalue())
