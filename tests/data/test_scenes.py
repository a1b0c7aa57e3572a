"""The grammar of scenes: every sentence is read back, and the held-out combinations are those that training lacks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from genzoo.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    FIGURES,
    FILLS,
    ONE,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TWO,
    Figure,
    Scene,
    caption,
    divided,
    figure_of,
    one_of,
    parse,
    scenes,
    two_of,
    wordings,
)

RING = Figure("small", "solid", "red", "ring")
SQUARE = Figure("large", "striped", "blue", "square")
PAIR = Scene((RING, SQUARE), "white", relation="left of")
ALONE = Scene((SQUARE,), "black", place="top")


def test_numbers_enumerate_all_combinations_once():
    figures = set(itertools.starmap(Figure, itertools.product(SIZES, FILLS, COLOURS, SHAPES)))
    assert {figure_of(code) for code in range(FIGURES)} == figures and len(figures) == FIGURES == 120
    ones = {Scene((f,), b, place=p) for f in figures for b in BACKGROUNDS for p in PLACES}
    assert {one_of(code) for code in range(ONE)} == ones and len(ones) == ONE == 1800
    pairs = itertools.permutations(figures, 2)
    twos = {Scene(pair, b, relation=r) for pair in pairs for b in BACKGROUNDS for r in RELATIONS}
    assert {two_of(code) for code in range(TWO)} == twos and len(twos) == TWO == 85_680


def test_every_wording_of_every_scene_is_read_back():
    for scene in map(one_of, range(ONE)):
        assert all(parse(caption(scene, k)) == scene for k in range(wordings(scene)))
    rng = np.random.default_rng(0)
    for code in range(TWO):
        scene = two_of(code)
        assert parse(caption(scene, int(rng.integers(wordings(scene))))) == scene


def test_no_sentence_describes_two_scenes():
    """The pictures of two scenes differ, whatever their wordings."""
    chosen = [*map(one_of, range(0, ONE, 7)), *map(two_of, range(0, TWO, 97))]
    sentences = [{caption(scene, k) for k in range(wordings(scene))} for scene in chosen]
    assert len(set.union(*sentences)) == sum(map(len, sentences))


def test_sentences():
    assert caption(PAIR) == "a small red ring left of a large striped blue square on a white background"
    assert caption(ALONE) == "a large striped blue square at the top, on a black background"
    assert {caption(PAIR, k) for k in range(24)} == {
        form.format(f"a small {said}red ring {to}left of a large striped blue square")
        for said in ("", "solid ")
        for to in ("", "to the ")
        for form in ("{} on a white background", "on a white background, {}", "a white background with {}")
    } | {
        form.format(f"a large striped blue square {to}right of a small {said}red ring")
        for said in ("", "solid ")
        for to in ("", "to the ")
        for form in ("{} on a white background", "on a white background, {}", "a white background with {}")
    }
    assert {caption(ALONE, k) for k in range(8)} == {
        "a large striped blue square at the top, on a black background",
        "on a black background, a large striped blue square at the top",
        "a black background with a large striped blue square at the top",
        "at the top, a large striped blue square on a black background",
    }


@pytest.mark.parametrize(
    ("sentence", "scene"),
    [
        ("a red ring", Scene((Figure(None, "solid", "red", "ring"),))),
        ("A red ring.", Scene((Figure(None, "solid", "red", "ring"),))),
        ("a striped cross on a gray background", Scene((Figure(None, "striped", None, "cross"),), "grey")),
        ("a circle in  the center", Scene((Figure(None, "solid", None, "circle"),), place="centre")),
        ("on the left, a circle", Scene((Figure(None, "solid", None, "circle"),), place="left")),
        (
            "a small red ring below a square",
            Scene((Figure(None, "solid", None, "square"), RING), relation="above"),
        ),
    ],
)
def test_sentences_may_name_fewer_attributes(sentence, scene):
    assert parse(sentence) == scene
    assert parse(caption(scene)) == scene


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "a",
        "red",
        "a red",
        "a purple ring",
        "a red red ring",
        "red a ring",
        "a red ring and a blue square",
        "a red ring left of",
        "a red ring left a blue square",
        "a red ring on a red background",
        "a red ring on the left on the left",
        "on the left, a red ring on the right",
        "on the left, a red ring left of a blue square",
        "a red ring left of a blue square on the left",
        "on a white background, a red ring on a black background",
        "a white background",
        "two red rings",
        "a red ring left of a blue square above a green circle",
        "\x00" * 1000,
        "a red ring " * 10_000,
    ],
)
def test_other_sentences_are_refused_in_one_line(sentence):
    with pytest.raises(ValueError, match=r"is not of the grammar|names a place") as info:
        parse(sentence)
    assert len(str(info.value).splitlines()) == 1 and len(str(info.value)) < 1200


# The split


def test_the_split_has_the_numbers_of_its_description():
    seen, held_out = divided(0.3)
    assert [len(codes) for side in (seen, held_out) for codes in side] == [1266, 59_928, 534, 25_752]
    for mine, theirs, count in zip(seen, held_out, (ONE, TWO), strict=True):
        assert sorted([*mine, *theirs]) == list(range(count))


def test_held_out_scenes_are_new_and_their_attributes_are_not():
    seen, held_out = scenes(0.3)
    assert not set(seen) & set(held_out) and len(seen) + len(held_out) == ONE + TWO

    def values(some: list[Scene]) -> set[object]:
        found: set[object] = set()
        for scene in some:
            found |= {scene.background, scene.place, scene.relation}
            for f in scene.figures:
                found |= {f.size, f.fill, (f.colour, f.shape)}
        return found

    assert values([s for s in seen if len(s.figures) == 1]) | {*RELATIONS} == values(seen) >= values(held_out)


def test_a_larger_share_holds_out_the_same_scenes_and_more():
    for few, more in zip(divided(0.1)[1], divided(0.3)[1], strict=True):
        assert set(few.tolist()) < set(more.tolist())


@pytest.mark.parametrize("held_out", [-0.1, 0.0, 1e-9, 0.99, 1.0, 2.0, float("nan")])
def test_shares_that_leave_nothing_to_one_side_are_refused(held_out):
    with pytest.raises(ValueError, match=f"held_out={held_out}"):
        divided(held_out)
