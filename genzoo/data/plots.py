"""Plots of vectors: moving points, panels of point clouds, and curves, over the density of the data where it is known.

D = 1 is shown as histograms, or as values against the column; D > 2 by neighbouring pairs of the first coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from genzoo.data.dataset import KnownDensity
from genzoo.data.pictures import PANELS

BLUE, SIZE, DPI, GRID = "#1f4e79", 4.0, 100, 241
COLORS = ("#1f4e79", "#2ca02c", "#9467bd", "#000000", "#e377c2", "#17becf")  # of curves, unlike the orange of densities
LEVELS = (0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)  # of the contours, as fractions of the largest density
QUANTILE = 0.99  # of the points that the first, widest frames show


def _pairs(dim: int) -> list[tuple[int, int]]:
    return [(0, 0)] if dim == 1 else [(i, i + 1) for i in range(min(dim - 1, PANELS))]


def limits(*clouds: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower and upper limits of some clouds, (N, D) each, with a margin: a square for D = 2."""
    low, high = torch.cat([cloud.flatten(0, -2) for cloud in clouds]).aminmax(dim=0)
    half = 0.6 * (high - low).clamp(min=1e-6)
    half = half.amax().expand_as(half) if len(half) == 2 else half  # a square
    return (low + high) / 2 - half, (low + high) / 2 + half


def _figure(
    panels: int, columns: int, size: float, layout: Literal["constrained"] | None = "constrained"
) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(size * columns, size * rows), layout=layout, dpi=DPI)
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]


def _draw_density(axes: Any, density: KnownDensity | None, low: Tensor, high: Tensor) -> None:
    """Fill the contours of a density of the plane."""
    if density is None or len(low) != 2:
        return
    u, v = (torch.linspace(float(low[i]), float(high[i]), GRID) for i in range(2))
    p = density.log_prob(torch.cartesian_prod(u, v)).double().exp().view(GRID, GRID).T
    top = float(p.max())
    if top > 0:
        axes.contourf(u, v, p.numpy() / top, levels=LEVELS, cmap="Oranges", alpha=0.8, vmin=0, vmax=1.3, zorder=0)


def _frame(axes: Any, pair: tuple[int, int], dim: int, low: Tensor, high: Tensor) -> None:
    """Set the limits and labels of a panel."""
    first, second = pair
    axes.set_xlim(float(low[first]), float(high[first]))
    if dim > 1:
        axes.set_ylim(float(low[second]), float(high[second]))
    if dim == 2:
        axes.set_aspect("equal")
    if dim > 2:
        axes.set(xlabel=f"coordinate {first}", ylabel=f"coordinate {second}")


def _zoom(x: Tensor, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the limits of each frame: those of the data, widened to most points of this frame and of all later ones."""
    centre, half = (low + high) / 2, (high - low) / 2
    reach = torch.quantile((x - centre).abs(), QUANTILE, dim=1) * 1.1  # (frames, D)
    half = torch.maximum(reach.flip(0).cummax(0).values.flip(0), half)
    half = half.amax(1, keepdim=True).expand_as(half)  # squares, whose shape does not change
    return [(centre - h, centre + h) for h in half]


def moving_points(
    x: Tensor, data: Tensor, density: KnownDensity | None = None, titles: Sequence[str] | None = None
) -> list[np.ndarray]:
    """Draw the frames of moving points; the view narrows from the noise to the data.

    Args:
        x: positions, (frames, N, D).
        data: examples, (M, D), whose extent is the final view.
        density: of the data, drawn below the points for D = 2.
        titles: of the frames.

    Returns:
        Images, (H, W, 3) uint8 each.
    """
    x, D = x.cpu(), x.shape[-1]
    low, high = limits(data)
    views = _zoom(x, low, high)
    pairs = _pairs(D)
    figure, panels = _figure(len(pairs), len(pairs), SIZE, None)  # axes that stay in place
    figure.subplots_adjust(left=0.12 / len(pairs), right=0.97, bottom=0.12, top=0.92, wspace=0.3)
    _draw_density(panels[0], density, low, high)
    size = min(max(3000 / x.shape[1], 7), 60)
    artists = [axes.scatter([], [], s=size, alpha=0.7, linewidths=0, color=BLUE) for axes in panels]
    frames = []
    for view, title, points in zip(views, titles or [""] * len(x), x, strict=True):
        for axes, artist, pair in zip(panels, artists, pairs, strict=True):
            if D == 1:
                _histogram(axes, points[:, 0], *view)
            else:
                artist.set_offsets(points[:, list(pair)].numpy())
                _frame(axes, pair, D, *view)
            axes.set_title(title, fontsize=10)
        figure.canvas.draw()
        frames.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
    return frames


def _histogram(axes: Any, values: Tensor, low: Tensor, high: Tensor) -> None:
    axes.clear()
    ends = float(low[0]), float(high[0])
    axes.hist(values.numpy(), bins=80, range=ends, weights=np.full(len(values), 1 / len(values)), color=BLUE)
    axes.set_xlim(*ends)


def save_point_panels(
    file: BinaryIO, x: Tensor, data: Tensor, density: KnownDensity | None = None, titles: Sequence[str] | None = None
) -> None:
    """Write a PNG of point clouds, a panel each; the arguments are those of ``moving_points``."""
    x, D = x.cpu(), x.shape[-1]
    low, high = limits(data)
    views = _zoom(x, low, high)
    pairs = _pairs(D)
    columns = min(len(x), 5) if len(pairs) == 1 else len(pairs)
    figure, panels = _figure(len(x) * len(pairs), columns, 2.4)
    for i, points in enumerate(x):
        for j, pair in enumerate(pairs):
            axes = panels[i * len(pairs) + j]
            axes.tick_params(labelsize=6)
            if D == 1:
                _histogram(axes, points[:, 0], *views[i])
            else:
                _draw_density(axes, density, low, high)
                axes.scatter(points[:, pair[0]], points[:, pair[1]], s=3, alpha=0.6, linewidths=0, color=BLUE)
                _frame(axes, pair, D, *views[i])
            axes.set_title(titles[i] if titles else "", fontsize=8)
    figure.savefig(file, format="png")


def save_curves(file: BinaryIO, x: Tensor, data: Tensor, density: KnownDensity | None = None) -> None:
    """Write a PNG of curves, such as interpolations: a colour and a line of markers for each.

    Args:
        file: opened for writing.
        x: points of the curves, (curves, points, D); a square marks the first one.
        data: examples, (M, D), drawn in grey where the density is not known.
        density: of the data, drawn below the curves for D = 2.
    """
    x, D = x.cpu(), x.shape[-1]
    low, high = limits(x, data)
    pairs = _pairs(D)
    figure, panels = _figure(len(pairs), len(pairs), SIZE + 1)
    for axes, (first, second) in zip(panels, pairs, strict=True):
        if D == 2 and density is not None:
            _draw_density(axes, density, low, high)
        elif D > 1:
            axes.scatter(data[:2000, first], data[:2000, second], s=2, alpha=0.4, linewidths=0, color="0.6")
        for i, curve in enumerate(x):
            u = torch.arange(len(curve)) if D == 1 else curve[:, first]
            v = curve[:, 0] if D == 1 else curve[:, second]
            (line,) = axes.plot(u, v, marker="o", markersize=3, linewidth=1, color=COLORS[i % len(COLORS)])
            axes.plot(u[:1], v[:1], marker="s", markersize=6, color=line.get_color())
        if D > 1:
            _frame(axes, (first, second), D, low, high)
    figure.savefig(file, format="png")


def save_pairs(file: BinaryIO, x: Tensor, data: Tensor) -> None:
    """Write a PNG of vectors joined to their reconstructions by lines, (N, D) each."""
    data, x = data.cpu(), x.cpu()
    pairs, D = _pairs(x.shape[1]), x.shape[1]
    low, high = limits(x, data)
    figure, panels = _figure(len(pairs), len(pairs), SIZE + 1)
    for axes, (first, second) in zip(panels, pairs, strict=True):
        if D == 1:
            axes.scatter(data[:, 0], x[:, 0], s=8, color=BLUE)
            axes.set(xlabel="data", ylabel="reconstruction")
            continue
        for a, b in zip(data, x, strict=True):
            axes.plot([a[first], b[first]], [a[second], b[second]], linewidth=0.7, color="0.5", zorder=1)
        axes.scatter(data[:, first], data[:, second], s=14, color="#d1701f", label="data", zorder=2)
        axes.scatter(x[:, first], x[:, second], s=14, color=BLUE, marker="x", label="reconstructions", zorder=3)
        _frame(axes, (first, second), D, low, high)
        axes.legend(loc="upper right", fontsize=8)
    figure.savefig(file, format="png")
