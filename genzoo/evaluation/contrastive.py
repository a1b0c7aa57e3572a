"""Retrieval accuracy and loss of contrastive networks on the test split."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from genzoo.console import status_line
from genzoo.distributions.discretization import bin_center
from genzoo.evaluation.density import split_sha256
from genzoo.evaluation.records import to_record
from genzoo.evaluation.samples import subset
from genzoo.evaluation.settings import EvalSettings
from genzoo.metrics.likelihood import mean_and_stderr
from genzoo.model import SharedEmbedding

CANDIDATES = 100  # of which one is right


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
def contrastive(model: SharedEmbedding, data: Any, settings: EvalSettings, setting: dict[str, Any]) -> dict[str, Any]:
    """Compute the loss, and the accuracy of finding the text of an image and the image of a text among candidates.

    Args:
        model: in evaluation mode.
        data: with conditions.
        settings: of the evaluation.
        setting: of the model, for the cards.
    """
    split, of = data.scored
    chosen = subset(len(of.x), settings.events)
    images, texts = [], []
    for rows in chosen.split(settings.batch_size):
        x = of.x[rows].to(model.device)
        x = (x if data.levels is None else bin_center(x, data.levels)).to(model.dtype)
        images.append(model.embed_image(x))
        texts.append(model.embed_text(of.y[rows].to(model.device)))
        status_line(f"embedding {sum(map(len, images))}/{len(chosen)}")
    sets = candidate_sets(of.y[chosen], CANDIDATES).to(model.device)
    u, v = (torch.cat(parts)[sets] for parts in (images, texts))  # (sets, C, d)
    logits = model.scale * u @ v.mT
    return _scores(logits, "", _protocol(split, of.x[chosen], sets), setting)


def _protocol(split: str, x: Tensor, sets: Tensor) -> dict[str, Any]:
    used = x[sets.flatten().cpu()]
    return {"split": split, "split_sha256": split_sha256(used), "n": len(used), "candidates": sets.shape[1]}


def _scores(logits: Tensor, suffix: str, protocol: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """Return the records of logits of images and texts, (sets, C, C)."""
    right = torch.arange(logits.shape[1], device=logits.device)
    of_images, of_texts = logits.double().log_softmax(2), logits.double().log_softmax(1)
    losses = -0.5 * (of_images + of_texts).diagonal(dim1=1, dim2=2)
    found = {
        "loss": losses,
        "image_to_text": (of_images.argmax(2) == right).double(),
        "text_to_image": (of_texts.argmax(1) == right).double(),
    }
    records = {}
    for name, values in found.items():
        score = mean_and_stderr(values.flatten().cpu())
        name = f"retrieval/{name}{suffix}"
        records[name] = to_record(name, score.value, score.stderr, protocol, setting)
    return records
