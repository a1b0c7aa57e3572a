"""Grids of images and scatter plots as PNG files, and readers of samples."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genzoo.data.arrays import read_array
from genzoo.data.dataset import DataError
from genzoo.data.decoding import FORMATS, SUFFIXES, decoded, list_pictures, upright
from genzoo.distributions.discretization import to_bytes

if TYPE_CHECKING:
    from PIL import Image

CHANNELS = (1, 3)  # grey or colour
MARGIN = 32  # tolerance of the range check, in grey levels
MARK = b"tEXtSoftware\0genzoo"  # PNG text chunk of ``save_png(marked=True)``
PANELS = 4  # pairs of coordinates in a plot of vectors


def as_bytes(x: Tensor, levels: int) -> np.ndarray:
    """Convert images on [-1, 1], (B, C, H, W), to uint8 (B, H, W, C)."""
    return to_bytes(x.detach().cpu(), levels).permute(0, 2, 3, 1).contiguous().numpy()


def grid(images: np.ndarray, columns: int | None = None, min_side: int = 56, gap: int = 2) -> np.ndarray:
    """Tile images, (B, H, W, C) -> (H', W', C); tiny ones are enlarged to at least ``min_side`` pixels."""
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    scale = max(1, math.ceil(min_side / min(height, width)))
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    rows = math.ceil(n / columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def captioned_grid(
    images: np.ndarray, captions: Sequence[str], columns: int | None = None, side: int = 96, gap: int = 6
) -> np.ndarray:
    """Tile images with their captions above them, (B, H, W, C) -> (H', W', 3).

    A caption of a whole row stands once, above the row. Small images are enlarged to at least ``side`` pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    n, height, width, _ = images.shape
    columns = columns or min(n, 8)
    scale = max(1, math.ceil(side / min(height, width)))
    height, width = height * scale, width * scale
    font = ImageFont.load_default(12)
    rows = [range(start, min(start + columns, n)) for start in range(0, n, columns)]
    whole = all(len({captions[i] for i in row}) == 1 for row in rows)
    room = (len(rows[0]) if whole else 1) * (width + gap) - gap  # pixels of a line of text
    texts = [_wrapped(caption, font, room) for caption in captions]
    line = 15
    canvas = Image.new("RGB", (len(rows[0]) * (width + gap) + gap, 0), "white")
    parts = []
    for row in rows:
        above = line * max(len(texts[i]) for i in row) + 4
        part = Image.new("RGB", (canvas.width, above + height + gap), "white")
        draw = ImageDraw.Draw(part)
        for place, i in enumerate(row):
            left = gap + place * (width + gap)
            if not whole or not place:
                draw.multiline_text((left, 2), "\n".join(texts[i]), fill="black", font=font, spacing=2)
            image = Image.fromarray(images[i] if images.shape[3] == 3 else images[i, ..., 0])
            part.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, above))
        parts.append(np.asarray(part))
    return np.concatenate(parts)


def _wrapped(text: str, font: Any, room: int) -> list[str]:
    """Break a text into lines of at most ``room`` pixels, at most six; longer words are cut."""
    lines: list[str] = []
    for word in "".join(c if c.isprintable() else " " for c in text).split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= room:
            lines[-1] = joined
            continue
        while len(word) > 1 and font.getlength(word) > room:
            word = word[:-1]
        lines.append(word)
    return lines[:6]


def save_png(path: Path | BinaryIO, image: np.ndarray, marked: bool = False) -> None:
    """Write one image, (H, W, C) uint8 with one or three channels.

    Args:
        path: the file.
        image: the pixels.
        marked: whether to add the text chunk that ``is_marked`` looks for.

    Raises:
        DataError: for another number of channels.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if image.shape[-1] not in CHANNELS:
        raise DataError(f"images of {image.shape[-1]} channels cannot be shown: a PNG has 1 (grey) or 3 (colour)")
    info = PngInfo()
    if marked:
        info.add_text("Software", "genzoo")
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.save(path, format="PNG", optimize=True, pnginfo=info)


def is_marked(path: Path) -> bool:
    """Whether a file was written by ``save_png(marked=True)``; links are not followed."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return MARK in file.read(128)
    except OSError:
        return False


def save_scatter(path: Path | BinaryIO, samples: Tensor, truth: Tensor | None = None) -> None:
    """Plot vectors, (N, D), and optionally data beside them on equal axes.

    D = 1 is a histogram, D = 2 a scatter plot, D > 2 scatter plots of neighbouring pairs of the first coordinates.
    """
    samples, truth = samples.detach().cpu(), None if truth is None else truth.detach().cpu()
    D = samples.shape[1]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clouds = [("samples", samples)] + ([("data", truth)] if truth is not None else [])
    pairs = [(0, 1)] if D <= 2 else [(i, i + 1) for i in range(min(D - 1, PANELS))]
    beside = len(pairs) == 1  # samples and data side by side, else one row each
    rows, columns = (1, len(clouds)) if beside else (len(clouds), len(pairs))
    figure = Figure(figsize=(4 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    frame = truth if truth is not None else samples
    low, high = frame.aminmax(dim=0)
    margin = 0.1 * (high - low).clamp(min=1e-6)
    low, high = low - margin, high + margin
    for i, (name, points) in enumerate(clouds):
        for j, (first, second) in enumerate(pairs):
            axes = figure.add_subplot(rows, columns, i * len(pairs) + j + 1)
            axes.set(title=name, xlim=(float(low[first]), float(high[first])))
            if D == 1:
                weights = np.full(len(points), 1 / len(points))
                axes.hist(points[:, 0].numpy(), bins=80, range=axes.get_xlim(), weights=weights, color="#1f4e79")
                continue
            axes.scatter(points[:, first], points[:, second], s=2, alpha=0.5, linewidths=0, color="#1f4e79")
            axes.set_ylim(float(low[second]), float(high[second]))
            if D == 2:
                axes.set_aspect("equal")
            else:
                axes.set(xlabel=f"coordinate {first}", ylabel=f"coordinate {second}")
    figure.savefig(path, format="png", dpi=100)


def read_samples(
    path: Path,
    shape: Sequence[int],
    levels: int | None,
    note: Callable[[str], None] = lambda _: None,
    key: str = "samples",
) -> Tensor:
    """Read samples of any program: a folder of image files, sorted by name, or an .npz or .npy array.

    Args:
        path: the folder or the file.
        shape: of one example of the data.
        levels: of the data; None for vectors.
        note: called with a summary of the files read and skipped.
        key: configuration key of the path, for messages.

    Returns:
        Images, uint8 (N, C, H, W), or vectors, float32 (N, D). Grey images are expanded to the channels of the data.

    Raises:
        DataError: for a missing or invalid folder or file, or a shape that does not match the data.
    """
    from PIL import Image

    if path.is_dir():
        if levels is None:
            raise DataError(f"{key}={path}: vectors come in an .npz or .npy file")
        names = (listing := list_pictures(path)).names
        if not names:
            raise DataError(f"{key}={path}: no {', '.join(SUFFIXES)} files ({listing.others})")
        note(f"{key}={path}: {len(names)} images, {listing.others}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return torch.stack([read_picture(path / name, shape) for name in names])
    if not path.is_file():
        raise DataError(f"{key}={path}: no such folder or file")
    array = read_array(path, ("samples", "arr_0", "images"), key)
    if array.ndim and not len(array):
        raise DataError(f"{key}={path}: holds no samples, an array of shape {array.shape}")
    if levels is None:
        if array.ndim != 2 or array.shape[1:] != tuple(shape) or array.dtype.kind != "f":
            raise DataError(f"{key}={path}: holds {array.dtype} {array.shape}, not floats (N, {shape[0]})")
        with np.errstate(over="ignore"):
            points = array.astype(np.float32)
        if not np.isfinite(points).all():
            raise DataError(f"{key}={path}: holds NaN, infinity, or numbers beyond float32")
        return torch.from_numpy(points)
    C, H, W = shape
    if array.ndim == 3:
        array = array[..., None]
    fits = array.dtype == np.uint8 and array.ndim == 4 and array.shape[1:3] == (H, W) and array.shape[3] in (1, C)
    if not fits:
        hint = ""
        if array.dtype.kind in "fiu" and array.dtype != np.uint8 and array.size:
            hint = f"; convert values {array.min():.4g}..{array.max():.4g} to uint8 0..255"
        raise DataError(f"{key}={path}: holds {array.dtype} {array.shape}, not uint8 (N, {H}, {W}, {C}){hint}")
    return torch.from_numpy(array).permute(0, 3, 1, 2).expand(-1, C, -1, -1).contiguous()


class RangeMismatch(NamedTuple):
    """A mismatch between the ranges of samples and data."""

    text: str
    certain: bool  # whether even a poor generator cannot explain it


def check_range(x: Tensor, real: Tensor, levels: int | None) -> RangeMismatch | None:
    """Compare the range of samples with that of the data, to detect a wrong scale.

    Args:
        x: samples, (N, ...) bytes or vectors.
        real: data in the same form, (M, ...).
        levels: of the data; None for vectors.

    Returns:
        The range found and the range expected; None if they match.
    """
    low, high = x.min().item(), x.max().item()
    flat = real.flatten(1)
    lowest, highest = flat.amin(1).double(), flat.amax(1).double()  # of each example
    lows, highs = lowest.min().item(), highest.max().item()
    found = f"their values lie in {low:.4g}..{high:.4g}, those of the data in {lows:.4g}..{highs:.4g}"
    if low == high and lows != highs:
        return RangeMismatch(f"all their values are {low:.4g}, those of the data lie in {lows:.4g}..{highs:.4g}", True)
    margin = 0 if levels is None else MARGIN
    beyond = ((lowest < low - margin) | (highest > high + margin)).double().mean().item()
    if levels is None:
        return (
            RangeMismatch(f"{found}, most of whose points are outside: is the scale right?", False)
            if beyond > 0.5
            else None
        )
    expected = "bytes of 0..255 are expected" + (f", the {levels} levels stretched over them" if levels < 256 else "")
    if high <= (levels - 1 if levels < 256 else 1) < highs:
        return RangeMismatch(f"{found}: {expected}", True)
    kinds, of_data = (torch.bincount(side.flatten(), minlength=256).nonzero().flatten().tolist() for side in (x, real))
    if len(kinds) <= 3 < min(len(of_data), 8):
        return RangeMismatch(f"they hold no values but {', '.join(map(str, kinds))}: {expected}", True)
    return RangeMismatch(f"{found}, most of whose images leave that range: {expected}", False) if beyond > 0.5 else None


def read_picture(path: Path, shape: Sequence[int], key: str | None = None) -> Tensor:
    """Read a picture of a given size.

    Args:
        path: the file.
        shape: (C, H, W); colours are converted to grey and grey to colours.
        key: of the configuration, for messages.

    Returns:
        uint8 (C, H, W).

    Raises:
        DataError: for another size, or a file that is no picture.
    """
    C, H, W = shape
    name, needed = (path, "the data are") if key is None else (f"{key}={path}", "needed are")

    def pixels(image: Image.Image) -> np.ndarray:
        flat = upright(image, C)
        if flat.size != (W, H):
            raise DataError(f"{name}: is {flat.size[0]}x{flat.size[1]}, {needed} {W}x{H}: resize it first")
        return np.array(flat)

    return torch.from_numpy(decoded(path, FORMATS, pixels).reshape(H, W, C)).permute(2, 0, 1)
