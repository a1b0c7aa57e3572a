"""Numerical precision and determinism on GPUs.

TensorFloat-32 (TF32) rounds the inputs of a product from 24 to 11 bits, by default in float32 convolutions of cuDNN.
``full_float32`` disables it for reported numbers: samples, densities, features and scores.

``deterministic`` selects deterministic implementations of operators.

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
    """Disable TF32 in this context; also a decorator."""
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
    """Enable or disable bitwise reproducible computation on the same device.

    Operators without a deterministic implementation raise a ``RuntimeError``. cuBLAS reads its setting at its first use: call
    this before any computation.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(enabled)


def cumulative_sum(x: Tensor, dim: int) -> Tensor:
    """``x.cumsum(dim)``; by a triangular product on a GPU in deterministic mode, which cumsum does not support."""
    if x.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(dim)
    return triangular_sum(x, dim)


def triangular_sum(x: Tensor, dim: int) -> Tensor:
    """Cumulative sum along ``dim`` as a product with a triangular matrix, in n^2 memory."""
    upper = torch.ones(x.shape[dim], x.shape[dim], dtype=x.dtype, device=x.device).triu()
    return (x.movedim(dim, -1) @ upper).movedim(-1, dim)
