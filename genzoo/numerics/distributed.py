r"""Differentiable collectives for statistics of a global batch in data-parallel training.

Data-parallel training splits every global batch equally over W ranks. For a loss that is a mean over examples it suffices to
average gradients over ranks. Batch statistics, such as the moments of batch norm or the counts of a codebook, must be computed
on the global batch, for W ranks to train the same model as a single process.

With L_s the loss of rank s and theta_r the weights as rank r holds them, the gradient of the mean loss is

    d/dtheta 1/W sum_s L_s = 1/W sum_r d(sum_s L_s)/dtheta_r.

The derivative of an all-reduced sum is an all-reduced sum. With ``all_reduce_sum`` in the forward and in the backward pass,
``backward`` on all ranks gives d(sum_s L_s)/dtheta_r on rank r, and the mean over ranks is the gradient of the mean loss.

In a single process all functions are no-ops. Otherwise every rank must make the same calls in the same order; families and
networks make them in training mode only, so that a single rank may sample or evaluate.

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

_single_process = False  # whether collectives are disabled


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Disable collectives in this context."""
    global _single_process
    before, _single_process = _single_process, True
    try:
        yield
    finally:
        _single_process = before


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _single_process else 1


def rank() -> int:
    """Rank of this process, 0 without a process group."""
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
    """Sum over ranks, differentiable to any order."""
    return x if world_size() == 1 else _AllSum.apply(x)


def all_reduce_mean(x: Tensor) -> Tensor:
    """Mean over ranks, differentiable to any order."""
    return x if world_size() == 1 else _AllSum.apply(x) / world_size()


def all_gather(x: Tensor) -> Tensor:
    """Stack x of all ranks, (...) -> (W, ...)."""
    if world_size() == 1:
        return x[None]
    slots = [torch.zeros_like(x)] * world_size()
    slots[rank()] = x
    return _AllSum.apply(torch.stack(slots))


def pooled_moments(variance: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of the global batch from those of the local batches; variances are biased, with divisor n."""
    if world_size() == 1:
        return variance, mean
    variances, means = all_gather(torch.stack([variance, mean])).unbind(1)
    return variances.mean(0) + means.var(0, correction=0), means.mean(0)


def all_reduce_minmax(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum over the global batch from those of the local batches."""
    if world_size() == 1:
        return low, high
    lows, highs = all_gather(torch.stack([low, high])).unbind(1)
    return lows.amin(0), highs.amax(0)


def broadcast(x: Tensor, source: int = 0) -> Tensor:
    """Broadcast x from rank ``source``, without gradient."""
    if world_size() > 1:
        dist.broadcast(x, source)
    return x
