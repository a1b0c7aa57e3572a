"""A captioned data set that is made in a moment: a bright or dim square in one of the four corners of a noisy image."""

from __future__ import annotations

import torch

from genzoo.data.captions import captioned
from genzoo.data.dataset import DataSet
from genzoo.numerics.random import generator

CORNERS = ("upper left", "upper right", "lower left", "lower right")
BRIGHT = {"bright": 240, "dim": 120}
# A configuration of them, for any model.
SQUARES = (
    "data=digits",
    "data.source._target_=tests.captions.squares",
    "data.levels=256",
    "data.num_classes=0",
    "data.conditional=true",
)


def squares(n: int = 48, side: int = 8) -> DataSet:
    """Draw n training images, and half as many test images, uint8 (n, 1, side, side), with their captions."""
    names = [f"a {shade} square {corner}" for shade in BRIGHT for corner in CORNERS]
    names += [f"{corner}" for corner in CORNERS]  # shorter captions, which are padded
    x = torch.randint(40, (n + n // 2, 1, side, side), generator=generator("squares")).to(torch.uint8)
    captions = [names[i % len(names)] for i in range(len(x))]
    for image, caption in zip(x, captions, strict=True):
        shade = next((level for name, level in BRIGHT.items() if name in caption), 180)
        row, column = (side // 2 * (word in caption) for word in ("lower", "right"))
        image[0, row : row + side // 2, column : column + side // 2] = shade
    return captioned((x[:n], captions[:n]), (x[n:], captions[n:]), vocabulary=300)
