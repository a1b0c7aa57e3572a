"""Draw the families of a comparison side by side: samples of the first seed, the Frechet distance, what sampling costs.

    python experiments/fashion_mnist_equal_budget/picture.py experiments/fashion_mnist_equal_budget

Reads ``runs/`` of the folder and writes ``families.png``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

from genzoo.report import leaderboard, records, texts

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = 5  # samples along a side of each panel, of the eight in a grid


def main(folder: Path) -> None:
    found, _ = records.read(records.find([folder / "runs"]))
    table = leaderboard.tables(leaderboard.rows(found))[0]
    distance = next(name for name in table.headlines if name.startswith("test/fd_"))
    rows = [row for row in table.rows if distance in row.cells]
    colours = plt.get_cmap("tab10")

    across = -(-len(rows) // 2)
    figure = plt.figure(figsize=(2.1 * across + 5.2, 5.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.1 * across, 5.2))
    for i, (row, axes) in enumerate(zip(rows, left.subplots(2, across).flat, strict=False)):
        with Image.open(row.runs[0][0].path / "samples.png") as grid:
            pixels = np.asarray(grid.convert("RGB"))
        side = pixels.shape[0] * SHOWN // 8
        axes.imshow(pixels[:side, :side], interpolation="nearest")
        axes.set_title(f"{row.label}\n{texts.measured(row.cells[distance])}", fontsize=10, color=colours(i))
    for axes in left.axes:
        axes.set_axis_off()

    axes = right.subplots()
    for i, row in enumerate(rows):
        fd, speed = row.cells[distance], row.cells["sampling/samples_per_second"]
        axes.errorbar(speed.mean, fd.mean, yerr=fd.stderr, xerr=speed.stderr, fmt="o", color=colours(i), capsize=3)
        axes.annotate(
            row.label, (speed.mean, fd.mean), xytext=(6, 4 if i % 2 else -12), textcoords="offset points", fontsize=9
        )
    axes.set(xscale="log", yscale="log", xlabel="samples a second", ylabel=texts.label(distance))
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.2)
    figure.savefig(folder / "families.png", dpi=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
