r"""Scenes of one or two coloured figures, and the sentences that describe them.

A figure has a size, a fill, a colour and a shape. One figure has a place on its background, two figures a relation. The sets

    size        small, large
    fill        solid, striped
    colour      red, yellow, green, cyan, blue, pink
    shape       circle, square, triangle, ring, cross
    place       left, right, top, bottom, centre
    relation    left of, above
    background  white, grey, black

give 120 figures, 120 * 5 * 3 = 1,800 scenes of one and 120 * 119 * 2 * 3 = 85,680 of two different figures. ``right of`` and
``below`` are wordings: "A right of B" and "B left of A" are the same scene, whose first figure is the left or the upper one.

The grammar, in which "solid" may be unsaid and "to the" omitted:

    sentence  = figure place ", on a" ground | "on a" ground "," figure place | "a" ground "with" figure place
              | place "," figure "on a" ground
              | pair "on a" ground | "on a" ground "," pair | "a" ground "with" pair
    pair      = figure relation figure
    figure    = "a" size [fill] colour shape
    place     = "on the left" | "on the right" | "at the top" | "at the bottom" | "in the centre"
    relation  = ["to the"] "left of" | ["to the"] "right of" | "above" | "below"
    ground    = ("white" | "grey" | "black") "background"

``parse`` inverts ``caption`` for every scene and wording. It also reads sentences that name fewer attributes, such as
"a red ring", with None for an attribute that is not named.

Scenes are held out by a hash: the generalisation to them is to new combinations of known attributes, as of colour and shape.

References:
    Johnson et al., "CLEVR: A Diagnostic Dataset for Compositional Language and Elementary Visual Reasoning", 2017,
    https://arxiv.org/abs/1612.06890 (scenes, their descriptions, and held-out combinations of attributes, section 4.7).
    Lake, Baroni, "Generalization without Systematicity", 2018, https://arxiv.org/abs/1711.00350 (splits by combinations).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from genzoo.numerics.random import philox, seed_of

SIZES = ("small", "large")
FILLS = ("solid", "striped")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "pink")
SHAPES = ("circle", "square", "triangle", "ring", "cross")
PLACES = ("left", "right", "top", "bottom", "centre")
RELATIONS = ("left of", "above")
BACKGROUNDS = ("white", "grey", "black")

FIGURES = len(SIZES) * len(FILLS) * len(COLOURS) * len(SHAPES)
ONE = FIGURES * len(PLACES) * len(BACKGROUNDS)  # scenes of one figure
TWO = FIGURES * (FIGURES - 1) * len(RELATIONS) * len(BACKGROUNDS)  # scenes of two

_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
_CONVERSES = {"left of": "right of", "above": "below"}


@dataclass(frozen=True)
class Figure:
    """A figure; None for an attribute that is not named."""

    size: str | None
    fill: str | None
    colour: str | None
    shape: str


@dataclass(frozen=True)
class Scene:
    """One figure at a place, or two figures and their relation, on a background.

    Attributes:
        figures: one or two; of two the left or the upper one first.
        background: colour of the background.
        place: of one figure.
        relation: of two figures, "left of" or "above".

    None stands for an attribute that is not named.
    """

    figures: tuple[Figure, ...]
    background: str | None = None
    place: str | None = None
    relation: str | None = None


# Enumeration


def figure_of(code: int) -> Figure:
    """Return the figure of a number, 0..119."""
    code, shape = divmod(code, len(SHAPES))
    code, colour = divmod(code, len(COLOURS))
    size, fill = divmod(code, len(FILLS))
    return Figure(SIZES[size], FILLS[fill], COLOURS[colour], SHAPES[shape])


def one_of(code: int) -> Scene:
    """Return the scene of one figure of a number, 0..1799."""
    code, background = divmod(code, len(BACKGROUNDS))
    figure, place = divmod(code, len(PLACES))
    return Scene((figure_of(figure),), BACKGROUNDS[background], place=PLACES[place])


def two_of(code: int) -> Scene:
    """Return the scene of two figures of a number, 0..85679."""
    code, background = divmod(code, len(BACKGROUNDS))
    code, relation = divmod(code, len(RELATIONS))
    first, second = divmod(code, FIGURES - 1)
    second += second >= first  # the figures differ
    return Scene((figure_of(first), figure_of(second)), BACKGROUNDS[background], relation=RELATIONS[relation])


class Numbers(NamedTuple):
    """Numbers of scenes of one side of the split, in ascending order, of ``one_of`` and of ``two_of``."""

    one: np.ndarray
    two: np.ndarray


def divided(held_out: float) -> tuple[Numbers, Numbers]:
    """Divide all scenes into those of training and the held-out ones, by a hash of each.

    A scene that is held out remains so for every larger fraction.

    Args:
        held_out: fraction of held-out scenes, in (0, 1).

    Raises:
        ValueError: if a value of an attribute, or a combination of colour and shape, would not occur in training, or nothing in
            the test.
    """
    key = seed_of("shapes", "held out")
    sides = []
    for kind, count in enumerate((ONE, TWO)):
        code, zero = np.arange(count), np.zeros(1, np.int64)
        word = philox([code, zero + kind, zero, zero], (key & 0xFFFFFFFF, key >> 32))[0]
        sides.append(word / 2**32 < held_out)
    seen, unseen = Numbers(*(np.flatnonzero(~side) for side in sides)), Numbers(*map(np.flatnonzero, sides))
    known = {value for code in seen.one.tolist() for value in _values(one_of(code))}
    everything = {value for code in range(ONE) for value in _values(one_of(code))}
    if known != everything or not all(map(len, (*seen, *unseen))):
        raise ValueError(
            f"held_out={held_out}: must leave scenes of one and of two figures for the test, and for training each value of "
            "each attribute and each colour of each shape"
        )
    return seen, unseen


def _values(scene: Scene) -> tuple[str | tuple[str | None, str] | None, ...]:
    """Return the values of a scene of one figure that must occur in training."""
    (figure,) = scene.figures
    return figure.size, figure.fill, scene.place, scene.background, (figure.colour, figure.shape)


class Scenes(NamedTuple):
    """All scenes, by the side of the split."""

    seen: list[Scene]
    held_out: list[Scene]


def scenes(held_out: float = 0.3) -> Scenes:
    """List the scenes of training and the held-out ones, those of one figure first."""
    return Scenes(*([*map(one_of, side.one.tolist()), *map(two_of, side.two.tolist())] for side in divided(held_out)))


# Sentences


def wordings(scene: Scene) -> int:
    """Return the number of wordings of a scene."""
    return 8 if len(scene.figures) == 1 else 24


def caption(scene: Scene, wording: int = 0) -> str:
    """Describe a scene.

    Args:
        scene: may lack attributes, which are not named then.
        wording: 0..wordings(scene)-1; those that differ in the word "solid" alone coincide if all figures are striped.
    """
    wording, said = divmod(wording, 2)
    named = [_named(figure, bool(said)) for figure in scene.figures]
    ground = f"{scene.background} background" if scene.background else ""
    if len(named) == 1:
        place = _PHRASES[scene.place] if scene.place else ""
        body = f"{named[0]} {place}".rstrip()
        if not ground:
            return body
        if place and wording == 3:
            return f"{place}, {named[0]} on a {ground}"
        behind = f"{body}, on a {ground}" if place else f"{body} on a {ground}"
    else:
        relation = str(scene.relation)
        wording, converse = divmod(wording, 2)
        wording, long = divmod(wording, 2)
        if converse:
            relation, named = _CONVERSES[relation], named[::-1]
        if long and relation.endswith(" of"):
            relation = f"to the {relation}"
        body = f"{named[0]} {relation} {named[1]}"
        if not ground:
            return body
        behind = f"{body} on a {ground}"
    return (behind, f"on a {ground}, {body}", f"a {ground} with {body}")[wording % 3]


def _named(figure: Figure, said: bool) -> str:
    fill = figure.fill if said or figure.fill != "solid" else None
    return " ".join(filter(None, ("a", figure.size, fill, figure.colour, figure.shape)))


def _one(names: tuple[str, ...] | list[str]) -> str:
    return f"({'|'.join(names)})"


_FIGURE = f"an? (?:{_one(SIZES)} )?(?:{_one(FILLS)} )?(?:{_one(COLOURS)} )?{_one(SHAPES)}"
_PLACE = _one(list(_PHRASES.values()))
_GROUND = f"{_one(BACKGROUNDS)} background"
_RELATION = "((?:to the )?left of|(?:to the )?right of|above|below)"
_BODY = f"(?P<body>{_FIGURE}(?: {_PLACE}| {_RELATION} {_FIGURE})?)"
_PLAIN = re.compile(f"(?P<first>{_PLACE}, )?{_BODY}(?:,? on an? (?P<ground>{_GROUND}))?")
_FRONT = re.compile(f"(?:on an? (?P<ground>{_GROUND}), |an? (?P<other>{_GROUND}) with ){_BODY}")
_BODY_PARTS = re.compile(f"{_FIGURE}(?: {_PLACE}| {_RELATION} {_FIGURE})?")
_SPELLINGS = {"center": "centre", "gray": "grey"}


def parse(sentence: str) -> Scene:
    """Read a sentence of the grammar, in any case.

    Raises:
        ValueError: for any other sentence.
    """
    words = re.findall(r"[^\s,]+|,", sentence.lower().strip().removesuffix("."))
    text = " ".join(_SPELLINGS.get(word, word) for word in words).replace(" ,", ",")
    found = _PLAIN.fullmatch(text) or _FRONT.fullmatch(text)
    if found is None:
        raise ValueError(
            f"caption {sentence[:200]!r}: is not of the grammar of data=shapes, "
            f'such as "{caption(two_of(0))}" or "{caption(one_of(0))}"'
        )
    groups = found.groupdict()
    parts = _BODY_PARTS.fullmatch(groups["body"])
    assert parts is not None
    size, fill, colour, shape, place, relation, *second = parts.groups()
    figures = [Figure(size, fill or "solid", colour, shape)]
    ground = groups.get("ground") or groups.get("other")
    first = groups.get("first")
    if relation is not None:
        figures.append(Figure(second[0], second[1] or "solid", second[2], second[3]))
        relation = relation.removeprefix("to the ")
        if relation not in RELATIONS:
            relation = next(name for name, converse in _CONVERSES.items() if converse == relation)
            figures.reverse()
    if first and (place or relation):
        raise ValueError(f"caption {sentence[:200]!r}: names a place twice, or one of two figures")
    places = {phrase: name for name, phrase in _PHRASES.items()}
    place = places.get(place or (first or "").removesuffix(", "))
    return Scene(tuple(figures), ground.split()[0] if ground else None, place, relation)
