"""Paths of embeddings: their ends, their norms, and the noise that the points of a row share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genzoo.conditions import Vector
from genzoo.event import EventSpec
from genzoo.families.ddpm import DDPM
from genzoo.latents import spherical
from genzoo.model import AbilityError, ImageEmbedding, Loss, Samples
from genzoo.numerics.random import generator, randn
from genzoo.variations import draw, image_path, text_path, varied_model


def sphere(n: int, d: int = 5, name: str = "sphere") -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator(name), dtype=torch.float64), dim=1)


def angle(a: Tensor, b: Tensor) -> Tensor:
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def test_a_path_between_images_is_a_great_circle_at_constant_speed():
    start, end = sphere(4, name="start"), sphere(4, name="end")
    path = image_path(start, end, 6)
    assert torch.equal(path[0], start) and torch.equal(path[-1], end)
    torch.testing.assert_close(path.norm(dim=2), torch.ones(6, 4).double())
    for i in range(6):
        torch.testing.assert_close(angle(start, path[i]), angle(start, end) * i / 5)


def test_a_path_of_texts_turns_towards_their_difference():
    e, before, after = sphere(4), sphere(1, name="before"), sphere(1, name="after")
    path = text_path(e, before, after, 5, strength=0.4)
    toward = ((after - before) / (after - before).norm()).expand(4, -1)
    assert torch.equal(path[0], e)
    torch.testing.assert_close(path.norm(dim=2), torch.ones(5, 4).double())
    for i in range(5):
        torch.testing.assert_close(angle(e, path[i]), 0.4 * angle(e, toward) * i / 4)
        torch.testing.assert_close(path[i], spherical(e, toward, 0.4 * i / 4))
    assert float((path[-1] @ toward[0]).min()) > float((e @ toward[0]).min())
    torch.testing.assert_close(text_path(e, before, after, 3, 1.0)[-1], toward)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda e: image_path(e, e, 1), "steps must be at least 2, not 1"),
        (lambda e: text_path(e, e[:1], e[1:2], 1, 0.5), "steps=1"),
        (lambda e: text_path(e, e[:1], e[1:2], 3, 0.0), r"strength=0.0: .* in \(0, 1\]"),
        (lambda e: text_path(e, e[:1], e[:1], 3, 0.5), "the same embedding"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build(sphere(2))


class Echo(ImageEmbedding):
    """An event is the embedding, and noise."""

    def __init__(self):
        super().__init__(EventSpec((5,)), Vector(5))
        self.embedding_dim, self.prior_guidance = 5, 1.0

    def _from_embedding(self, e, y, noise, rng) -> Samples:
        return Samples(e + (randn(e.shape, rng=rng, dtype=e.dtype) if noise is None else noise), nfe=4)

    def _embed_image(self, x):
        return x

    _embed_text = _embed_image

    def _invert(self, x, e, y):
        return x - e

    def check_prior_guidance(self, scale):
        pass

    def _loss(self, x, y, rng):
        return Loss(x.sum(), {})

    def _sample(self, n, y, rng):
        return self._from_embedding(y, None, None, rng)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_points_of_a_row_share_their_noise_and_rows_do_not(batch_size):
    e, rows = sphere(12), [0, 0, 0, 1, 1, 1, 5, 5, 5, 0, 1, 5]
    x, nfe = draw(Echo(), e, rows, seed=3, batch_size=batch_size)
    noise = (x.double() - e).float()
    assert nfe == 4 and x.dtype == torch.float32
    by_row = {row: noise[[i for i, r in enumerate(rows) if r == row]] for row in (0, 1, 5)}
    assert all(float((found - found[0]).abs().max()) < 1e-6 for found in by_row.values())
    assert float((by_row[0][0] - by_row[1][0]).abs().max()) > 0.1
    whole = draw(Echo(), e, rows, seed=3)[0]
    torch.testing.assert_close(x, whole)
    assert not torch.allclose(draw(Echo(), e, rows, seed=4)[0], whole)


def test_given_noise_replaces_drawn_noise():
    e, noise = sphere(3), torch.randn(3, 5, generator=generator("noise"), dtype=torch.float64)
    x, _ = draw(Echo(), e, [0, 1, 2], noise=noise, batch_size=2)
    torch.testing.assert_close(x, (e + noise).float())


def test_other_families_have_no_variations():
    with pytest.raises(AbilityError, match="DDPM draws no images of an embedding: choose unclip"):
        varied_model(DDPM((2,)))
    assert math.isclose(varied_model(model := Echo()).prior_guidance, 1.0) and varied_model(model) is model
