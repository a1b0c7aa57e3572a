"""Pictures of data: grids of images and clouds of points, as PNG files and arrays."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genzoo.data.arrays import read_array
from genzoo.data.dataset import DataError
from genzoo.data.decoding import FORMATS, SUFFIXES, decoded, list_pictures, upright
from genzoo.distributions.discretization import to_bytes

if TYPE_CHECKING:
    from PIL import Image

CHANNELS = (1, 3)  # of an image that can be shown: grey or colour
MARGIN = 32  # bytes by which images of the data leave the range of samples that may be right
MARK = b"tEXtSoftware\0genzoo"  # in the first bytes of a picture file that ``save_png`` has marked
PANELS = 4  # of pairs of coordinates in a picture of vectors


def as_bytes(x: Tensor, levels: int) -> np.ndarray:
    """Turn images on [-1, 1], (B, C, H, W), into bytes in the order of picture files, (B, H, W, C) uint8."""
    return to_bytes(x.detach().cpu(), levels).permute(0, 2, 3, 1).contiguous().numpy()


def grid(images: np.ndarray, columns: int | None = None, min_side: int = 56, gap: int = 2) -> np.ndarray:
    """Lay images out in rows, (B, H, W, C) -> (rows, columns, C); tiny ones are enlarged to at least ``min_side`` pixels."""
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


def save_png(path: Path | BinaryIO, image: np.ndarray, marked: bool = False) -> None:
    """Write one image, (H, W, C) uint8 with one or three channels.

    Args:
        path: the file.
        image: the bytes.
        marked: whether the file says that genzoo has written it, by which ``is_marked`` knows it.

    Raises:
        DataError: for another number of channels, of which PNG would make transparency or nothing.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if image.shape[-1] not in CHANNELS:
        raise DataError(f"images of {image.shape[-1]} channels cannot be shown: a picture has 1 (grey) or 3 (colour)")
    info = PngInfo()
    if marked:
        info.add_text("Software", "genzoo")
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.save(path, format="PNG", optimize=True, pnginfo=info)


def is_marked(path: Path) -> bool:
    """Whether a file is a picture that ``save_png`` has marked; links are not followed."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return MARK in file.read(128)
    except OSError:
        return False


def save_scatter(path: Path | BinaryIO, samples: Tensor, truth: Tensor | None = None) -> None:
    """Draw vectors, (N, D), and under them as many of the data's where these are given, on equal axes.

    Points of the plane are one cloud, numbers a histogram, and vectors of more coordinates the clouds of neighbouring pairs of
    the first few.
    """
    samples, truth = samples.detach().cpu(), None if truth is None else truth.detach().cpu()
    D = samples.shape[1]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clouds = [("samples", samples)] + ([("data", truth)] if truth is not None else [])
    pairs = [(0, 1)] if D <= 2 else [(i, i + 1) for i in range(min(D - 1, PANELS))]
    beside = len(pairs) == 1  # a cloud and the data's, side by side; else a row each
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
                share = np.full(len(points), 1 / len(points))
                axes.hist(points[:, 0].numpy(), bins=80, range=axes.get_xlim(), weights=share, color="#1f4e79")
                continue
            axes.scatter(points[:, first], points[:, second], s=2, alpha=0.5, linewidths=0, color="#1f4e79")
            axes.set_ylim(float(low[second]), float(high[second]))
            if D == 2:
                axes.set_aspect("equal")
            else:
                axes.set(xlabel=f"coordinate {first}", ylabel=f"coordinate {second}")
    figure.savefig(path, format="png", dpi=100)


def read_samples(
    path: Path, shape: Sequence[int], levels: int | None, note: Callable[[str], None] = lambda _: None
) -> Tensor:
    """Read what any program has drawn: a folder of pictures, in the order of their names, or an array, .npz or .npy.

    Args:
        path: the folder or the file.
        shape: of one event of the data.
        levels: of the data; None for points.
        note: called with what was read, and what was passed over, of a folder.

    Returns:
        Bytes, (N, C, H, W) uint8, or vectors, (N, D) float32. Grey pictures of colour data are spread over the channels.

    Raises:
        DataError: for what is no such folder or file, or does not fit the data.
    """
    from PIL import Image

    if path.is_dir():
        if levels is None:
            raise DataError(f"samples={path}: vectors come in an .npz or .npy file")
        names = (listing := list_pictures(path)).names
        if not names:
            raise DataError(f"samples={path}: holds no {', '.join(SUFFIXES)} ({listing.others})")
        note(f"samples={path}: {len(names)} images, {listing.others}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return torch.stack([_read_picture(path / name, shape) for name in names])
    if not path.is_file():
        raise DataError(f"samples={path}: no such folder or file")
    array = read_array(path, ("samples", "arr_0", "images"))
    if array.ndim and not len(array):
        raise DataError(f"samples={path}: holds no samples, an array of shape {array.shape}")
    if levels is None:
        if array.ndim != 2 or array.shape[1:] != tuple(shape) or array.dtype.kind != "f":
            raise DataError(f"samples={path}: holds {array.dtype} {array.shape}, not floats (N, {shape[0]})")
        with np.errstate(over="ignore"):
            points = array.astype(np.float32)
        if not np.isfinite(points).all():
            raise DataError(f"samples={path}: holds NaN, infinity, or numbers beyond float32")
        return torch.from_numpy(points)
    C, H, W = shape
    if array.ndim == 3:
        array = array[..., None]
    fits = array.dtype == np.uint8 and array.ndim == 4 and array.shape[1:3] == (H, W) and array.shape[3] in (1, C)
    if not fits:
        hint = ""
        if array.dtype.kind in "fiu" and array.dtype != np.uint8 and array.size:
            hint = f"; of values {array.min():.4g}..{array.max():.4g} make bytes 0..255 yourself"
        raise DataError(f"samples={path}: holds {array.dtype} {array.shape}, not uint8 (N, {H}, {W}, {C}){hint}")
    return torch.from_numpy(array).permute(0, 3, 1, 2).expand(-1, C, -1, -1).contiguous()


class Odd(NamedTuple):
    """What is odd about the range of samples."""

    text: str
    certain: bool  # whether they cannot be what was meant, however poor a generator


def check_range(x: Tensor, real: Tensor, levels: int | None) -> Odd | None:
    """Compare the range of samples with that of data, which a wrong scale changes and a poor generator hardly.

    Args:
        x: the samples, (N, ...) bytes or points.
        real: the data in the same form, (M, ...).
        levels: of the data; None for points.

    Returns:
        What was found and what is expected; None where the ranges are alike.
    """
    low, high = x.min().item(), x.max().item()
    flat = real.flatten(1)
    lowest, highest = flat.amin(1).double(), flat.amax(1).double()  # of each event
    lows, highs = lowest.min().item(), highest.max().item()
    found = f"their values lie in {low:.4g}..{high:.4g}, those of the data in {lows:.4g}..{highs:.4g}"
    if low == high and lows != highs:
        return Odd(f"all their values are {low:.4g}, those of the data lie in {lows:.4g}..{highs:.4g}", True)
    margin = 0 if levels is None else MARGIN
    beyond = ((lowest < low - margin) | (highest > high + margin)).double().mean().item()
    if levels is None:
        return Odd(f"{found}, most of whose points are outside: is the scale right?", False) if beyond > 0.5 else None
    expected = "bytes of 0..255 are expected" + (f", the {levels} levels stretched over them" if levels < 256 else "")
    if high <= (levels - 1 if levels < 256 else 1) < highs:
        return Odd(f"{found}: {expected}", True)
    kinds, of_data = (torch.bincount(side.flatten(), minlength=256).nonzero().flatten().tolist() for side in (x, real))
    if len(kinds) <= 3 < min(len(of_data), 8):
        return Odd(f"they hold no values but {', '.join(map(str, kinds))}: {expected}", True)
    return Odd(f"{found}, most of whose images leave that range: {expected}", False) if beyond > 0.5 else None


def _read_picture(path: Path, shape: Sequence[int]) -> Tensor:
    C, H, W = shape

    def pixels(image: Image.Image) -> np.ndarray:
        flat = upright(image, C)
        if flat.size != (W, H):
            raise DataError(f"{path}: is {flat.size[0]}x{flat.size[1]}, the data are {W}x{H}: resize it yourself")
        return np.array(flat)

    return torch.from_numpy(decoded(path, FORMATS, pixels).reshape(H, W, C)).permute(2, 0, 1)
