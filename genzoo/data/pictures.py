"""Pictures of data: grids of images and clouds of points, as PNG files and arrays."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from genzoo.data.dataset import DataError
from genzoo.data.decoding import decoded, picture_names
from genzoo.prob.measure import to_bytes

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PANELS = 4  # of pairs of coordinates in a picture of vectors
DENSE = 100  # times that an array of samples may be larger than its file
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # the decoders of Pillow that a file may reach, whatever its name


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


def save_png(path: Path | BinaryIO, image: np.ndarray) -> None:
    """Write one image, (H, W, C) uint8 with one or three channels."""
    from PIL import Image

    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path, format="PNG", optimize=True)


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


def read_samples(path: Path, shape: Sequence[int], levels: int | None) -> Tensor:
    """Read what any program has drawn: a folder of pictures, in the order of their names, or one array of an .npz file.

    Args:
        path: the folder or the file.
        shape: of one event of the data.
        levels: of the data; None for points.

    Returns:
        Bytes, (N, C, H, W) uint8, or vectors, (N, D) float32. Grey pictures of colour data are spread over the channels.

    Raises:
        DataError: for what is no such folder or file, or does not fit the data.
    """
    from PIL import Image

    if path.is_dir():
        if levels is None:
            raise DataError(f"samples={path}: vectors come in an .npz file")
        names = picture_names(path, SUFFIXES)
        if not names:
            raise DataError(f"samples={path}: holds no {', '.join(SUFFIXES)}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return torch.stack([_read_picture(path / name, shape) for name in names])
    if not path.is_file():
        raise DataError(f"samples={path}: no such folder or file")
    array = _read_array(path)
    if levels is None:
        if array.ndim != 2 or array.shape[1:] != tuple(shape) or array.dtype.kind != "f":
            raise DataError(f"samples={path}: holds {array.dtype} {array.shape}, not floats (N, {shape[0]})")
        if not np.isfinite(array).all():
            raise DataError(f"samples={path}: holds NaN or infinity")
        return torch.from_numpy(array.astype(np.float32))
    C, H, W = shape
    if array.ndim == 3:
        array = array[..., None]
    fits = array.dtype == np.uint8 and array.ndim == 4 and array.shape[1:3] == (H, W) and array.shape[3] in (1, C)
    if not fits:
        raise DataError(f"samples={path}: holds {array.dtype} {array.shape}, not uint8 (N, {H}, {W}, {C})")
    return torch.from_numpy(array).permute(0, 3, 1, 2).expand(-1, C, -1, -1).contiguous()


def _read_array(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in ("samples", "arr_0", "images") if name in arrays.files] or list(arrays.files)
            if not names:
                raise DataError(f"samples={path}: holds no array")
            packed = next(
                member for member in arrays.zip.infolist() if member.filename in (names[0], f"{names[0]}.npy")
            )
            if packed.file_size > max(DENSE * packed.compress_size, 2**27):
                raise DataError(
                    f"samples={path}: unpacks to {packed.file_size} bytes, over {DENSE} times its size: write it by np.savez"
                )
            return arrays[names[0]]
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"samples={path}: no .npz file of plain arrays: {error}") from error


def _read_picture(path: Path, shape: Sequence[int]) -> Tensor:
    C, H, W = shape

    def pixels(image: Image.Image) -> np.ndarray:
        if image.size != (W, H):
            raise DataError(f"{path}: is {image.size[0]}x{image.size[1]}, the data are {W}x{H}: resize it yourself")
        if image.mode not in ("L", "RGB"):
            raise DataError(f"{path}: has the mode {image.mode}; store it as 8-bit grey or RGB")
        return np.array(image.convert("L" if C == 1 else "RGB"))

    return torch.from_numpy(decoded(path, FORMATS, pixels).reshape(H, W, C)).permute(2, 0, 1)
