"""Measures the reader of shapes: on true pictures, on captions with one wrong attribute, and on damaged pictures.

    python -m tests.data.shape_accuracy            5,000 pictures of each size, and 1,000 of each error; some minutes
    python -m tests.data.shape_accuracy 500        fewer

The pictures are of seeds that nothing else uses. ``genzoo.data.shape_reader.ACCURACY`` is what this prints.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from genzoo.data.figures import LEVELS_OF, RESOLUTIONS, Drawn, draw
from genzoo.data.scenes import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Figure,
    Scene,
    caption,
    wordings,
)  # fmt: skip
from genzoo.data.shape_reader import ShapeReader
from genzoo.data.shapes import Pictures, arrange, pictures

SEED = 550_771_039
VALUES = {"size": SIZES, "fill": FILLS, "colour": COLOURS, "shape": SHAPES}


def fresh(n: int, size: int) -> Pictures:
    """Draw pictures of held-out scenes and of others, in equal numbers."""
    parts = [pictures(n // 2, size, SEED, split) for split in ("train", "test")]
    return Pictures(
        torch.cat([part.x for part in parts]), parts[0].captions + parts[1].captions, parts[0].scenes + parts[1].scenes
    )


def right(checked: dict[str, Tensor]) -> Tensor:
    """Whether no attribute of a picture is wrong."""
    return ~torch.stack([value == 0 for value in checked.values()]).any(0)


def altered(scene: Scene, rng: np.random.Generator) -> dict[str, Scene]:
    """Change one attribute of a scene at a time."""

    def other(values: tuple[str, ...], value: str | None) -> str:
        return str(rng.choice([v for v in values if v != value]))

    found = {"background": dataclasses.replace(scene, background=other(BACKGROUNDS, scene.background))}
    k = int(rng.integers(len(scene.figures)))
    for name, values in VALUES.items():
        figure = dataclasses.replace(scene.figures[k], **{name: other(values, getattr(scene.figures[k], name))})
        figures = tuple(figure if i == k else old for i, old in enumerate(scene.figures))
        if len(set(figures)) == len(figures):
            found[name] = dataclasses.replace(scene, figures=figures)
    if scene.place:
        found["place"] = dataclasses.replace(scene, place=other(PLACES, scene.place))
    else:
        swapped = dataclasses.replace(scene, figures=scene.figures[::-1])
        turned = dataclasses.replace(scene, relation=other(RELATIONS, scene.relation))
        both = dataclasses.replace(turned, figures=scene.figures[::-1])
        found["relation"] = (swapped, turned, both)[rng.integers(3)]
    return found


def disturbed(x: Tensor, rng: np.random.Generator, noise: float = 8.0, blur: float = 0.2) -> Tensor:
    """Add noise and a part of a 3x3 mean, as a good generative model may."""
    y = x.numpy().astype(float)
    size = y.shape[2]
    wide = np.pad(y, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    mean = sum(wide[:, :, i : i + size, j : j + size] for i in range(3) for j in range(3)) / 9
    y = (1 - blur) * y + blur * mean + rng.normal(0, noise, y.shape)
    return torch.from_numpy(np.clip(np.round(y), 0, 255).astype(np.uint8))


# Damaged pictures


Placed = list[tuple[Figure, float, float, float]]  # figures and their (r, x, y)


def drawn(placed: list[Placed], backgrounds: list[str], size: int) -> Tensor:
    """Draw figures at given places, in the colours of the data."""
    owner = np.array([i for i, figures in enumerate(placed) for _ in figures], dtype=int)
    flat = [entry for figures in placed for entry in figures]
    table = np.array([entry[1:] for entry in flat]).reshape(-1, 3).T
    shapes = np.array([SHAPES.index(entry[0].shape) for entry in flat], dtype=int)
    striped = np.array([entry[0].fill == "striped" for entry in flat], dtype=bool)
    colours = np.array([LEVELS_OF[str(entry[0].colour)] for entry in flat], dtype=int).reshape(-1, 3)
    grounds = np.array([LEVELS_OF[name] for name in backgrounds])
    return torch.from_numpy(draw(Drawn(shapes, striped, *table), owner, colours, grounds, size))


def damages(scenes: list[Scene], size: int, rng: np.random.Generator) -> dict[str, tuple[Tensor, list[Scene]]]:
    """Damage pictures of scenes in many ways."""
    backgrounds = [str(scene.background) for scene in scenes]
    placed: list[Placed] = [
        [(f, *place) for f, place in zip(scene.figures, arrange(scene, rng.random(6)), strict=True)] for scene in scenes
    ]
    chosen = [int(rng.integers(len(scene.figures))) for scene in scenes]
    whole = drawn(placed, backgrounds, size)

    def changed(change: Callable[[Figure, float, float, float], tuple[Figure, float, float, float]]) -> Tensor:
        new = [[change(*e) if i == k else e for i, e in enumerate(p)] for k, p in zip(chosen, placed, strict=True)]
        return drawn(new, backgrounds, size)

    def halves(other: Tensor) -> Tensor:
        """Take the left half of the chosen figure from another picture."""
        x = whole.clone()
        for i, k in enumerate(chosen):
            middle = round(placed[i][k][2] * size)
            x[i, :, :, :middle] = torch.where(
                (other[i] != whole[i]).any(0)[:, :middle], other[i, :, :, :middle], x[i, :, :, :middle]
            )
        return x

    def another(values: tuple[str, ...], value: str | None, k: int = 1) -> str:
        return values[(values.index(str(value)) + k) % len(values)]

    erased = drawn([p[:k] + p[k + 1 :] for k, p in zip(chosen, placed, strict=True)], backgrounds, size)
    recoloured = changed(lambda f, *at: (dataclasses.replace(f, colour=another(COLOURS, f.colour, 3)), *at))
    added, room = [], []
    for i, p in enumerate(placed):
        for _ in range(100):
            r, x, y = 0.12, *(0.14 + 0.72 * rng.random(2)).tolist()
            if all(np.hypot(x - x2, y - y2) > 1.25 * r2 + 1.25 * r + 0.05 for _, r2, x2, y2 in p):
                extra = Figure("small", "solid", COLOURS[rng.integers(6)], SHAPES[rng.integers(5)])
                added.append([*p, (extra, r, x, y)])
                room.append(i)
                break
    order = rng.permutation(len(scenes))
    mean = ((whole.int() + whole[order].int() + 1) // 2).to(torch.uint8)
    morphed = changed(lambda f, *at: (dataclasses.replace(f, shape=another(SHAPES, f.shape, 2)), *at))
    elsewhere = drawn(placed, [another(BACKGROUNDS, name) for name in backgrounds], size)
    k = 2 * (size // 16) + 1
    box = torch.nn.functional.avg_pool2d(
        torch.nn.functional.pad(whole.float(), (k // 2,) * 4, mode="replicate"), k, stride=1
    )
    found = {
        "an object erased": erased,
        "an object of two colours": halves(recoloured),
        "half an object erased": halves(erased),
        "uniform noise": torch.from_numpy(rng.integers(0, 256, whole.shape).astype(np.uint8)),
        "mean of two pictures": mean,
        "mean of two shapes": ((whole.int() + morphed.int() + 1) // 2).to(torch.uint8),
        "half transparent": ((whole.int() + erased.int() + 1) // 2).to(torch.uint8),
        "size between the two": changed(lambda f, r, x, y: (f, 0.165, x, y)),
        "blurred": box.round().to(torch.uint8),
        "noise of 40 levels": disturbed(whole, rng, noise=40.0, blur=0.0),
        "channels exchanged": whole[:, [1, 2, 0]],
        "grey": whole.float().mean(1, keepdim=True).expand_as(whole).round().to(torch.uint8),
        "upside down triangle": whole.flip(2),
        "background of two halves": torch.cat([whole[..., : size // 2], elsewhere[..., size // 2 :]], 3),
        "an object added": drawn(added, [backgrounds[i] for i in room], size),
    }
    subsets: dict[str, list[int]] = {"an object added": room}
    level = [i for i, s in enumerate(scenes) if s.place in ("left", "right", "centre") or s.relation == "left of"]
    triangles = [i for i in level if any(f.shape == "triangle" for f in scenes[i].figures)]
    found["upside down triangle"] = found["upside down triangle"][triangles]
    subsets["upside down triangle"] = triangles
    different = [i for i, j in enumerate(order) if scenes[i] != scenes[j]]
    found["mean of two pictures"], subsets["mean of two pictures"] = mean[different], different
    return {name: (x, [scenes[i] for i in subsets[name]] if name in subsets else scenes) for name, x in found.items()}


# Measurements


def accuracy(n: int, size: int, noise: float = 0.0, blur: float = 0.0) -> float:
    """Fraction of true pictures that are right."""
    found, rng, reader = fresh(n, size), np.random.default_rng(SEED), ShapeReader(size)
    total = 0
    for i in range(0, len(found.x), 200):
        x, captions = found.x[i : i + 200], found.captions[i : i + 200]
        x = disturbed(x, rng, noise, blur) if noise or blur else x
        total += int(right(reader.check(x, captions)).sum())
    return total / len(found.captions)


def exactness(n: int, size: int) -> dict[str, float]:
    """Fraction of captions with one wrong attribute of which exactly this attribute is found wrong, by attribute."""
    found, rng = fresh(n, size), np.random.default_rng(SEED)
    reader, table = ShapeReader(size), {}
    changed = [altered(scene, rng) for scene in found.scenes]
    for name in ("background", *VALUES, "place", "relation"):
        chosen = [i for i, scenes in enumerate(changed) if name in scenes]
        scenes = [changed[i][name] for i in chosen]
        words = [caption(scene, int(rng.integers(wordings(scene)))) for scene in scenes]
        checked = reader.check(found.x[chosen], words)
        exact = torch.stack([(value == 0) == (key == name) for key, value in checked.items()]).all(0)
        table[name] = float(exact.double().mean())
    return table


def rejection(n: int, size: int) -> dict[str, float]:
    """Fraction of damaged pictures that are wrong, by the damage."""
    scenes, rng = fresh(n, size).scenes, np.random.default_rng(SEED)
    reader = ShapeReader(size)
    return {
        name: 1 - float(right(reader.check(x, [caption(scene) for scene in some])).double().mean())
        for name, (x, some) in damages(scenes, size, rng).items()
    }


def main(n: int) -> None:
    """Print all measurements."""
    for size in RESOLUTIONS:
        print(f"{size} pixels, {n} pictures")
        print(
            f"  true {accuracy(n, size):.4f}, with noise of 8 levels and a blur of 0.2 {accuracy(n, size, 8.0, 0.2):.4f}"
        )
        for title, table in (("one wrong attribute", exactness(n // 5, size)), ("damaged", rejection(n // 5, size))):
            print(f"  {title}: " + ", ".join(f"{name} {value:.4f}" for name, value in table.items()))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
