"""Pictures of shapes: the same bytes everywhere, legible, true to their captions, and held out by combinations."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch

from genzoo.data import DataError
from genzoo.data.figures import (
    HALF_HEIGHT,
    HALF_SIDE,
    HALF_WIDTH,
    INNER,
    LEVELS_OF,
    RADII,
    SHADE,
    SPREAD,
    Drawn,
    Windows,
    coverage,
    draw,
)
from genzoo.data.scenes import BACKGROUNDS, COLOURS, SHAPES, parse, scenes
from genzoo.data.shape_reader import ShapeReader
from genzoo.data.shapes import GAP, MARGIN, arrange, pictures, shapes

SHA256 = {
    16: "cc1e94b7992f7dadb8a151d9ae3cfd80ef2c6932761e47a850d3cfb035f8d7f2",
    32: "f6ff5bb2d91513b896160a85258abe306b7ef9b427a10b9984a69f1c94f29853",
    64: "df5d28e959f94f751ace3036af7474ceb4028e96cb6924838475ebcef90fecdb",
}


@pytest.mark.parametrize("size", SHA256)
def test_bytes(size):
    found = pictures(100, size)
    assert hashlib.sha256(found.x.numpy().tobytes()).hexdigest() == SHA256[size]


def test_captions_are_pinned():
    assert pictures(3, 16).captions == [
        "a white background with a small striped cyan circle above a small red cross",
        "on a white background, a large solid red cross at the top",
        "a white background with a small striped green cross below a small red triangle",
    ]


def test_a_picture_is_a_function_of_seed_split_and_number():
    few, many = pictures(50, 16, seed=3), pictures(300, 16, seed=3)
    assert torch.equal(few.x, many.x[:50]) and few.captions == many.captions[:50]
    for other in (pictures(50, 16, seed=4), pictures(50, 16, seed=3, split="test")):
        assert not (other.x == few.x).flatten(1).all(1).any()


def test_resolutions_show_the_same_pictures():
    small, large = pictures(60, 16), pictures(60, 64)
    assert small.captions == large.captions
    mean = large.x.double().reshape(60, 3, 16, 4, 16, 4).mean((3, 5))
    apart = (mean - small.x).abs()
    assert apart.max() < 40 and apart.mean() < 0.5  # of different samples


def test_no_two_pictures_are_equal():
    x = pictures(5000, 16, two=0.0).x
    assert len(torch.unique(x.flatten(1), dim=0)) == 5000


def test_captions_are_of_the_pictures_scenes_and_sides():
    for split, side in zip(("train", "test"), scenes(0.3), strict=True):
        found = pictures(400, 16, split=split)
        assert [parse(words) for words in found.captions] == found.scenes
        assert set(found.scenes) <= set(side)
        assert 0.25 < np.mean([len(scene.figures) == 2 for scene in found.scenes]) < 0.41
    assert all(len(s.figures) == 1 for s in pictures(100, 16, two=0.0).scenes)
    assert all(len(s.figures) == 2 for s in pictures(100, 16, two=1.0).scenes)


# Drawing


AREAS = {
    "circle": math.pi,
    "ring": math.pi * (1 - INNER**2),
    "square": 4 * HALF_SIDE**2,
    "triangle": 2 * HALF_HEIGHT,
    "cross": 8 * HALF_WIDTH - 4 * HALF_WIDTH**2,
}


@pytest.mark.parametrize("size", [16, 32, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_area_and_centre_of_each_shape(shape, size):
    rng = np.random.default_rng(0)
    r, x, y = rng.uniform(0.12, 0.22, 50), *rng.uniform(0.4, 0.6, (2, 50))
    kind = np.full(50, SHAPES.index(shape))
    cover = coverage(Drawn(kind, np.zeros(50, bool), r, x, y), size)
    assert not cover.dark.any() and cover.bright.max() == cover.samples
    share = cover.bright / cover.samples
    area = share.sum((1, 2))
    ratio = area / (AREAS[shape] * (r * size) ** 2)
    np.testing.assert_allclose(ratio, 1, atol=0.12)
    np.testing.assert_allclose(ratio.mean(), 1, atol=0.01)
    steps = np.arange(share.shape[1]) + 0.5
    down = {"triangle": HALF_HEIGHT / 3 * r * size}.get(shape, 0.0)
    np.testing.assert_allclose((share.sum(1) * steps).sum(1) / area + cover.left, x * size, atol=0.13)
    np.testing.assert_allclose((share.sum(2) * steps).sum(1) / area + cover.top, y * size + down, atol=0.13)


def test_stripes_cover_half_of_a_figure_and_leave_its_outline():
    r = np.full(40, 0.2)
    x, y = np.random.default_rng(0).uniform(0.4, 0.6, (2, 40))
    square = np.full(40, SHAPES.index("square"))
    plain, striped = (coverage(Drawn(square, np.full(40, s), r, x, y), 32) for s in (False, True))
    assert np.array_equal(plain.bright, striped.bright + striped.dark)
    assert abs(striped.dark.sum() / plain.bright.sum() - 0.5) < 0.06
    diagonals = [np.abs(np.diff(np.fliplr(part).diagonal())).mean() for part in striped.dark[:, 4:-4, 4:-4]]
    across = [np.abs(np.diff(part.diagonal())).mean() for part in striped.dark[:, 4:-4, 4:-4]]
    assert np.mean(diagonals) < 1e-9 < 5 < np.mean(across)  # stripes run from the lower left to the upper right


def test_coverage_does_not_depend_on_the_window():
    figures = Drawn(*map(np.array, ([2, 4], [True, False], [0.2, 0.13], [0.31, 0.62], [0.44, 0.5])))
    one = coverage(figures, 32)
    moved = coverage(figures, 32, Windows(one.left - 3, one.top - 1, 24))
    width = one.bright.shape[1]
    assert np.array_equal(moved.bright[:, 1 : 1 + width, 3 : 3 + width], one.bright)
    assert np.array_equal(moved.dark[:, 1 : 1 + width, 3 : 3 + width], one.dark)


def test_a_pixel_is_the_mean_of_its_colours():
    figures = Drawn(*map(np.array, ([1, 0], [False, True], [0.2, 0.2], [0.25, 0.7], [0.5, 0.5])))
    colours, ground = np.array([LEVELS_OF["red"], LEVELS_OF["blue"]]), np.array([LEVELS_OF["grey"]])
    x = draw(figures, np.array([0, 0]), colours, ground, 32)[0].astype(float)
    cover = coverage(figures, 32)
    expected = np.broadcast_to(ground[0][:, None, None], (3, 32, 32)).astype(float).copy()
    for i in range(2):
        bright, dark = cover.bright[i] / cover.samples, cover.dark[i] / cover.samples
        rows, columns = np.arange(bright.shape[0]) + cover.top[i], np.arange(bright.shape[0]) + cover.left[i]
        for c in range(3):
            part = bright * (colours[i, c] - ground[0, c]) + dark * (np.floor(colours[i, c] * SHADE) - ground[0, c])
            expected[c][np.ix_(rows, columns)] += part
    assert np.abs(x - expected).max() <= 0.5
    assert (x[:, 16, 8] == LEVELS_OF["red"]).all() and (x[:, 0, 0] == 128).all()


# Legibility


def test_sizes_places_and_relations_are_apart():
    rng = np.random.default_rng(0)
    assert RADII["large"] * (1 - SPREAD) > 1.3 * RADII["small"] * (1 + SPREAD)
    seen, held_out = scenes(0.3)
    chosen = [*seen[:: len(seen) // 4000], *held_out[:: len(held_out) // 4000]]
    corners = list(itertools.product((0.0, 1 - 2**-24), repeat=6))
    for scene in chosen:
        for u in (rng.random(6), corners[rng.integers(len(corners))]):
            places = arrange(scene, u)
            for figure, (r, x, y) in zip(scene.figures, places, strict=True):
                assert abs(r / RADII[str(figure.size)] - 1) <= SPREAD + 1e-12
                assert MARGIN + r <= x + 1e-9 and x <= 1 - MARGIN - r + 1e-9
                assert MARGIN + r <= y + 1e-9 and y <= 1 - MARGIN - r + 1e-9
            if len(places) == 2:
                (r, x, y), (s, v, w) = places
                along, across = (v - x, w - y) if scene.relation == "left of" else (w - y, v - x)
                assert along >= r + s + GAP - 1e-9 and abs(across) <= 0.12 + 1e-9 < along / 2
            else:
                ((_, x, y),) = places
                near = {"left": (0.31, 0.5), "right": (0.69, 0.5), "top": (0.5, 0.31), "bottom": (0.5, 0.69)}
                side = {"left": x <= 0.31, "right": x >= 0.69, "top": y <= 0.31, "bottom": y >= 0.69}
                if scene.place == "centre":
                    assert max(abs(x - 0.5), abs(y - 0.5)) <= 0.04 + 1e-9
                else:
                    across = y if near[str(scene.place)][1] == 0.5 else x
                    assert side[str(scene.place)] and abs(across - 0.5) <= 0.06 + 1e-9


def test_colours_and_backgrounds_are_apart():
    levels = {name: np.array(LEVELS_OF[name], float) for name in (*COLOURS, *BACKGROUNDS)}
    for one, other in itertools.combinations(levels, 2):
        assert np.linalg.norm(levels[one] - levels[other]) > 100
    for colour, ground in itertools.product(COLOURS, BACKGROUNDS):  # of stripes
        assert np.linalg.norm(SHADE * levels[colour] - levels[ground]) > 70


# The data set


@pytest.mark.parametrize("size", [16, 32])
def test_pictures_stay_with_their_captions(size):
    data = shapes(size=size, n=600, n_test=300, seed=5)
    assert (data.shape, data.levels, data.classes) == ((3, size, size), 256, ())
    reader = ShapeReader(size)
    assert data.tokenizer is not None
    for name, split in data.splits.items():
        assert split.y is not None and len(split.y) == len(split.x) == {"train": 600, "test": 300}[name]
        captions = data.tokenizer.decode(split.y)
        assert captions == pictures(len(split.x), size, 5, name).captions
        checked = reader.check(split.x, captions)
        assert sum(int((value == 0).any()) for value in torch.stack(list(checked.values()), 1)) <= 2
    assert data.condition is not None and data.condition.shape == data.train.y.shape[1:]


def test_the_data_set_is_that_of_its_arguments():
    one = shapes(size=16, n=40, n_test=20)
    assert one.sha256 == shapes(size=16, n=40, n_test=20).sha256
    assert one.sha256 != shapes(size=16, n=40, n_test=20, seed=1).sha256
    assert "40 training and 20 test" in one.notes[0]
    assert one.checker is not None and one.checker.accuracy > 0.99


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"size": 28}, "data.size=28"),
        ({"two": 1.5}, "data.two=1.5"),
        ({"held_out": 0.0}, "data.held_out=0.0"),
        ({"held_out": 0.99}, "data.held_out=0.99"),
    ],
)
def test_bad_arguments_are_named(bad, said):
    with pytest.raises(DataError, match=said) as info:
        shapes(**{"n": 10, "n_test": 10, **bad})
    assert len(str(info.value).splitlines()) == 1
