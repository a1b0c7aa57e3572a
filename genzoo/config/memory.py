"""Memory limit of models: parameters and buffers are counted as modules register them.

Oversized models, as by a width with an additional zero, are rejected before their memory is touched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TENSORS = 10_000  # per model
NUMBERS = 2**27  # elements per tensor


def memory() -> int:
    """Bytes of memory of this machine or container."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    path = Path("/sys/fs/cgroup/memory.max")
    limit = path.read_text().strip() if path.is_file() else ""
    return min(installed, int(limit)) if limit.isdigit() else installed


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Limit the modules built within a block to half of the memory and ``TENSORS`` tensors.

    Raises:
        MemoryError: at the first tensor beyond a limit.
    """
    from torch.nn.modules.module import register_module_buffer_registration_hook as on_buffer
    from torch.nn.modules.module import register_module_parameter_registration_hook as on_parameter

    most = memory() // 2
    size = count = 0

    def register(module: Any, name: str, tensor: Any) -> None:
        nonlocal size, count
        if tensor is not None:
            size, count = size + tensor.nbytes, count + 1
        if tensor is not None and tensor.numel() > NUMBERS:
            raise MemoryError(f"{type(module).__name__}.{name} of {list(tensor.shape)}: more than {NUMBERS:,} numbers")
        if size > most:
            raise MemoryError(f"more than {most / 1e9:.3g} GB of weights, half of the memory of this machine")
        if count > TENSORS:
            raise MemoryError(f"more than {TENSORS:,} tensors of weights")

    hooks = on_parameter(register), on_buffer(register)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
