r"""A batch that several processes share: what each must know of the others' part of it.

Data-parallel training gives each of W processes, the ranks of ``torch.distributed``, an equal share of every batch. A loss
that is a mean over examples needs no more than the mean of the ranks' gradients. Whatever looks at a batch as a whole, the
moments of a batch norm or the counts of a codebook, must also see the other shares, or W ranks train another model than one
process would on the same batch.

With L_s the loss of rank s and theta_r the weights as rank r holds them, the gradient of the mean loss is

    d/dtheta 1/W sum_s L_s = 1/W sum_r d(sum_s L_s)/dtheta_r.

The derivative of a sum over ranks is again one: what rank r put in reached every loss. With ``all_reduce_sum`` in the
forward pass
and in the backward pass, ``backward`` on all ranks therefore leaves d(sum_s L_s)/dtheta_r on rank r, and the mean over ranks
is right, whatever the losses know of each other.

In one process nothing here computes anything. Over several, every rank must make the same calls in the same order; families
and networks make them in training mode alone, so that one rank may sample or evaluate while the others wait elsewhere.

References:
    Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1982,
    https://doi.org/10.1007/978-3-642-51461-6_3 (moments of parts and of the whole).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False  # whether this process computes something that the others do not


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Compute as a process without others in this context; nothing is exchanged."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    """Return how many ranks share a batch: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Return which of the ranks this process is: 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllSum.apply(grad)


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum over ranks, the same on all of them; it can be differentiated any number of times."""
    return x if world_size() == 1 else _AllSum.apply(x)


def all_reduce_mean(x: Tensor) -> Tensor:
    """Return the mean over ranks, the same on all of them; it can be differentiated any number of times."""
    return x if world_size() == 1 else _AllSum.apply(x) / world_size()


def all_gather(x: Tensor) -> Tensor:
    """Return what all ranks hold, in the order of the ranks, (...) -> (W, ...)."""
    if world_size() == 1:
        return x[None]
    slots = [torch.zeros_like(x)] * world_size()
    slots[rank()] = x
    return _AllSum.apply(torch.stack(slots))


def pooled_moments(variance: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the moments of a batch from those of one rank's share of it; variances have the divisor n."""
    if world_size() == 1:
        return variance, mean
    variances, means = all_gather(torch.stack([variance, mean])).unbind(1)
    return variances.mean(0) + means.var(0, correction=0), means.mean(0)


def all_reduce_minmax(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest value of a batch from those of one rank's share of it."""
    if world_size() == 1:
        return low, high
    lows, highs = all_gather(torch.stack([low, high])).unbind(1)
    return lows.amin(0), highs.amax(0)


def broadcast(x: Tensor, source: int = 0) -> Tensor:
    """Return what one rank holds, by default the first; for draws that are not of one example each. It has no gradient."""
    if world_size() > 1:
        dist.broadcast(x, source)
    return x
