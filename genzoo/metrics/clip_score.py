r"""Agreement of images with captions in the space of a contrastive network.

    CLIP-S(x, c) = w max(f(x) . g(c), 0),    w = 2.5

with the embeddings f of the image and g of the caption, of norm 1. It depends on the network, whose name is part of the
metric's. A model that contains the network, or was guided by it, was trained for this score: cards mark it.

References:
    Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", 2021,
    https://arxiv.org/abs/2104.08718 (section 3; w in section 3.1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genzoo.metrics.cat_metric import CatMetric
from genzoo.metrics.features import EmbeddedContrastive
from genzoo.nn.contrastive import DualEncoder

WEIGHT = 2.5  # w


def clip_score(x: Tensor, captions: Sequence[str], network: EmbeddedContrastive, batch_size: int = 250) -> Tensor:
    """Compute CLIP-S of each image and its caption, (N,) float64.

    Args:
        x: images, uint8 (N, C, H, W).
        captions: N texts.
        network: a contrastive network.
        batch_size: of its images.

    Raises:
        ValueError: for another number of captions.
    """
    if len(x) != len(captions):
        raise ValueError(f"captions: {len(captions)} for {len(x)} images")
    f = network.extract(x, batch_size).features.double()
    cosine = torch.cosine_similarity(f, network.embed_text(captions).double(), dim=1)
    return WEIGHT * cosine.clamp(min=0)


class ClipScore(CatMetric):
    """Mean CLIP-S of images and captions.

    Args:
        network: a contrastive network.
    """

    def __init__(self, network: EmbeddedContrastive, **kwargs: Any):
        super().__init__(torch.mean, torch.float64, **kwargs)
        self.scored_by = (network,)  # a tuple hides it from the metric's state

    def update(self, x: Tensor, captions: Sequence[str]) -> None:  # type: ignore[override]
        """Add images, uint8 (N, C, H, W), and their captions."""
        (network,) = self.scored_by
        super().update(clip_score(x, captions, network).to(self.device))


def weights_sha256(network: DualEncoder) -> str:
    """SHA-256 of the weights of a contrastive network, in float32."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def contains(model: nn.Module, network: EmbeddedContrastive) -> bool:
    """Whether a model contains a contrastive network, with the same weights, anywhere."""
    found = (module for module in model.modules() if isinstance(module, DualEncoder))
    own = weights_sha256(network.network)
    return any(weights_sha256(module) == own for module in found)
