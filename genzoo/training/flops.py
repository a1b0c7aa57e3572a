"""Floating-point operations of training steps.

What torch's ``FlopCounterMode`` counts: matrix products, convolutions and attention, forward and backward, a multiplication
with its addition as two. Point-wise operations, norms and the optimiser are not counted; they are of lower order.

Steps of one kind, the turns of a player in a stage, all cost the same: one is counted for all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

COUNTED = "torch.utils.flop_counter, forward and backward of one step of each kind times their number"


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _mapping() -> dict[Any, Callable[..., int]]:
    """Name what torch computes on a CPU and does not count."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }


class _Whole(contextlib.nullcontext[None]):
    """Stands in for the tracker of modules, whose hooks refuse the second derivatives of a gradient penalty."""

    parents = ("Global",)


def count(work: Callable[[], object]) -> int:
    """Return the operations of some work.

    What is counted is computed in other kernels and may differ in its last bits.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_mapping())
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    with counter:
        work()
    return counter.get_total_flops()
