r"""The Gumbel-softmax relaxation of categorical variables, and the annealing of its temperature.

With logits l and independent Gumbel noise ``g = -log(-log u)``, u uniform, ``argmax_k (l_k + g_k)`` is categorical with
probabilities ``softmax(l)``. The relaxed sample

    y = softmax((l + g)/tau)

is differentiable in l, and becomes one-hot as tau -> 0. Its probability that component k is the largest is softmax(l)_k at
every temperature.

References:
    Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", 2017, https://arxiv.org/abs/1611.01144 (eq. 1, 2).
    Maddison, Mnih, Teh, "The Concrete Distribution", 2017, https://arxiv.org/abs/1611.00712.
"""

from __future__ import annotations

import torch
from torch import Tensor

from genzoo.numerics.annealing import CosineAnnealing
from genzoo.numerics.random import rand


def gumbel_softmax(logits: Tensor, temperature: Tensor | float, rng: torch.Generator | None = None) -> Tensor:
    """Draw relaxed one-hot samples.

    Args:
        logits: (B, K, ...), float32 or better.
        temperature: tau.
        rng: source of randomness.

    Returns:
        Of the same shape; they sum to 1 over dimension 1.
    """
    u = rand(logits.shape, rng=rng, device=logits.device, dtype=logits.dtype)
    # Float32 noise is a multiple of 2^-24: half of it in place of 0, which has no logarithm.
    gumbel = -torch.log(-torch.log(u.clamp_(min=2.0**-25)))
    return torch.softmax((logits + gumbel) / temperature, dim=1)


class Temperature(CosineAnnealing):
    """A temperature tau annealed from ``start`` to ``end`` by a cosine.

    Args:
        start, end, images: as in ``CosineAnnealing``.

    Raises:
        ValueError: for temperatures that are not positive.
    """

    def __init__(self, start: float, end: float, images: int):
        super().__init__(start, end, images)
        for name, value in {"temperature": start, "final_temperature": end}.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")
