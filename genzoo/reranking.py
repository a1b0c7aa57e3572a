r"""Re-ranking: of several samples of a condition the one that a contrastive network finds closest to it.

    x = argmax_j f(x_j) . g(c),      x_1, ..., x_m ~ p(x | c)

with the embeddings f of samples and g of conditions on one unit sphere, at m times the cost. The density of the model is not
that of the samples that are kept.

References:
    Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, https://arxiv.org/abs/2102.12092 (section 2.6; figure 9c: the
    number of candidates).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genzoo.model import Composite, GenerativeModel, Loss, Samples, SharedEmbedding


class Reranked(Composite):
    """A model that keeps the best of several candidates.

    Candidate j of sample i is a function of the seed, i and j; the first one is the sample of the model itself.

    Args:
        model: draws the candidates; conditional.
        ranker: embeds samples and conditions.
        candidates: m, for each sample.
        translate: maps conditions of the model to those of the ranker; None where they are the same.
        name: of the ranker, for the cards of scores.

    Raises:
        ValueError: for an unconditional model, and a ranker of other events or conditions.
    """

    def __init__(
        self,
        model: GenerativeModel,
        ranker: SharedEmbedding,
        candidates: int,
        translate: Callable[[Tensor], Tensor] | None = None,
        name: str = "",
    ):
        if candidates < 1:
            raise ValueError(f"candidates must be at least 1, not {candidates}")
        if model.condition is None:
            raise ValueError("ranker: the model is unconditional, and its samples have no text that ranks them")
        if ranker.event != model.event:
            raise ValueError(f"ranker: embeds {ranker.event}, not {model.event}")
        if translate is None and ranker.condition != model.condition:
            raise ValueError(f"ranker: embeds {ranker.condition}, not {model.condition}")
        super().__init__(model.event, model.condition)
        self.prior, self.ranker, self.candidates, self.translate, self.name = model, ranker, candidates, translate, name
        self.conditioner = model.conditioner
        self.to(model.device, model.dtype)

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        """Return the loss of the model; re-ranking acts on samples alone."""
        return self.prior._loss(x, y, rng)

    def from_prior(self, event: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Tensor:
        return event

    def _sample(self, n: int, y: Tensor | None, rng: torch.Generator | None) -> Samples:
        assert y is not None
        c = y if self.translate is None else self.translate(y)
        drawn = [self.prior._sample(n, y, rng) for _ in range(self.candidates)]
        x = torch.stack([samples.x for samples in drawn])
        best = torch.stack([self.ranker.similarity(each, c) for each in x]).argmax(0)
        return Samples(x[best, torch.arange(n, device=x.device)], sum(samples.nfe for samples in drawn))
