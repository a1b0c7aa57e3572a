"""Pictures of data: grids of images and clouds of points, as PNG files and arrays."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from genzoo.data.arrays import read_npz
from genzoo.data.dataset import DataError
from genzoo.data.decoding import decoded, picture_names
from genzoo.prob.measure import to_bytes

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
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
    """Draw points of the plane, (N, 2), beside as many of the data's where these are given, on equal axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clouds = [("samples", samples)] + ([("data", truth)] if truth is not None else [])
    figure = Figure(figsize=(4 * len(clouds), 4), layout="constrained")
    FigureCanvasAgg(figure)
    frame = (truth if truth is not None else samples).detach().cpu()
    low, high = torch.quantile(frame, torch.tensor([0.0, 1.0]), dim=0)
    margin = 0.1 * (high - low)
    for i, (name, points) in enumerate(clouds):
        axes = figure.add_subplot(1, len(clouds), i + 1)
        axes.scatter(
            points[:, 0].detach().cpu(), points[:, 1].detach().cpu(), s=2, alpha=0.5, linewidths=0, color="#1f4e79"
        )
        axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
        axes.set_title(name)
        axes.set_aspect("equal")
    figure.savefig(path, format="png", dpi=100)


def read_samples(path: Path, shape: Sequence[int], levels: int | None) -> Tensor:
    """Read what any program has drawn: a folder of pictures, in the order of their names, or one array of an .npz file.

    Args:
        path: the folder or the file.
        shape: of one event of the data.
        levels: of the data; None for points.

    Returns:
        Bytes, (N, C, H, W) uint8, or points, (N, 2) float32. Grey pictures of colour data are spread over the channels.

    Raises:
        DataError: for what is no such folder or file, or does not fit the data.
    """
    from PIL import Image

    if path.is_dir():
        if levels is None:
            raise DataError(f"samples={path}: points of the plane come in an .npz file")
        names = picture_names(path, SUFFIXES)
        if not names:
            raise DataError(f"samples={path}: holds no {', '.join(SUFFIXES)}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return torch.stack([_read_picture(path / name, shape) for name in names])
    if not path.is_file():
        raise DataError(f"samples={path}: no such folder or file")
    array = read_npz(path, ("samples", "arr_0", "images"))
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
        raise DataError(f"samples={path}: holds {array.dtype} {array.shape}, not uint8 (N, {H}, {W}, {C})")
    return torch.from_numpy(array).permute(0, 3, 1, 2).expand(-1, C, -1, -1).contiguous()


def _read_picture(path: Path, shape: Sequence[int]) -> Tensor:
    C, H, W = shape

    def pixels(image: Image.Image) -> np.ndarray:
        if image.size != (W, H):
            raise DataError(f"{path}: is {image.size[0]}x{image.size[1]}, the data are {W}x{H}: resize it yourself")
        if image.mode not in ("L", "RGB"):
            raise DataError(f"{path}: has the mode {image.mode}; store it as 8-bit grey or RGB")
        return np.array(image.convert("L" if C == 1 else "RGB"))

    return torch.from_numpy(decoded(path, FORMATS, pixels).reshape(H, W, C)).permute(2, 0, 1)
