"""Retrieval accuracy and loss of contrastive networks on the split of the scores."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from genzoo.console import status_line
from genzoo.diffusion.guidance import NoisyEmbedding
from genzoo.diffusion.noisy import with_noise
from genzoo.distributions.discretization import bin_center
from genzoo.evaluation.density import split_sha256
from genzoo.evaluation.records import to_record
from genzoo.evaluation.samples import subset
from genzoo.evaluation.settings import EvalSettings
from genzoo.metrics.likelihood import mean_and_stderr
from genzoo.model import SharedEmbedding
from genzoo.numerics.random import SampleStreams

CANDIDATES = 100  # of which one is right
DRAWS = 8  # of noise levels and noise for each example


def candidate_sets(y: Tensor, size: int) -> Tensor:
    """Divide examples into sets whose conditions are distinct, (sets, min(size, number of distinct conditions)) int64.

    Examples that do not fill a set are left out.

    Args:
        y: conditions, (N, *condition.shape).
        size: of a set, at most.
    """
    _, kind = torch.unique(y, dim=0, return_inverse=True)
    size = min(size, int(kind.max()) + 1)
    layers = defaultdict[int, list[int]](list)  # by how many equal conditions come before
    before = defaultdict[int, int](int)
    for i, k in enumerate(kind.tolist()):
        layers[before[k]].append(i)
        before[k] += 1
    chunks = [torch.tensor(layer[: len(layer) // size * size]).view(-1, size) for layer in layers.values()]
    return torch.cat(chunks).long()


@torch.no_grad()
def retrieval(model: SharedEmbedding, data: Any, settings: EvalSettings, setting: dict[str, Any]) -> dict[str, Any]:
    """Compute the loss, and the accuracy of finding the text of an image and the image of a text among candidates.

    Args:
        model: in evaluation mode.
        data: with conditions.
        settings: of the evaluation.
        setting: of the model, for the cards.
    """
    split, of = data.scored
    chosen = subset(len(of.x), settings.events)
    draws = DRAWS if isinstance(model, NoisyEmbedding) else 0
    images: list[list[Tensor]] = [[] for _ in range(1 + draws)]
    texts = list[Tensor]()
    for rows in chosen.split(settings.batch_size):
        x = of.x[rows].to(model.device)
        x = (x if data.levels is None else bin_center(x, data.levels)).to(model.dtype)
        images[0].append(model.embed_image(x))
        texts.append(model.embed_text(of.y[rows].to(model.device)))
        rng = SampleStreams(setting["seed"], rows.tolist(), device=model.device)
        for found in images[1:]:
            assert isinstance(model, NoisyEmbedding)
            found.append(model.embed_noisy(*with_noise(x, rng)))
        status_line(f"embedding {sum(map(len, texts))}/{len(chosen)}")
    sets = candidate_sets(of.y[chosen], CANDIDATES).to(model.device)
    v = torch.cat(texts)[sets]  # (sets, C, d)
    logits = [model.scale * torch.cat(found)[sets] @ v.mT for found in images]
    used = of.x[chosen][sets.flatten().cpu()]
    protocol = {"split": split, "split_sha256": split_sha256(used), "n": len(used), "candidates": sets.shape[1]}
    values = _values(logits[0])
    records = {name: _record(name, value, protocol, setting) for name, value in values.items()}
    if draws:
        noise = {**protocol, "noise": "cos(a) x + sin(a) eps, a uniform in [0, pi/2]", "draws": draws}
        noisy = [_values(some) for some in logits[1:]]
        for name in ("retrieval/loss", "retrieval/image_to_text"):
            mean = torch.stack([value[name] for value in noisy]).mean(0)
            records[f"{name}_noisy"] = _record(f"{name}_noisy", mean, noise, setting)
    return records


def _values(logits: Tensor) -> dict[str, Tensor]:
    """Return the scores of each pair from the logits of images and texts, (sets, C, C) -> (sets * C,)."""
    right = torch.arange(logits.shape[1], device=logits.device)
    of_images, of_texts = logits.double().log_softmax(2), logits.double().log_softmax(1)
    values = {
        "retrieval/loss": -0.5 * (of_images + of_texts).diagonal(dim1=1, dim2=2),
        "retrieval/image_to_text": (of_images.argmax(2) == right).double(),
        "retrieval/text_to_image": (of_texts.argmax(1) == right).double(),
    }
    return {name: value.flatten().cpu() for name, value in values.items()}


def _record(name: str, values: Tensor, protocol: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    score = mean_and_stderr(values)
    return to_record(name, score.value, score.stderr, protocol, setting)
