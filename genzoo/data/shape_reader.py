r"""Reading scenes from pictures of shapes by analysis by synthesis: the caption checker of ``data=shapes``.

A picture is segmented into its background, the median of the border, and the connected regions that differ from it. Each region
is compared with templates of every shape, fill, radius and sub-pixel position, drawn by the program of the data. With the
coverage a of each pixel and its brightness e, equal to a in solid parts and to a/2 in dark stripes, a template predicts

    x = (1 - a) b + e c,                c = <e, x - (1 - a) b> / <e, e>

of the background b and the colour c, which is fitted by least squares in each channel. The best templates of each shape and
fill are refined between the points of the grid, drawn and fitted again; the one with the smallest residual is read. Pictures
of 64 pixels are searched at 32.

An attribute is read only where it is unambiguous. It is None, which is wrong under every caption, for a colour that is not of
the data or not uniform, a size between small and large, a shape that leaves a residual, a place between two places, and a
background of another colour or with noise. Whatever else the scene does not explain counts as a further object. Noise of a
standard deviation of 8 levels and a blur by a fifth of a 3x3 mean are within these tolerances.

Fractions measured by ``python -m tests.data.shape_accuracy``, of 5,000 true pictures and of 1,000 with each error, of a seed
that is not used elsewhere; damaged are erased, added, halved and recoloured figures, noise, and means of two pictures:

    side    right, true    with noise and blur    found, one wrong attribute alone    damaged
    16      1.0000         0.9926                 1.000 to 1.000                      0.999 to 1.000
    32      1.0000         1.0000                 1.000 to 1.000                      1.000 to 1.000
    64      0.9996         0.9992                 0.998 to 1.000                      1.000 to 1.000

The largest errors are of mixtures that resemble a scene: of the means of two shapes at the same place 92 % are found at 16
pixels, and of half transparent figures 98 % at 64, where cyan on grey is a darker cyan.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from genzoo.data.dataset import DataError
from genzoo.data.figures import HALF_HEIGHT, LEVELS_OF, RESOLUTIONS, SHADE, SPREAD, Drawn, Windows, coverage
from genzoo.data.scenes import BACKGROUNDS, COLOURS, FILLS, SHAPES, Scene, parse

SEEN = 36.0  # levels, Euclidean in RGB, by which a pixel of a figure differs from the background
SMALLEST, LARGEST, SCALES = 0.112, 0.236, 17  # radii of the templates
AREA = 0.0163  # of the smallest region that is a figure, in units of the picture
REFINED = 3  # shapes and fills that are refined
NOISE = 8.0  # levels, standard deviation that a colour is weighed against
CHUNK = 64  # pictures read at once

ATTRIBUTES = ("objects", "background", "size", "fill", "colour", "shape", "place", "relation")
ACCURACY = {16: 1.0, 32: 1.0, 64: 0.9996}  # of 5,000 true pictures each, see above

# Tolerances
SMALL, LARGE = 0.152, 0.178  # largest small radius, smallest large one
DIMMEST, BRIGHTEST = 0.8, 1.2  # of colours, relative to those of the data
HUE = 36.0  # levels, Euclidean in RGB, between a colour and the nearest one of the data
TINT = 0.2  # root mean square of other hues in a figure, relative to its contrast
MISFIT, PEAK = 0.17, 0.25  # of the residual over a figure: its root mean square, and its mean over 3x3 pixels
GROUND, ROUGH = 28.0, 14.0  # levels: difference of the background, and standard deviation of its noise
UNEXPLAINED = 24.0  # levels, Euclidean in RGB, of the mean residual of 3x3 pixels outside of the figures
BORDER = 0.115  # from the centre of the picture to the places around it
ACROSS, SLOPE = 0.15, 0.6  # of the centre of a figure beside its place, and of the line between two figures


class Seen(NamedTuple):
    """A figure in a picture, and its centre in units of the side; None for none of the values of an attribute."""

    size: str | None
    fill: str | None
    colour: str | None
    shape: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Attributes:
        figures: those found, at most two, of the larger region first.
        objects: number of objects, those included that are no figures.
        background: colour of the background, or None.
    """

    figures: tuple[Seen, ...]
    objects: int
    background: str | None


class ShapeReader:
    """Checker of the captions of ``data=shapes``.

    Args:
        size: side of the pictures in pixels, 16, 32 or 64.
    """

    name = "shape_reader 1"

    def __init__(self, size: int):
        if size not in RESOLUTIONS:
            raise DataError(f"data.size={size}: pictures of shapes have 16, 32 or 64 pixels")
        self.size = size
        self.accuracy = ACCURACY[size]

    def read(self, x: Tensor) -> list[Reading]:
        """Read pictures, uint8 (N, 3, size, size)."""
        if x.dtype != torch.uint8 or x.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"x must be (N, 3, {self.size}, {self.size}) uint8, not {tuple(x.shape)} {x.dtype}")
        parts = x.cpu().numpy()
        return [reading for i in range(0, len(x), CHUNK) for reading in _read(parts[i : i + CHUNK])]

    def check(self, x: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Compare pictures with captions.

        The figures of a caption are assigned to those of the picture such that the fewest attributes are wrong. Attributes of a
        figure that is missing are wrong; an attribute of two figures is right if it is so for both.

        Args:
            x: pictures, uint8 (N, 3, size, size).
            captions: N sentences of the grammar, which may omit attributes.

        Returns:
            For each attribute, (N,) float64: 1 where it is right, 0 where it is wrong, NaN where the caption omits it.

        Raises:
            ValueError: for a caption that is not of the grammar.
        """
        scenes = [parse(caption) for caption in captions]
        rows = [compare(scene, reading) for scene, reading in zip(scenes, self.read(x), strict=True)]
        table = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(ATTRIBUTES))
        return dict(zip(ATTRIBUTES, table.unbind(1), strict=True))


# Comparison


def compare(scene: Scene, reading: Reading) -> list[float]:
    """Compare a reading with a scene: for each of ``ATTRIBUTES`` 1 if it is right, 0 if wrong, NaN if not named."""
    wanted, found = scene.figures, reading.figures
    slots = [*range(len(found)), *[None] * (len(wanted) - len(found))]
    choices = [_judged(scene, [None if k is None else found[k] for k in chosen])
               for chosen in itertools.permutations(slots, len(wanted))]  # fmt: skip
    _, judged = min(choices, key=lambda choice: choice[0])
    own = {"objects": float(reading.objects == len(wanted)), "background": _right(scene.background, reading.background)}
    return [(own | judged)[name] for name in ATTRIBUTES]


def _right(wanted: str | None, found: str | None) -> float:
    return math.nan if wanted is None else float(wanted == found)


def _judged(scene: Scene, found: list[Seen | None]) -> tuple[tuple[int, bool], dict[str, float]]:
    """Compare the figures of a scene with those found: the number of errors, by which to choose, and the attributes."""
    errors, judged = 0, {}
    for name in ("size", "fill", "colour", "shape"):
        pairs = [(getattr(w, name), getattr(f, name) if f else None) for w, f in zip(scene.figures, found, strict=True)]
        rights = [_right(*pair) for pair in pairs if pair[0] is not None]
        errors += rights.count(0.0)
        judged[name] = min(rights, default=math.nan)
    known = [f for f in found if f is not None]
    judged["place"] = _right(scene.place, _place(known[0]) if known else None)
    judged["relation"] = _right(scene.relation, _relation(*known) if len(known) == 2 else None)
    away = judged["relation"] == 0
    return (errors + away, away), judged


def _place(figure: Seen) -> str | None:
    dx, dy = figure.x - 0.5, figure.y - 0.5
    along, across = (dx, dy) if abs(dx) > abs(dy) else (dy, dx)
    if abs(along) < BORDER:
        return "centre"
    if abs(across) > ACROSS:
        return None
    names = ("left", "right") if along is dx else ("top", "bottom")
    return names[along > 0]


def _relation(first: Seen, second: Seen) -> str | None:
    dx, dy = second.x - first.x, second.y - first.y
    if dx > 0 and abs(dy) < SLOPE * dx:
        return "left of"
    return "above" if dy > 0 and abs(dx) < SLOPE * dy else None


# Templates


class Library(NamedTuple):
    """Templates of one resolution, in the order shape, radius, y, x, T for each fill.

    Attributes:
        solid: a of solid figures, (T, w * w) float32.
        striped: a of striped ones.
        bright: e of striped ones.
        radii: number of radii.
        steps: offsets of the centroid from the centre of the window, in pixels.
    """

    solid: np.ndarray
    striped: np.ndarray
    bright: np.ndarray
    radii: int
    steps: np.ndarray


def _half(size: int) -> int:
    return math.ceil(LARGEST * size + 1.5)


def _above(shape: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Vertical distance from the centroid of figures to their centres, the middle of their heights."""
    return np.where(shape == SHAPES.index("triangle"), -HALF_HEIGHT / 3 * radius, 0.0)


@functools.lru_cache(maxsize=2)
def _library(size: int) -> Library:
    """Draw all templates, for pictures of 16 or 32 pixels."""
    radii = SMALLEST * (LARGEST / SMALLEST) ** (np.arange(SCALES) / (SCALES - 1))
    steps = np.linspace(-1, 1, 9 if size == 16 else 5)
    grid = np.meshgrid(np.arange(len(SHAPES)), radii, steps, steps, indexing="ij")
    shape, radius, y, x = (axis.ravel() for axis in grid)
    centre, half = size // 2 + 0.5, _half(size)
    corner = np.full(len(shape), size // 2 - half)
    place = (centre + x) / size, (centre + y) / size + _above(shape, radius)
    maps = []
    for fill in (False, True):
        figures = Drawn(shape, np.full(len(shape), fill), radius, *place)
        covered, bright = _brightness(figures, size, Windows(corner, corner, 2 * half + 1))
        maps.append([part.astype(np.float32).reshape(len(shape), -1) for part in (covered, bright)])
    (solid, _), (striped, bright) = maps
    return Library(solid, striped, bright, SCALES, steps)


def _brightness(figures: Drawn, size: int, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Compute the coverage a and the brightness e of each pixel, (M, w, w)."""
    cover = coverage(figures, size, windows)
    dark = cover.dark / cover.samples
    covered = cover.bright / cover.samples + dark
    return covered, covered - (1 - SHADE) * dark


# Regions


class Region(NamedTuple):
    """Connected pixels of a picture that differ from the background.

    Attributes:
        owner: the picture.
        area: number of pixels.
        x, y: centroid, in pixels.
        box: first and last row, first and last column.
    """

    owner: int
    area: int
    x: float
    y: float
    box: tuple[int, int, int, int]


def _regions(distance: np.ndarray) -> list[Region]:
    """Find the regions of pictures, given the distance of each pixel from the background, (N, S, S); the largest ones first."""
    from scipy import ndimage

    seen = distance > SEEN
    structure = np.zeros((3, 3, 3), bool)
    structure[1] = True
    labels, count = ndimage.label(seen, structure)
    picture, row, column = np.nonzero(seen)
    label = labels[picture, row, column] - 1
    order = np.argsort(label, kind="stable")
    bounds = np.searchsorted(label[order], np.arange(count + 1))
    longest = 2 * LARGEST * distance.shape[1] + 1.5
    found = []
    for part in itertools.starmap(slice, itertools.pairwise(bounds)):
        owner = int(picture[order[part][0]])
        rows, columns = row[order[part]], column[order[part]]
        pieces = [(rows, columns)]
        # Figures that are a pixel apart may touch in a coarse picture.
        place = max(rows, columns, key=np.ptp)
        if np.ptp(place) + 1 > longest:
            pieces = _cut(rows, columns, place, distance[owner])
        found += [_region(owner, *piece, distance[owner]) for piece in pieces]
    return sorted(found, key=lambda region: (region.owner, -region.area))


def _cut(
    rows: np.ndarray, columns: np.ndarray, place: np.ndarray, distance: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut a region that is too long for a figure in two, along the axis ``place``, where it has the least contrast."""
    first = place.min()
    profile = np.bincount(place - first, distance[rows, columns])
    quarter = len(profile) // 4
    cut = first + quarter + int(np.argmin(profile[quarter : len(profile) - quarter]))
    return [(rows[side], columns[side]) for side in (place < cut, place > cut)]


def _region(owner: int, rows: np.ndarray, columns: np.ndarray, distance: np.ndarray) -> Region:
    weight = distance[rows, columns]
    weight = np.minimum(weight, weight.max() / 2)  # dark stripes and light ones alike
    total = weight.sum()
    box = int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())
    x, y = (float((weight * place).sum() / total) + 0.5 for place in (columns, rows))
    return Region(owner, len(rows), x, y, box)


class Cut(NamedTuple):
    """A line between two figures: the axis, 0 for rows, the last pixel before it, and whether the figure is before it."""

    axis: int
    last: int
    before: bool


def _cuts(regions: Sequence[Region]) -> list[Cut | None]:
    """Separate each region from the other one of its picture."""
    cuts: list[Cut | None] = [None] * len(regions)
    for i, (one, other) in enumerate(itertools.pairwise(regions)):
        if one.owner != other.owner:
            continue
        a, b = one.box, other.box
        _, k = max((max(a[k] - b[k + 1], b[k] - a[k + 1]), k) for k in (0, 2))
        first, second = sorted((a, b), key=lambda box: box[k] + box[k + 1])
        last = (first[k + 1] + second[k]) // 2
        cuts[i], cuts[i + 1] = Cut(k // 2, last, first is a), Cut(k // 2, last, first is b)
    return cuts


# Windows


def _window(x: np.ndarray, owner: np.ndarray, windows: Windows, cuts: Sequence[Cut | None], scale: int) -> np.ndarray:
    """Copy windows of pictures (N, 3, S, S), (M, 3, w, w), with zeros outside of the pictures and beyond the cuts."""
    width = windows.width
    padded = np.pad(x, ((0, 0), (0, 0), (width, width), (width, width)))
    rows, columns = _indices(windows)
    found = padded[owner[:, None, None, None], np.arange(3)[:, None, None], rows[:, None], columns[:, None]]
    for i, cut in enumerate(cuts):
        if cut is None:
            continue
        edge = (cut.last + 1) * scale - int((windows.top, windows.left)[cut.axis][i])
        edge = min(max(edge, 0), width)
        beyond = slice(edge, None) if cut.before else slice(None, edge)
        np.moveaxis(found[i], cut.axis + 1, 0)[beyond] = 0
    return found


def _pasted(parts: np.ndarray, owner: np.ndarray, windows: Windows, shape: tuple[int, ...]) -> np.ndarray:
    """Add windows (M, C, w, w) to zeros, (N, C, S, S)."""
    width = windows.width
    n, channels, size, _ = shape
    canvas = np.zeros((n, channels, size + 2 * width, size + 2 * width), parts.dtype)
    rows, columns = _indices(windows)
    for channel in range(channels):
        np.add.at(canvas[:, channel], (owner[:, None, None], rows, columns), parts[:, channel])
    return canvas[:, :, width:-width, width:-width]


def _indices(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Rows (M, w, 1) and columns (M, 1, w) of windows in pictures that are padded by w."""
    steps = np.arange(windows.width) + windows.width
    return (windows.top[:, None] + steps)[:, :, None], (windows.left[:, None] + steps)[:, None, :]


# Figures


class Fit(NamedTuple):
    """Figures fitted to windows of pictures, (M,) each.

    Attributes:
        shape: index into ``SHAPES``.
        striped: whether the figure has stripes.
        radius, x, y: in units of the side.
        colour: index into ``COLOURS`` of the nearest colour.
        scale: its brightness, relative to that of the data.
        hue: distance of c from it, in levels.
        contrast: distance of c from the background, in levels.
        misfit: root mean square of the residual over the figure in the plane of the figure's colour and the background,
            relative to the contrast.
        tint: likewise orthogonally to this plane, in the direction of other hues.
        cost: sum of squares of the residual over the window, plus a penalty of improbable colours.
        b, c: of the template, (M, 3).
        model: prediction minus background, (M, 3, w, w).
        near: whether a pixel is at most one from the figure, (M, w, w).
    """

    shape: np.ndarray
    striped: np.ndarray
    radius: np.ndarray
    x: np.ndarray
    y: np.ndarray
    colour: np.ndarray
    scale: np.ndarray
    hue: np.ndarray
    contrast: np.ndarray
    misfit: np.ndarray
    tint: np.ndarray
    cost: np.ndarray
    b: np.ndarray
    c: np.ndarray
    model: np.ndarray
    near: np.ndarray


def _coarse(y: np.ndarray, ground: np.ndarray, library: Library) -> np.ndarray:
    """Compute the residuals of all templates, (M, shape * fill, radius, y, x).

    Args:
        y: windows minus background, (M, 3, w, w) float32.
        ground: b, (M, 3).
        library: of the templates.
    """
    m = len(y)
    rows = y.reshape(3 * m, -1)

    def product(maps: np.ndarray) -> np.ndarray:
        return (rows @ maps.T).reshape(m, 3, -1)

    a, e = library.striped, library.bright
    b = ground.astype(np.float32)[:, :, None]
    total = (y**2).sum((1, 2, 3))[:, None]
    solid = total - (product(library.solid) ** 2).sum(1) / (library.solid**2).sum(1)
    along = product(e) + b * (e * a).sum(1)  # <e, x - (1 - a) b> = <e, y + a b>
    striped = total + (b * (2 * product(a) + b * (a**2).sum(1))).sum(1) - (along**2).sum(1) / (e**2).sum(1)
    sides = library.radii, len(library.steps), len(library.steps)
    both = [part.reshape(m, len(SHAPES), *sides) for part in (solid, striped)]
    return np.stack(both, 2).reshape(m, -1, *sides)


def _refined(residual: np.ndarray, library: Library) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimise over radius and position by parabolas through the neighbours of the least residual.

    Args:
        residual: (M, radius, y, x).
        library: of the templates.

    Returns:
        Radius in units of the side, y and x in pixels from the centre of the window, (M,) each.
    """
    m, *sides = residual.shape
    best = np.unravel_index(residual.reshape(m, -1).argmin(1), sides)
    place = []
    for axis, side in enumerate(sides):
        at = np.clip(best[axis], 1, side - 2)
        index = list(best)
        values = []
        for step in (-1, 0, 1):
            index[axis] = at + step
            values.append(residual[np.arange(m), *index].astype(float))
        below, here, above = values
        bend = np.maximum(below - 2 * here + above, 1e-9)
        place.append(at + np.clip((below - above) / (2 * bend), -1, 1))
    radius = SMALLEST * (LARGEST / SMALLEST) ** (place[0] / (library.radii - 1))
    step = library.steps[1] - library.steps[0]
    return radius, library.steps[0] + step * place[1], library.steps[0] + step * place[2]


def _fit(y: np.ndarray, ground: np.ndarray, figures: Drawn, size: int, windows: Windows) -> Fit:
    """Fit the colours of figures to windows.

    Args:
        y: windows minus background, (M, 3, w, w).
        ground: b, (M, 3).
        figures: M figures.
        size: side of the pictures in pixels.
        windows: of ``y``.
    """
    covered, bright = _brightness(figures, size, windows)
    b = ground[:, :, None, None]
    norm = np.maximum((bright**2).sum((1, 2)), 1e-9)[:, None]
    c = (bright[:, None] * (y + covered[:, None] * b)).sum((2, 3)) / norm
    model = bright[:, None] * c[:, :, None, None] - covered[:, None] * b
    near = _dilated(covered > 0)
    rest = near[:, None] * (y - model)
    contrast = np.maximum(np.linalg.norm(c - ground, axis=1), 1.0)
    normal = np.cross(c - ground, ground)  # of the plane of the figure's colour and the background
    normal /= np.maximum(np.linalg.norm(normal, axis=1), 1e-9)[:, None]
    apart = (np.einsum("mchw,mc->mhw", rest, normal) ** 2).sum((1, 2))
    count = np.maximum((covered > 0).sum((1, 2)), 1)
    misfit = np.sqrt(np.maximum((rest**2).sum((1, 2, 3)) - apart, 0) / count) / contrast
    known = np.array([LEVELS_OF[name] for name in COLOURS], float)
    scales = c @ known.T / (known**2).sum(1)
    hues = np.linalg.norm(c[:, None] - np.clip(scales, DIMMEST, BRIGHTEST)[:, :, None] * known, axis=2)
    colour = hues.argmin(1)
    scale, hue = (table[np.arange(len(y)), colour] for table in (scales, hues))
    # Stripes that are hardly resolved are a darker colour else.
    improbable = (np.maximum(abs(scale - 1) - SPREAD, 0) / 0.05) ** 2 + (hue / 15) ** 2
    cost = ((y - model) ** 2).sum((1, 2, 3)) + NOISE**2 * improbable
    return Fit(
        *figures, colour, scale, hue, contrast, misfit, np.sqrt(apart / count) / contrast, cost, ground, c, model, near
    )


def _dilated(mask: np.ndarray) -> np.ndarray:
    """Add the eight neighbours of each pixel, (M, w, w)."""
    wide = mask.copy()
    wide[:, 1:] |= mask[:, :-1]
    wide[:, :-1] |= mask[:, 1:]
    full = wide.copy()
    full[:, :, 1:] |= wide[:, :, :-1]
    full[:, :, :-1] |= wide[:, :, 1:]
    return full


def _better(one: Fit, other: Fit) -> Fit:
    """Keep the fit with the smaller cost of each figure."""
    chosen = other.cost < one.cost
    return Fit(*(np.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(one, other, strict=True)))


# Pictures


def _pooled(x: np.ndarray) -> np.ndarray:
    """Average pixels down to at most 32 in each direction, (N, C, S, S)."""
    n, channels, size, _ = x.shape
    k = max(size // 32, 1)
    return x.reshape(n, channels, size // k, k, size // k, k).mean((3, 5)) if k > 1 else x


def _smoothed(x: np.ndarray) -> np.ndarray:
    """Average over 3x3 pixels, with zeros outside, (N, 3, S, S)."""
    size = x.shape[2]
    wide = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    return (rows[..., :size] + rows[..., 1 : size + 1] + rows[..., 2:]) / 9


def _read(x: np.ndarray) -> list[Reading]:
    """Read pictures, uint8 (N, 3, S, S)."""
    x = x.astype(np.float32)
    n, size = len(x), x.shape[2]
    border = np.concatenate([x[:, :, 0], x[:, :, -1], x[:, :, 1:-1, 0], x[:, :, 1:-1, -1]], 2)
    ground = np.median(border, 2)
    away = x - ground[:, :, None, None]
    small = _pooled(away)
    grid = small.shape[2]
    regions = [region for region in _regions(np.sqrt((small**2).sum(1))) if region.area >= AREA * grid**2]
    objects = np.bincount([region.owner for region in regions], minlength=n)
    kept = [
        r for r, before in zip(regions, [None, None, *regions], strict=False) if not before or before.owner != r.owner
    ]
    rest, label, fit, windows = away, np.zeros((n, size, size), np.int64), None, None
    owner = np.array([region.owner for region in kept], np.int64)
    if kept:
        fit, windows = _matched(away, small, ground.astype(float)[owner], kept)
        rest = away - _pasted(fit.model, owner, windows, away.shape)
        numbered = fit.near[:, None] * (1 + np.arange(len(kept)))[:, None, None, None]
        label = np.minimum(_pasted(numbered, owner, windows, (n, 1, size, size))[:, 0], len(kept))
    free = (label == 0)[:, None]
    peaks = np.linalg.norm(_smoothed(_pooled(rest)), axis=1)
    k = size // grid
    near = label.reshape(n, grid, k, grid, k).max((2, 4))
    outside = np.linalg.norm(_smoothed(_pooled(rest * free)), axis=1).max((1, 2))
    inside = np.zeros(len(kept) + 1)
    np.maximum.at(inside, near, peaks)
    noise = np.sqrt((rest**2 * free).sum((2, 3)) / np.maximum(free.sum((2, 3)), 1)).max(1)
    objects = objects + (outside > UNEXPLAINED)
    figures: list[list[Seen]] = [[] for _ in range(n)]
    if fit is not None:
        for i, number in enumerate(owner.tolist()):
            figures[number].append(_seen(fit, i, inside[i + 1], min(noise[number], ROUGH)))
    return [
        Reading(tuple(found), int(count), _background(b, rough))
        for found, count, b, rough in zip(figures, objects, ground, noise, strict=True)
    ]


def _matched(away: np.ndarray, small: np.ndarray, ground: np.ndarray, regions: Sequence[Region]) -> tuple[Fit, Windows]:
    """Find the figures of regions, and their windows.

    Args:
        away: pictures minus background, (N, 3, S, S).
        small: the same at the resolution of the regions.
        ground: b of each region, (M, 3).
        regions: M of them, at most two of a picture.
    """
    size, grid, m = away.shape[2], small.shape[2], len(regions)
    k = size // grid
    owner, cuts = np.array([region.owner for region in regions]), _cuts(regions)
    column, row = (np.array([math.floor(place) for place in places]) for places in
                   ([region.x for region in regions], [region.y for region in regions]))  # fmt: skip
    half, library = _half(grid), _library(grid)
    y = _window(small, owner, Windows(column - half, row - half, 2 * half + 1), cuts, 1)
    residual = _coarse(y, ground, library)
    kinds = np.argsort(residual.reshape(*residual.shape[:2], -1).min(2), 1)
    half = _half(size)
    windows = Windows(column * k + k // 2 - half, row * k + k // 2 - half, 2 * half + 1)
    y = _window(away, owner, windows, cuts, k)
    fits = []
    for kind in kinds[:, :REFINED].T:
        radius, dy, dx = _refined(residual[np.arange(m), kind], library)
        shape, striped = kind // 2, kind % 2 == 1
        place = (column + 0.5 + dx) / grid, (row + 0.5 + dy) / grid + _above(shape, radius)
        fits.append(_fit(y, ground, Drawn(shape, striped, radius, *place), size, windows))
    best = functools.reduce(_better, fits)
    for _ in range(k):
        best = _better(best, _fit(y, ground, _improved(y, best, size, windows), size, windows))
    return best, windows


def _improved(y: np.ndarray, fit: Fit, size: int, windows: Windows) -> Drawn:
    """Take a Gauss-Newton step of radius and position, with derivatives of the template by finite differences."""
    step, theta = max(size // 32, 1) / 4 / size, [fit.radius, fit.x, fit.y]  # two samples of the drawing
    columns = []
    for k in range(3):
        moved = [value + step * (k == i) for i, value in enumerate(theta)]
        covered, bright = _brightness(Drawn(fit.shape, fit.striped, *moved), size, windows)
        model = bright[:, None] * fit.c[:, :, None, None] - covered[:, None] * fit.b[:, :, None, None]
        columns.append((model - fit.model).reshape(len(y), -1) / step)
    slopes = np.stack(columns, 2)
    rest = (y - fit.model).reshape(len(y), -1, 1)
    square = slopes.transpose(0, 2, 1) @ slopes
    square += 1e-9 * np.trace(square, axis1=1, axis2=2)[:, None, None] * np.eye(3) + 1e-9 * np.eye(3)
    change = np.linalg.solve(square, slopes.transpose(0, 2, 1) @ rest)[..., 0]
    change = np.clip(change, -0.5 / size, 0.5 / size)
    radius = np.clip(fit.radius + change[:, 0], SMALLEST, LARGEST)
    return Drawn(fit.shape, fit.striped, radius, fit.x + change[:, 1], fit.y + change[:, 2])


def _seen(fit: Fit, i: int, peak: float, noise: float) -> Seen:
    """Name the attributes of a figure.

    Args:
        fit: of all figures.
        i: the figure.
        peak: largest mean residual of 3x3 pixels.
        noise: root mean square of the noise of a channel, which is 2/3 in the plane of colour and background.
    """
    radius = fit.radius[i]
    size = "small" if radius < SMALL else "large" if radius > LARGE else None
    uniform = DIMMEST < fit.scale[i] < BRIGHTEST and fit.hue[i] < HUE and fit.tint[i] < TINT
    colour = COLOURS[fit.colour[i]] if uniform else None
    explained = fit.misfit[i] ** 2 < MISFIT**2 + 2.5 * (noise / fit.contrast[i]) ** 2 and peak < PEAK * fit.contrast[i]
    shape = SHAPES[fit.shape[i]] if explained else None
    return Seen(size, FILLS[int(fit.striped[i])], colour, shape, float(fit.x[i]), float(fit.y[i]))


def _background(levels: np.ndarray, noise: float) -> str | None:
    """Name a background, given the root mean square of its noise."""
    apart = [np.abs(levels - LEVELS_OF[name]).max() for name in BACKGROUNDS]
    best = int(np.argmin(apart))
    return BACKGROUNDS[best] if apart[best] < GROUND and noise < ROUGH else None
