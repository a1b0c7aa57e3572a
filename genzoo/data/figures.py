r"""Drawing of coloured figures with smooth edges: circles, squares, triangles, rings and crosses, solid or striped.

With the radius r, in units of the side of the picture:

    circle    radius r                        ring   radii 0.52 r and r
    square    side 1.77 r, of equal area      cross  length 2 r, width 0.72 r
    triangle  base 2 r, height 1.9 r

Stripes are diagonal, of period 1/8, and have half the brightness, so that they leave the shape its outline at 16 pixels.

A pixel is the mean of 8x8 samples (4x4 for 64 pixels) in integer arithmetic, and their positions use correctly rounded
operations alone: pictures are the same bytes on every machine.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from genzoo.data.scenes import SHAPES

LEVELS_OF = {  # RGB
    "red": (220, 45, 45),
    "yellow": (232, 196, 40),
    "green": (40, 168, 80),
    "cyan": (70, 196, 215),
    "blue": (52, 92, 226),
    "pink": (232, 92, 186),
    "white": (247, 247, 247),
    "grey": (128, 128, 128),
    "black": (8, 8, 8),
}
RADII = {"small": 0.13, "large": 0.205}
SPREAD = 0.08  # relative half widths of radius and brightness
INNER = 0.52  # radius of the hole of a ring
HALF_SIDE = 0.886  # of a square, sqrt(pi) / 2
HALF_HEIGHT = 0.95  # of a triangle
HALF_WIDTH = 0.36  # of the arms of a cross
PERIOD, SHADE = 0.125, 0.5  # of stripes, and their brightness
RESOLUTIONS = (16, 32, 64)
CHUNK = 256  # figures drawn at once


class Drawn(NamedTuple):
    """Figures to be drawn, (M,) each, in units of the side of the picture.

    Attributes:
        shape: index into ``SHAPES``.
        striped: whether the figure has stripes.
        radius: r.
        x, y: centre, from the upper left corner.
    """

    shape: np.ndarray
    striped: np.ndarray
    radius: np.ndarray
    x: np.ndarray
    y: np.ndarray


class Coverage(NamedTuple):
    """Fractions of pixels that figures cover, in a window of w x w pixels for each.

    Attributes:
        bright: samples of the colour of the figure, (M, w, w) int64, of ``samples`` in a pixel.
        dark: samples of its dark stripes.
        left, top: first pixel of the window, (M,); may lie outside of the picture.
        samples: number of samples of a pixel.
    """

    bright: np.ndarray
    dark: np.ndarray
    left: np.ndarray
    top: np.ndarray
    samples: int


class Windows(NamedTuple):
    """Squares of width x width pixels, from the pixels (left, top), (M,) int64, which may lie outside of the picture."""

    left: np.ndarray
    top: np.ndarray
    width: int


def coverage(figures: Drawn, size: int, windows: Windows | None = None) -> Coverage:
    """Compute which fraction of each pixel figures cover.

    Args:
        figures: M figures.
        size: side of the picture in pixels.
        windows: around the figures; None for windows that contain any figure of the data.
    """
    side = 8 if size <= 32 else 4  # samples of a pixel in each direction
    if windows is None:
        half = math.ceil(max(RADII.values()) * (1 + SPREAD) * size + 0.5)
        left, top = (np.floor(centre * size).astype(np.int64) - half for centre in (figures.x, figures.y))
        windows = Windows(left, top, 2 * half + 1)
    left, top, width = windows
    bright = np.zeros((len(left), width, width), np.int64)
    dark = np.zeros_like(bright)
    steps = (np.arange(width * side) + 0.5) / side
    for shape in range(len(SHAPES)):
        for striped in (False, True):
            chosen = np.flatnonzero((figures.shape == shape) & (figures.striped == striped))
            for start in range(0, len(chosen), CHUNK):
                part = chosen[start : start + CHUNK]
                r = (figures.radius[part] * size)[:, None, None]
                x = (steps + (left[part] - figures.x[part] * size)[:, None])[:, None, :]
                y = (steps + (top[part] - figures.y[part] * size)[:, None])[:, :, None]
                inside = _inside(SHAPES[shape], x, y, r)
                if striped:
                    phase = np.floor((x + y) * (math.sqrt(2) / (PERIOD * size)) + 0.5).astype(np.int8)
                    odd = (phase & 1).view(bool)
                    dark[part] = _counts(inside & odd, width, side)
                    inside &= ~odd
                bright[part] = _counts(inside, width, side)
    return Coverage(bright, dark, left, top, side**2)


def _inside(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Whether points, relative to the centre, are inside of a figure, (M, W, W) for x (M, 1, W) and y (M, W, 1), downwards."""
    if shape == "circle":
        return x**2 + y**2 <= r**2
    if shape == "ring":
        square = x**2 + y**2
        return (square <= r**2) & (square >= (INNER * r) ** 2)
    if shape == "square":
        return (abs(x) <= HALF_SIDE * r) & (abs(y) <= HALF_SIDE * r)
    if shape == "triangle":
        h = HALF_HEIGHT * r
        return abs(x) <= np.where(y <= h, (y + h) / (2 * HALF_HEIGHT), -1.0)
    a = HALF_WIDTH * r
    return ((abs(x) <= a) & (abs(y) <= r)) | ((abs(x) <= r) & (abs(y) <= a))


def _counts(inside: np.ndarray, width: int, side: int) -> np.ndarray:
    """Count the samples of each pixel, (M, width * side, width * side) -> (M, width, width)."""
    rows = np.bitwise_count(inside.view(np.uint64 if side == 8 else np.uint32))  # bytes of 0 and 1
    return rows.reshape(len(inside), width, side, width).sum(axis=2, dtype=np.int64)


def draw(figures: Drawn, owner: np.ndarray, colours: np.ndarray, grounds: np.ndarray, size: int) -> np.ndarray:
    """Draw pictures, uint8 (N, 3, size, size).

    Args:
        figures: M figures that do not overlap.
        owner: picture of each, (M,).
        colours: levels of each, int (M, 3).
        grounds: levels of the backgrounds, int (N, 3).
        size: side of the pictures in pixels.
    """
    cover = coverage(figures, size)
    width = cover.bright.shape[1]
    shades = np.floor(colours * SHADE).astype(np.int64)
    canvas = np.zeros((len(grounds), 3, size + 2 * width, size + 2 * width), np.int32)
    rows = (cover.top + width)[:, None] + np.arange(width)
    columns = (cover.left + width)[:, None] + np.arange(width)
    for channel in range(3):
        above = (colours[:, channel] - grounds[owner, channel])[:, None, None]
        shade = (shades[:, channel] - grounds[owner, channel])[:, None, None]
        added = cover.bright * above + cover.dark * shade
        np.add.at(canvas[:, channel], (owner[:, None, None], rows[:, :, None], columns[:, None, :]), added)
    canvas = canvas[:, :, width:-width, width:-width]
    canvas = canvas + (cover.samples * grounds)[:, :, None, None]
    return ((canvas + cover.samples // 2) // cover.samples).astype(np.uint8)
