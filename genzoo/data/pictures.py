"""Pictures of data: grids of images and clouds of points, as PNG files and arrays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from genzoo.prob.measure import to_bytes


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
