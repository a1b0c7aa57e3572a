"""One-line errors of memory, disks and loader workers, and log lines on stderr."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from genzoo.console import log_stderr
from genzoo.errors import UsageError, one_line
from genzoo.runs import ResourceError, writing


def log_line(message: str) -> None:
    """Write one line to stderr."""
    log_stderr(one_line(message))


@contextlib.contextmanager
def resources(path: Path, batch_size: int, key: str = "trainer.batch_size") -> Iterator[None]:
    """Convert errors of memory, disk and loader workers.

    Args:
        path: where files are written.
        batch_size: current batch size.
        key: configuration key of the batch size.

    Raises:
        ResourceError: with a remedy.
        UsageError: for an operator without a deterministic implementation, with ``trainer.deterministic=true``.
    """
    import torch

    try:
        with writing(path):
            yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, ResourceError):
            raise
        text = one_line(error)
        smaller = f"try {key}={max(batch_size // 2, 1)}"
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise ResourceError(f"out of memory with {key}={batch_size}: {smaller}: {text[:200]}") from error
        if "deterministic implementation" in text:
            raise UsageError(f"trainer.deterministic=true: {text[:200]}") from error
        if "DataLoader worker" in text:
            raise ResourceError(f"a data loader worker died: {text[:200]}; set trainer.workers=0") from error
        raise


def quiet() -> None:
    """Suppress Lightning's notices, which refer to settings that genzoo controls."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")
    warnings.filterwarnings("ignore", category=UserWarning, message=r".*(num_workers|dataloader|lr_scheduler).*")
