"""The reader of shapes: right on true pictures, and wrong in what is wrong. All measurements: tests/data/shape_accuracy.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from genzoo.data import DataError
from genzoo.data.scenes import SHAPES, Figure, Scene, caption, parse
from genzoo.data.shape_reader import ACCURACY, ATTRIBUTES, Reading, Seen, ShapeReader, compare
from genzoo.data.shapes import pictures
from tests.data.shape_accuracy import accuracy, damages, drawn, exactness, fresh, rejection, right

FEWER = {16: 300, 32: 200, 64: 100}  # pictures, for the time of the tests
EXEMPT = ("mean of two shapes", "half transparent", "blurred")  # of which some are within the tolerances


@pytest.mark.parametrize("size", ACCURACY)
def test_true_pictures_are_right(size):
    assert accuracy(600, size) >= ACCURACY[size] - 0.005
    assert accuracy(300, size, noise=8.0, blur=0.2) >= (0.97 if size == 16 else 0.985)


@pytest.mark.parametrize("size", ACCURACY)
def test_one_wrong_attribute_is_found_and_no_other(size):
    table = exactness(FEWER[size], size)
    assert set(table) == set(ATTRIBUTES) - {"objects"}
    assert min(table.values()) >= 0.985, table


@pytest.mark.parametrize("size", ACCURACY)
def test_damaged_pictures_are_wrong(size):
    for name, share in rejection(FEWER[size], size).items():
        assert share >= (0.85 if name in EXEMPT else 0.985), name


@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        ("an object erased", "objects"),
        ("an object added", "objects"),
        ("an object of two colours", "colour"),
        ("grey", "colour"),
        ("size between the two", "size"),
        ("upside down triangle", "shape"),
        ("half an object erased", "shape"),
        ("noise of 40 levels", "background"),
        ("background of two halves", "objects"),
    ],
)
def test_damage_is_found_where_it_is(damage, wrong):
    x, scenes = damages(fresh(200, 32).scenes, 32, np.random.default_rng(1))[damage]
    checked = ShapeReader(32).check(x, [caption(scene) for scene in scenes])
    assert (checked[wrong] == 0).double().mean() > 0.9


def test_readings_do_not_depend_on_the_batch():
    found = pictures(150, 16, seed=8)
    reader = ShapeReader(16)
    assert reader.read(found.x) == [reader.read(x[None])[0] for x in found.x]
    assert reader.read(found.x[:0]) == []


def test_mirror_images_contradict_left_and_nothing_else():
    found = pictures(300, 32, seed=9)
    checked = ShapeReader(32).check(found.x.flip(3), found.captions)
    scenes = found.scenes
    sideways = torch.tensor([s.place in ("left", "right") or s.relation == "left of" for s in scenes])
    plain = torch.tensor([all(f.fill == "solid" for f in s.figures) for s in scenes])  # stripes have a direction
    moved = (checked["place"] == 0) | (checked["relation"] == 0)
    assert torch.equal(moved[plain], sideways[plain])
    others = torch.stack([checked[name] for name in ("objects", "background", "size", "colour", "shape")])
    assert (others[:, plain] == 1).all()


def test_attributes_that_a_caption_omits_are_not_judged():
    scene = Scene((Figure("small", "solid", "red", "ring"),), "black", place="top")
    x = drawn([[(scene.figures[0], 0.13, 0.5, 0.25)]], ["black"], 32)
    reader = ShapeReader(32)

    def judged(words: str) -> dict[str, float]:
        return {name: float(value) for name, value in reader.check(x, [words]).items() if not value.isnan()}

    assert judged("a red ring") == {"objects": 1, "fill": 1, "colour": 1, "shape": 1}
    assert judged("a large blue ring on a white background") == {
        "objects": 1, "fill": 1, "shape": 1, "size": 0, "colour": 0, "background": 0,
    }  # fmt: skip
    assert judged("a striped circle at the top") == {"objects": 1, "fill": 0, "shape": 0, "place": 1}
    assert judged("a red ring left of a blue ring") == {"objects": 0, "fill": 0, "colour": 0, "shape": 0, "relation": 0}
    checked = reader.check(x, [caption(scene)])
    assert list(checked) == list(ATTRIBUTES) and checked["relation"].isnan().all()
    assert all(value.dtype == torch.float64 and value.shape == (1,) for value in checked.values())


RED, BLUE = Seen("small", "solid", "red", "ring", 0.3, 0.5), Seen("small", "solid", "blue", "ring", 0.7, 0.5)


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("a small red ring left of a small blue ring", set()),
        ("a small blue ring to the right of a small red ring", set()),
        ("a small blue ring left of a small red ring", {"relation"}),
        ("a small red ring above a small blue ring", {"relation"}),
        ("a small red ring left of a small red ring", {"colour"}),
        ("a small blue ring left of a small blue ring", {"colour"}),
        ("a large red ring left of a small blue ring", {"size"}),
        ("a small striped blue ring left of a small green ring", {"colour", "fill"}),
        ("a small red ring", {"objects"}),
    ],
)
def test_figures_are_assigned_with_the_fewest_errors(words, wrong):
    for figures in ((RED, BLUE), (BLUE, RED)):
        values = dict(zip(ATTRIBUTES, compare(parse(words), Reading(figures, 2, "white")), strict=True))
        assert {name for name, value in values.items() if value == 0} == wrong


@pytest.mark.parametrize(("x", "y", "place"), [
    (0.28, 0.5, "left"), (0.72, 0.55, "right"), (0.45, 0.3, "top"), (0.5, 0.7, "bottom"), (0.54, 0.46, "centre"),
    (0.25, 0.25, None), (0.7, 0.3, None),
])  # fmt: skip
def test_places(x, y, place):
    for name in ("left", "right", "top", "bottom", "centre"):
        scene = Scene((Figure(None, None, None, "ring"),), place=name)
        values = dict(zip(ATTRIBUTES, compare(scene, Reading((RED._replace(x=x, y=y),), 1, None)), strict=True))
        assert values["place"] == (name == place) and math.isnan(values["background"])


def test_captions_and_pictures_of_another_kind_are_refused():
    reader = ShapeReader(16)
    x = pictures(1, 16).x
    with pytest.raises(ValueError, match="is not of the grammar"):
        reader.check(x, ["a dog"])
    for bad in (x.float(), x[:, :1], pictures(1, 32).x):
        with pytest.raises(ValueError, match=r"x must be \(N, 3, 16, 16\) uint8"):
            reader.read(bad)
    with pytest.raises(DataError, match=r"data\.size=28"):
        ShapeReader(28)


def test_every_shape_is_read_at_every_sub_pixel_position():
    """A raster of positions, at which a grid of templates could have blind spots."""
    steps = np.linspace(0.45, 0.45 + 1 / 16, 7)
    for shape in SHAPES:
        figure = Figure("small", "solid", "green", shape)
        places = [[(figure, 0.13, float(x), float(y))] for x in steps for y in steps]
        found = ShapeReader(16).read(drawn(places, ["grey"] * len(places), 16))
        assert all(r.objects == 1 and r.figures[0][:4] == ("small", "solid", "green", shape) for r in found)
        np.testing.assert_allclose([r.figures[0].x for r in found], np.repeat(steps, 7), atol=0.015)
        np.testing.assert_allclose([r.figures[0].y for r in found], np.tile(steps, 7), atol=0.015)


def test_right_is_the_absence_of_errors():
    checked = {"a": torch.tensor([1.0, 0.0, math.nan]), "b": torch.tensor([1.0, 1.0, math.nan])}
    assert right(checked).tolist() == [True, False, True]
