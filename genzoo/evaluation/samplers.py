"""The sampler of an evaluation: its description, and the limit on its NFE."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import nn

from genzoo.diffusion.denoiser import path_models, sampling_denoisers
from genzoo.diffusion.guidance import GuidedModel, GuidedSampler
from genzoo.diffusion.samplers import Heun
from genzoo.evaluation.describe import describe
from genzoo.model import Augmented, Composite, GenerativeModel, ImageEmbedding, LogitGuided, Unnormalised
from genzoo.numerics.random import SampleStreams
from genzoo.reranking import Reranked

HEUN_STEPS = 25  # two evaluations each but the last; shared by the denoisers of a composite model


@contextlib.contextmanager
def within_evaluations(model: GenerativeModel, limit: int | None) -> Iterator[dict[str, Any] | None]:
    """Replace a denoiser's sampler by Heun's method in 25 steps if its NFE exceeds ``limit``.

    The evaluations of guidance and of further candidates do not count, so that the sampler is the same with and without them.

    Args:
        model: the model.
        limit: largest NFE per sample; None for no limit.

    Yields:
        The description of the replaced sampler, or None.
    """
    parts: list[Any] = list(sampling_denoisers(model))
    if not parts or limit is None:
        yield None
        return
    own: list[Any] = [part.sampler for part in parts]
    replaced = None
    long = sum(sampler.steps or 0 for sampler in own) > limit
    unguided = model
    while isinstance(unguided, GuidedModel | Reranked):
        unguided = unguided.prior
    _set_samplers(parts, [s.sampler if isinstance(s, GuidedSampler) else s for s in own])
    long = long or unguided.sample(2, rng=SampleStreams(0, range(2), device=model.device)).nfe > limit
    _set_samplers(parts, own)
    if long:
        replaced = sampler_card(model)
        heun = Heun(steps=max(HEUN_STEPS // len(parts), 2))
        _set_samplers(parts, [GuidedSampler(heun, s.guidance) if isinstance(s, GuidedSampler) else heun for s in own])
    try:
        yield replaced
    finally:
        _set_samplers(parts, own)


def _set_samplers(parts: list[Any], samplers: list[Any]) -> None:
    for part, sampler in zip(parts, samplers, strict=True):
        part.sampler = sampler


def sampler_card(model: GenerativeModel) -> dict[str, Any] | None:
    """Describe the sampler of a denoiser or flow map, with all nested settings, or the chains of an energy-based model.

    None for other models. Other samplers of a composite model are under "then".
    """
    if isinstance(model, Unnormalised):
        return model.chain_settings()
    parts: list[Any] = list(path_models(model))
    cards = [describe(p.sampler.sampler if isinstance(p.sampler, GuidedSampler) else p.sampler) for p in parts]
    if not cards:
        return None
    return {**cards[0], "then": cards[1:]} if any(card != cards[0] for card in cards) else cards[0]


def guidance_card(model: GenerativeModel) -> dict[str, Any] | None:
    """Describe the guidance of samples, with the SHA-256 of other weights that it uses; None without guidance."""
    guided = False
    part: Any = model
    while isinstance(part, Composite):
        guided |= isinstance(part, GuidedModel)
        part = part.prior
    if not guided:
        return None
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


def augmentation_of(model: GenerativeModel) -> float | None:
    """Return the noise level of conditioning augmentation; None for models without it."""
    while isinstance(model, Composite):
        if isinstance(model, Augmented):
            return model.augmentation
        model = model.prior
    return None


def reranking_card(model: GenerativeModel) -> dict[str, Any] | None:
    """Describe the contrastive network that chooses among several samples, and their number; None without one."""
    return {"candidates": model.candidates, "ranker": model.name} if isinstance(model, Reranked) else None


def prior_guidance_of(model: GenerativeModel) -> float | None:
    """Return the scale of the guidance of embeddings; None for models without them."""
    while isinstance(model, Composite):
        if isinstance(model, ImageEmbedding):
            return model.prior_guidance
        model = model.prior
    return None


def sampler_label(card: dict[str, Any]) -> str:
    """Name and number of steps of a sampler."""
    steps = card.get("steps")
    return f"{card['name']}" if steps is None else f"{card['name']} in {steps} steps"
