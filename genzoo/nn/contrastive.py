"""Two encoders onto one unit sphere, for contrastive learning. Shapes: B batch, d of the embeddings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITIAL_SCALE = 1 / 0.07


def unit(h: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale vectors to norm 1, (B, d)."""
    return F.normalize(h.to(dtype), dim=1)


class DualEncoder(nn.Module):
    """Encoders of events and of their conditions, such as images and captions, onto one unit sphere.

    Args:
        image: encoder of events, to d features.
        text: encoder of conditions.
        text_width: features of ``text``, which are projected to d.
        dim: d.

    Attributes:
        log_scale: logarithm of the factor kappa of a cosine in the logit of a pair.

    References:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
        https://arxiv.org/abs/2103.00020 (figure 3; section 2.5: the first scale).
    """

    def __init__(self, image: nn.Module, text: nn.Module, text_width: int, dim: int):
        super().__init__()
        self.image, self.text = image, text
        self.project = nn.Linear(text_width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_SCALE)))

    def embed_image(self, *inputs: Tensor | None) -> Tensor:
        """Embed events by the inputs of their encoder, -> (B, d) of norm 1."""
        return unit(self.image(*inputs), self.log_scale.dtype)

    def embed_text(self, y: Tensor) -> Tensor:
        """Embed conditions, (B, *condition.shape) -> (B, d) of norm 1."""
        return unit(self.project(self.text(y)), self.log_scale.dtype)
