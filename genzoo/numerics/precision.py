"""What a GPU computes by default that a CPU does not: TensorFloat-32, and sums in an order that differs between runs.

TensorFloat-32 (TF32) rounds the inputs of a product from 24 to 11 bits. cuDNN uses it for convolutions in float32 unless told
otherwise, so that "float32" means two precisions on two devices. ``full_float32`` turns it off where numbers are made that are
reported as float32: samples, densities, features and scores.

``deterministic`` makes operators with several implementations choose the one that gives the same bits in every run.

References:
    PyTorch, "Numerical accuracy", https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html (TF32).
    PyTorch, "Reproducibility", https://docs.pytorch.org/docs/stable/notes/randomness.html.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products and convolutions with all 24 bits, on a GPU as on a CPU; also a decorator."""
    backends: Any = torch.backends
    operators = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [operator.fp32_precision for operator in operators]
    for operator in operators:
        operator.fp32_precision = "ieee"
    try:
        yield
    finally:
        for operator, precision in zip(operators, before, strict=True):
            operator.fp32_precision = precision


def deterministic(enabled: bool) -> None:
    """Let torch compute the same bits in every run on the same device, or stop doing so.

    Operators without such an implementation raise a ``RuntimeError`` that names them. cuBLAS reads its setting when it is first
    used: call this before anything is computed.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(enabled)


def cumulative_sum(x: Tensor, dim: int) -> Tensor:
    """``x.cumsum(dim)``; by a triangular product on a GPU in deterministic mode, where cumsum has no implementation."""
    if x.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(dim)
    return triangular_sum(x, dim)


def triangular_sum(x: Tensor, dim: int) -> Tensor:
    """Cumulative sum along ``dim`` as a product with a triangle of ones, in n^2 memory for n entries."""
    upper = torch.ones(x.shape[dim], x.shape[dim], dtype=x.dtype, device=x.device).triu()
    return (x.movedim(dim, -1) @ upper).movedim(-1, dim)
