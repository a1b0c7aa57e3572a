"""The sampler of an evaluation: its description, and the limit on its NFE."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import nn

from genzoo.diffusion.denoiser import sampling_denoiser
from genzoo.diffusion.guidance import GuidedModel, GuidedSampler
from genzoo.diffusion.samplers import Heun
from genzoo.evaluation.describe import describe
from genzoo.model import Composite, GenerativeModel, LogitGuided
from genzoo.numerics.random import SampleStreams

HEUN_STEPS = 25  # two evaluations each but the last


@contextlib.contextmanager
def within_evaluations(model: GenerativeModel, limit: int | None) -> Iterator[dict[str, Any] | None]:
    """Replace a denoiser's sampler by Heun's method in 25 steps if its NFE exceeds ``limit``.

    The evaluations of guidance do not count, so that the sampler is the same at every scale.

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
    guidance = own.guidance if isinstance(own, GuidedSampler) else None
    replaced = None
    long = (own.steps or 0) > limit
    unguided: Any = model.prior if isinstance(model, GuidedModel) else model
    part.sampler = own.sampler if isinstance(own, GuidedSampler) else own
    long = long or unguided.sample(2, rng=SampleStreams(0, range(2), device=model.device)).nfe > limit
    part.sampler = own
    if long:
        replaced = sampler_card(model)
        heun = Heun(steps=HEUN_STEPS)
        part.sampler = GuidedSampler(heun, guidance) if guidance else heun
    try:
        yield replaced
    finally:
        part.sampler = own


def sampler_card(model: GenerativeModel) -> dict[str, Any] | None:
    """Describe the sampler of a denoiser, with all nested settings; None for other models."""
    part: Any = sampling_denoiser(model)
    if part is None:
        return None
    return describe(part.sampler.sampler if isinstance(part.sampler, GuidedSampler) else part.sampler)


def guidance_card(model: GenerativeModel) -> dict[str, Any] | None:
    """Describe the guidance of samples, with the SHA-256 of other weights that it uses; None without guidance."""
    if not isinstance(model, GuidedModel):
        return None
    part: Any = model
    while isinstance(part, Composite):
        part = part.prior
    if isinstance(part, LogitGuided):
        return {"name": "ClassifierFreeGuidance", "scale": part.guidance_scale}
    guidance = part.sampler.guidance
    if not isinstance(guidance, functools.partial):
        card = describe(guidance)
        return card if isinstance(card, dict) else {"name": card}
    settings = describe({key: value for key, value in guidance.keywords.items() if not isinstance(value, nn.Module)})
    others = {
        key: {"name": type(value).__name__, "sha256": hashlib.sha256(json.dumps(describe(value)).encode()).hexdigest()}
        for key, value in guidance.keywords.items()
        if isinstance(value, nn.Module)
    }
    return {"name": guidance.func.__name__, **others, **{k: v for k, v in settings.items() if v is not None}}


def sampler_label(card: dict[str, Any]) -> str:
    """Name and number of steps of a sampler."""
    steps = card.get("steps")
    return f"{card['name']}" if steps is None else f"{card['name']} in {steps} steps"
