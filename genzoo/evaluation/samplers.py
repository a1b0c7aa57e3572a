"""The sampler of an evaluation: its description, and the limit on its NFE."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from genzoo.diffusion.denoiser import sampling_denoiser
from genzoo.diffusion.samplers import Heun
from genzoo.evaluation.describe import describe
from genzoo.model import GenerativeModel
from genzoo.numerics.random import SampleStreams

HEUN_STEPS = 25  # two evaluations each but the last


@contextlib.contextmanager
def within_evaluations(model: GenerativeModel, limit: int | None) -> Iterator[dict[str, Any] | None]:
    """Replace a denoiser's sampler by Heun's method in 25 steps if its NFE exceeds ``limit``.

    Args:
        model: the model.
        limit: largest NFE per sample; None for no limit.

    Yields:
        The description of the replaced sampler, or None.
    """
    part: Any = sampling_denoiser(model)
    if part is None or limit is None:
        yield None
        return
    own: Any = part.sampler
    replaced = None
    long = (own.steps or 0) > limit
    if long or model.sample(2, rng=SampleStreams(0, range(2), device=model.device)).nfe > limit:
        replaced = sampler_card(model)
        part.sampler = Heun(steps=HEUN_STEPS)
    try:
        yield replaced
    finally:
        part.sampler = own


def sampler_card(model: GenerativeModel) -> dict[str, Any] | None:
    """Describe the sampler of a denoiser, with all nested settings; None for other models."""
    part: Any = sampling_denoiser(model)
    return None if part is None else describe(part.sampler)


def sampler_label(card: dict[str, Any]) -> str:
    """Name and number of steps of a sampler."""
    steps = card.get("steps")
    return f"{card['name']}" if steps is None else f"{card['name']} in {steps} steps"
