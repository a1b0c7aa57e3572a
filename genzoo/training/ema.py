"""Exponential moving averages of weights.

    average <- d average + (1 - d) weights,    d = min(decay, (1 + n)/(10 + n))

where ``n`` counts the updates of the very network that is averaged; the first of them, n = 0, copies. The warm-up lets
short runs forget their first steps.

References:
    Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", 1992, https://doi.org/10.1137/0330046.
    TensorFlow, ``tf.train.ExponentialMovingAverage`` (the warm-up with ``num_updates``).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def ema_decay(half_life: float | None, batch_size: int) -> float:
    """Return the decay of an average whose half-life is counted in images, as budgets and schedules are.

    Args:
        half_life: images after which a weight counts half; None for no average.
        batch_size: images of each update.

    References:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
        https://arxiv.org/abs/2206.00364 (Table 7: 0.5 million images for CIFAR-10).
    """
    if half_life is None:
        return 0.0
    if half_life <= 0:
        raise ValueError(f"the half-life of an average must be positive, or null for no average, not {half_life}")
    return 0.5 ** (batch_size / half_life)


class EMA:
    """A second copy of a model that holds the average of its weights, in evaluation mode.

    Args:
        model: whose weights are averaged.
        decay: d, in [0, 1); 0 keeps a plain copy.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of an average must be in [0, 1), not {decay}")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates: dict[str, int] = {}
        self._source = model
        self._parts: dict[str, nn.Module] = {}
        self._pairs: dict[str, tuple[list[Tensor], ...]] = {}

    def watch(self, name: str, part: nn.Module) -> None:
        """Average a part of the model under a name of its own, with its own count of updates."""
        self._parts[name] = part
        self.updates[name] = 0

    def _pair(self, part: nn.Module) -> tuple[list[Tensor], ...]:
        """List a part's averages and weights, and its averaged model's buffers and its own, in one order."""
        keys = {id(t): key for key, t in [*self._source.named_parameters(), *self._source.named_buffers()]}
        mine = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        weights: list[Tensor] = [p for p in part.parameters() if p.requires_grad]
        buffers = [b for b in part.buffers() if id(b) in keys]
        return [mine[keys[id(w)]] for w in weights], weights, [mine[keys[id(b)]] for b in buffers], buffers

    @torch.no_grad()
    def update(self, name: str) -> None:
        """Fold the present weights of a part into its average; its buffers are copied."""
        if name not in self._pairs:  # not before the first update: a move to a device replaces buffers
            self._pairs[name] = self._pair(self._parts[name])
        averages, weights, average_buffers, buffers = self._pairs[name]
        n = self.updates[name]
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        torch._foreach_lerp_(averages, weights, 1 - decay)
        if buffers:
            torch._foreach_copy_(average_buffers, buffers)
        self.updates[name] = n + 1

    @torch.no_grad()
    def hand_back(self, name: str) -> None:
        """Give a part the average of its weights."""
        # A resumed stage may end before this part's next update.
        averages, weights, _, _ = self._pairs.get(name) or self._pair(self._parts[name])
        torch._foreach_copy_(weights, averages)
