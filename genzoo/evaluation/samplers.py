"""The sampler of a model: its description, and the limit on its evaluations."""

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
    """Exchange a denoiser's sampler for Heun's method in 25 steps where a sample takes more than ``limit`` evaluations.

    Args:
        model: whose sampler.
        limit: evaluations that a sample may take; None for no limit.

    Yields:
        The card of the sampler that was exchanged, None where it was not.
    """
    part: Any = sampling_denoiser(model)
    if part is None or limit is None:
        yield None
        return
    own: Any = part.sampler
    replaced = None
    long = (own.steps or 0) > limit  # and need not be tried
    if long or model.sample(2, rng=SampleStreams(0, range(2), device=model.device)).nfe > limit:
        replaced = sampler_card(model)
        part.sampler = Heun(steps=HEUN_STEPS)
    try:
        yield replaced
    finally:
        part.sampler = own


def sampler_card(model: GenerativeModel) -> dict[str, Any] | None:
    """Describe the sampler of a denoiser: its name, its settings, and likewise all that it is made of."""
    part: Any = sampling_denoiser(model)
    return None if part is None else describe(part.sampler)


def brief(card: dict[str, Any]) -> str:
    """Name a sampler and its steps."""
    steps = card.get("steps")
    return f"{card['name']}" if steps is None else f"{card['name']} in {steps} steps"
