r"""Variations of an image through its embedding: draws of the same embedding, and paths to other ones.

A model that draws images of an embedding (``genzoo.model.ImageEmbedding``) changes what the embedding says, and draws anew what
it omits. Paths are great circles of the sphere of embeddings, from e to e',

    slerp(e, e', w) = [sin((1 - w) theta) e + sin(w theta) e'] / sin theta,    cos theta = e . e'

between two images, and from an image towards the difference of two texts, ``(g(c1) - g(c0))/|g(c1) - g(c0)|``, of which a part
is enough. All points of a path share the noise of their row, so that only the embedding differs.

References:
    Ramesh et al., "Hierarchical Text-Conditional Image Generation with CLIP Latents", 2022, https://arxiv.org/abs/2204.06125
    (sections 3.1 to 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from genzoo.latents import spherical
from genzoo.model import AbilityError, GenerativeModel, ImageEmbedding
from genzoo.numerics.random import SampleStreams

VARIATIONS, ROWS, STEPS = 8, 3, 8  # default numbers: of variations, of rows of a path, and of its points


def varied_model(model: GenerativeModel) -> ImageEmbedding:
    """Return a model as one that draws images of embeddings.

    Raises:
        AbilityError: for another family.
    """
    if not isinstance(model, ImageEmbedding):
        raise AbilityError(f"{type(model).__name__} draws no images of an embedding: choose unclip")
    return model


def image_path(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Return embeddings on the great circle between two, (B, d), (B, d) -> (steps, B, d), both ends included.

    Raises:
        ValueError: for fewer than 2 steps.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, not {steps}")
    return torch.stack([spherical(start, end, i / (steps - 1)) for i in range(steps)])


def text_path(e: Tensor, before: Tensor, after: Tensor, steps: int, strength: float) -> Tensor:
    """Return embeddings that turn from that of an image towards the difference of two texts, (steps, B, d).

    Args:
        e: embeddings of images, (B, d).
        before, after: embeddings of the texts, (1, d) or (B, d).
        steps: number of points, at least 2; the first is e.
        strength: part of the great circle to the difference at the last point, in (0, 1].

    Raises:
        ValueError: for equal texts, and values outside their range.
    """
    if steps < 2 or not 0 < strength <= 1:
        raise ValueError(
            f"steps={steps}, strength={strength}: at least 2 points, of a part in (0, 1] of the great circle"
        )
    difference = (after - before).expand_as(e)
    norm = difference.norm(dim=1, keepdim=True)
    if bool((norm < 1e-4).any()):
        raise ValueError("the texts have the same embedding, and no difference to follow")
    return torch.stack([spherical(e, difference / norm, strength * i / (steps - 1)) for i in range(steps)])


class Varied(NamedTuple):
    """Images in rows of one noise each, or variations in one row."""

    x: Tensor  # (rows, columns, *shape), on the CPU
    nfe: int  # network evaluations of each image; 0 where an ODE was solved to a tolerance


@torch.no_grad()
def vary(
    model: ImageEmbedding,
    x: Tensor,
    *,
    to: Tensor | None = None,
    texts: tuple[Tensor, Tensor] | None = None,
    n: int | None = None,
    steps: int = STEPS,
    strength: float = 0.5,
    invert: bool = False,
    seed: int = 0,
    batch_size: int = 64,
) -> Varied:
    """Draw variations of an image, or paths from it, to another image or as texts describe.

    Args:
        model: in evaluation mode.
        x: the image, (*shape).
        to: the other end of the paths, (*shape).
        texts: conditions before and after, (*condition.shape) each.
        n: number of variations, or of rows; None for 8 variations or 3 rows.
        steps: points of a path, both ends included.
        strength: part of the great circle towards the difference of the texts, in (0, 1].
        invert: whether the noise is that of the image, and of the other end, so that there is one row.
        seed: of the noise; that of row i is a function of the seed and i.
        batch_size: images drawn at once; does not change them.

    Raises:
        AbilityError: for ``invert`` of a model without a deterministic map from noise to images.
        ValueError: for two kinds of paths, equal texts, and values outside their range.
    """
    if to is not None and texts is not None:
        raise ValueError("a path leads to an image or follows texts, not both")
    x = x[None] if to is None else torch.stack([x, to])
    e, noise = model.embed_image(x), None
    path = e
    if to is not None:
        path = image_path(e[:1], e[1:], steps)[:, 0]
    elif texts is not None:
        before, after = (model.embed_text(y[None]) for y in texts)
        path = text_path(e, before, after, steps, strength)[:, 0]
    if invert:
        noise = model.invert(x, e)
        noise = (
            image_path(noise[:1], noise[1:], steps)[:, 0] if to is not None else noise.repeat_interleave(len(path), 0)
        )
    rows = 1 if invert else n or (ROWS if len(path) > 1 else VARIATIONS)
    numbers = [row for row in range(rows) for _ in range(len(path))]
    drawn, nfe = draw(model, path.repeat(rows, 1), numbers, noise=noise, seed=seed, batch_size=batch_size)
    return Varied(drawn.unflatten(0, (rows, -1) if len(path) > 1 else (1, -1)), nfe)


@torch.no_grad()
def draw(
    model: ImageEmbedding,
    e: Tensor,
    rows: Sequence[int],
    *,
    noise: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> tuple[Tensor, int]:
    """Draw images of embeddings; those of one row share their noise.

    Args:
        model: in evaluation mode.
        e: embeddings, (N, d).
        rows: number of the row of each; its noise is a function of the seed and of this number.
        noise: from ``ImageEmbedding.invert``, (N, *shape); None to draw it.
        seed: of the noise.
        batch_size: images drawn at once; does not change them.

    Returns:
        Images on the CPU, (N, *shape), and the network evaluations of each, 0 where an ODE is solved to a tolerance.
    """
    parts, nfe = [], 0
    for start in range(0, len(e), batch_size):
        some = slice(start, start + batch_size)
        rng = SampleStreams(seed, list(rows[some]), device=e.device)
        x, evaluations, _ = model.from_embedding(e[some], noise=None if noise is None else noise[some], rng=rng)
        parts.append(x.float().cpu())
        nfe = max(nfe, evaluations)
    return torch.cat(parts), nfe
