"""How large a model may be: weights are counted as they are made, before anything is written into their memory.

A width with a zero too many would otherwise take the machine down with it, minutes later.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TENSORS = 10_000  # of one model
NUMBERS = 2**27  # of one of them


def memory() -> int:
    """Bytes of memory of this machine, or of the container that we are in."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else ""
    return min(installed, int(said)) if said.isdigit() else installed


@contextlib.contextmanager
def within_memory() -> Iterator[None]:
    """Refuse to build modules whose weights fill more than half of the memory, or never end.

    Raises:
        MemoryError: at the first tensor that is too much.
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
