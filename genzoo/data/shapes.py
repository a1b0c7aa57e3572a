r"""Captioned pictures of coloured figures, drawn by a program: ``data=shapes``.

Picture i of a split is a function of (seed, split, i): a scene (``genzoo.data.scenes``), a wording of its caption, and
variations that the caption does not name, so that no two pictures are equal and copies of training pictures are recognised:

    radius        r = 0.13 (small) or 0.205 (large), times U[0.92, 1.08]
    position      uniform within the place, or within the freedom that the relation leaves
    brightness    of each figure times U[0.92, 1.08], of the background +- 8 levels

Lengths are in units of the side of the picture; the shapes are those of ``genzoo.data.figures``. Small and large radii differ
by a factor of at least 1.34. Two figures are at least 0.07 apart, a pixel of 16, and no figure is nearer than 0.02 to the
border (one alone 0.05).

**Split.** The test pictures are of held-out scenes alone, 30 % of all combinations of attributes: 534 of 1,800 with one figure
and 25,752 of 85,680 with two. Each colour of each shape occurs in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from genzoo.data.captions import captioned
from genzoo.data.dataset import DataError, DataSet
from genzoo.data.figures import LEVELS_OF, RADII, RESOLUTIONS, SPREAD, Drawn, draw
from genzoo.data.scenes import SHAPES, Scene, caption, divided, one_of, two_of, wordings
from genzoo.data.shape_reader import ShapeReader
from genzoo.numerics.random import SampleStreams, seed_of

GROUND_SPREAD = 8  # levels of the background
GAP = 0.07  # between two figures
MARGIN, ALONE = 0.02, 0.05  # to the border, of two figures and of one
CHUNK = 256  # pictures drawn at once


def shapes(
    size: int = 32,
    n: int = 20_000,
    n_test: int = 2_000,
    seed: int = 0,
    two: float = 0.33,
    held_out: float = 0.3,
    vocabulary: int = 512,
    text_length: int | None = None,
) -> DataSet:
    """Draw the data set of coloured figures and their captions; the test split has held-out scenes alone.

    Args:
        size: side of the pictures in pixels, 16, 32 or 64.
        n, n_test: numbers of training and test pictures.
        seed: of the pictures.
        two: probability of two figures in a picture.
        held_out: fraction of held-out combinations of attributes.
        vocabulary, text_length: of the captions' tokens, as in ``genzoo.data.captions.captioned``.

    Raises:
        DataError: for a size that is not supported, or too few scenes on one side of the split.
    """
    train, test = (
        pictures(count, size, seed, split, two, held_out) for split, count in (("train", n), ("test", n_test))
    )
    note = (
        f"shapes: {n} training and {n_test} test pictures of {size}x{size} pixels; the test pictures show combinations of "
        f"attributes held out from training (held_out={held_out:g})"
    )
    return captioned(
        (train.x, train.captions),
        (test.x, test.captions),
        vocabulary=vocabulary,
        length=text_length,
        checker=ShapeReader(size),
        notes=[note],
    )


def arrange(scene: Scene, u: Sequence[float]) -> list[tuple[float, float, float]]:
    """Place the figures of a scene, as (r, x, y) of each.

    Args:
        scene: with all attributes.
        u: six uniform numbers on [0, 1).
    """
    radii = [RADII[str(f.size)] * (1 - SPREAD + 2 * SPREAD * v) for f, v in zip(scene.figures, u, strict=False)]
    if scene.place is not None:
        return [(radii[0], *_position(scene.place, radii[0], u[2], u[3]))]
    first, second = radii
    free = 1 - 2 * MARGIN - GAP - 2 * (first + second)
    before, after = min(u[2], u[3]) * free, max(u[2], u[3]) * free
    along = MARGIN + before + first, MARGIN + after + GAP + 2 * first + second
    middle, apart = 0.34 + 0.32 * u[4], 0.12 * u[5] - 0.06
    across = middle + apart, middle - apart
    places = list(zip(along, across, strict=True))
    if scene.relation == "above":
        places = [(x, y) for y, x in places]
    return [(r, x, y) for r, (x, y) in zip(radii, places, strict=True)]


def _position(place: str, r: float, u: float, v: float) -> tuple[float, float]:
    if place == "centre":
        return 0.46 + 0.08 * u, 0.46 + 0.08 * v
    nearest = max(ALONE + r, 0.19)
    along, across = nearest + (0.31 - nearest) * u, 0.44 + 0.12 * v
    return {
        "left": (along, across),
        "right": (1 - along, across),
        "top": (across, along),
        "bottom": (across, 1 - along),
    }[place]


class Pictures(NamedTuple):
    """Pictures of one split.

    Attributes:
        x: uint8 (N, 3, size, size).
        captions: one for each picture.
        scenes: likewise.
    """

    x: torch.Tensor
    captions: list[str]
    scenes: list[Scene]


def pictures(
    n: int, size: int = 32, seed: int = 0, split: str = "train", two: float = 0.33, held_out: float = 0.3
) -> Pictures:
    """Draw captioned pictures; the first of them are the same for every n.

    Args:
        n: number of pictures.
        size: side in pixels, 16, 32 or 64.
        seed: of the set.
        split: "train" or "test", whose scenes are held out.
        two: probability of two figures.
        held_out: fraction of held-out scenes.

    Raises:
        DataError: for other sizes and fractions.
    """
    if size not in RESOLUTIONS:
        raise DataError(f"data.size={size}: pictures of shapes have 16, 32 or 64 pixels")
    if not 0 <= two <= 1:
        raise DataError(f"data.two={two}: must be a probability, of two figures in a picture")
    try:
        numbers = divided(held_out)[("train", "test").index(split)]
    except ValueError as error:
        raise DataError(f"data.{error}") from error
    u = SampleStreams(seed_of("shapes", seed, split), range(n)).draw("uniform", (n, 12)).double().numpy()
    drawn: list[Scene] = []
    for pair, number in zip((u[:, 0] < two).tolist(), u[:, 1].tolist(), strict=True):
        codes, scene_of = (numbers.two, two_of) if pair else (numbers.one, one_of)
        drawn.append(scene_of(int(codes[int(number * len(codes))])))
    captions = [caption(scene, int(v * wordings(scene))) for scene, v in zip(drawn, u[:, 2].tolist(), strict=True)]
    x = np.empty((n, 3, size, size), np.uint8)
    for start in range(0, n, CHUNK):
        x[start : start + CHUNK] = _drawn(drawn[start : start + CHUNK], u[start : start + CHUNK, 3:], size)
    return Pictures(torch.from_numpy(x), captions, drawn)


def _drawn(some: Sequence[Scene], u: np.ndarray, size: int) -> np.ndarray:
    placed = [arrange(scene, row) for scene, row in zip(some, u[:, :6].tolist(), strict=True)]
    figures = [figure for scene in some for figure in scene.figures]
    owner = np.repeat(np.arange(len(some)), [len(scene.figures) for scene in some])
    second = np.concatenate([[False], owner[1:] == owner[:-1]]).astype(int)
    brightness = 1 - SPREAD + 2 * SPREAD * u[owner, 6 + second]
    colours = np.floor(np.array([LEVELS_OF[str(f.colour)] for f in figures]) * brightness[:, None] + 0.5)
    grounds = np.array([LEVELS_OF[str(scene.background)] for scene in some])
    grounds = grounds + np.floor((2 * GROUND_SPREAD + 1) * u[:, 8:9]).astype(np.int64) - GROUND_SPREAD
    r, cx, cy = np.array([place for scene in placed for place in scene]).T
    shapes = np.array([SHAPES.index(f.shape) for f in figures])
    striped = np.array([f.fill == "striped" for f in figures])
    return draw(Drawn(shapes, striped, r, cx, cy), owner, colours.astype(np.int64), grounds, size)
