"""Agreement of samples with the captions that they were drawn for."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genzoo.data.dataset import CaptionChecker, DataSet
from genzoo.diffusion.denoiser import sampling_denoisers
from genzoo.diffusion.guidance import GuidedSampler
from genzoo.evaluation.samples import MetricResult, named
from genzoo.metrics.clip_score import WEIGHT, clip_score, contains
from genzoo.metrics.features import CONTRASTIVE, EmbeddedContrastive, FeatureNetwork, embedded, feature_network
from genzoo.metrics.likelihood import mean_and_stderr
from genzoo.model import GenerativeModel
from genzoo.numerics.random import generator


def held_out_captions(data: DataSet, n: int, seed: int) -> Tensor:
    """Choose n captions of the test split, (n, L): each equally often, up to one, in an order of the seed."""
    assert data.test.y is not None
    order = torch.randperm(len(data.test.y), generator=generator("captions", seed))
    return data.test.y[order[torch.arange(n) % len(order)]]


def scores_held_out(model: GenerativeModel, data: DataSet) -> bool:
    """Whether as many samples again are drawn, for captions of the test split."""
    captioned = model.condition is not None and data.tokenizer is not None
    return captioned and data.checker is not None and data.held_out == "test"


def attribute_scores(
    x: Tensor, captions: Sequence[str], checker: CaptionChecker, name: str, reference: str
) -> dict[str, MetricResult]:
    """Compute the fraction of samples, all of whose attributes are those of their captions.

    Args:
        x: samples as bytes, (N, C, H, W).
        captions: for which they were drawn.
        checker: reads the attributes from the pixels.
        name: of the metric.
        reference: the captions: data set and split.
    """
    each = checker.check(x, captions)
    read = torch.stack(list(each.values()))
    score = mean_and_stderr((read != 0).all(0))  # NaN: the caption omits it
    protocol = {
        "checker": checker.name,
        "checker_accuracy": checker.accuracy,
        "captions": reference,
        "captions_sha256": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
        "n_fake": len(x),
    }
    detail = {attribute: mean_and_stderr(values[~values.isnan()]).value for attribute, values in each.items()}
    return {name: MetricResult(score.value, score.stderr, protocol, {"per_attribute": detail})}


def contrastive_network(data: str, network: FeatureNetwork | None) -> EmbeddedContrastive | None:
    """Return the contrastive network that scores captions: that of the features, or the one packaged for the data, if any.

    Args:
        data: name of the data.
        network: feature network of the evaluation.
    """
    if isinstance(network, EmbeddedContrastive):
        return network
    name = f"{CONTRASTIVE}{data}"
    found = feature_network(name) if name in embedded() else None
    return found if isinstance(found, EmbeddedContrastive) else None


def clip_scores(
    x: Tensor, captions: Sequence[str], network: EmbeddedContrastive, model: GenerativeModel, reference: str
) -> dict[str, MetricResult]:
    """Compute the mean CLIP-S of samples and the captions for which they were drawn.

    Args:
        x: samples as bytes, (N, C, H, W).
        captions: for which they were drawn.
        network: a contrastive network.
        model: that drew them; the card marks one that contains the network, or is guided by it.
        reference: the captions: data set and split.
    """
    values = clip_score(x, captions, network)
    score = mean_and_stderr(values)
    protocol = {
        **network.metadata,
        "tokenizer_sha256": network.tokenizer.sha256,
        "definition": f"{WEIGHT} max(cos, 0)",
        "captions": reference,
        "captions_sha256": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
        "n_fake": len(x),
        "trained_against": trained_against(model, network),
    }
    return {named("text/clip_score", network): MetricResult(score.value, score.stderr, protocol)}


def trained_against(model: GenerativeModel, network: EmbeddedContrastive) -> bool:
    """Whether a model contains a contrastive network, or is guided by it: then its score is what the model optimises."""
    parts: list[Any] = [model]
    for denoiser in sampling_denoisers(model):
        sampler: Any = denoiser.sampler
        if isinstance(sampler, GuidedSampler) and isinstance(sampler.guidance, functools.partial):
            parts += [value for value in sampler.guidance.keywords.values() if isinstance(value, nn.Module)]
    return any(contains(part, network) for part in parts)
