"""Errors of memory, disks and loader processes in one line, and messages on stderr."""

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
    """Say something about the run that is no part of its result."""
    log_stderr(one_line(message))


@contextlib.contextmanager
def resources(path: Path, batch_size: int, key: str = "trainer.batch_size") -> Iterator[None]:
    """Name what has given out: the memory, the disk, or a process that loads data.

    Args:
        path: where files are written.
        batch_size: of the work.
        key: where the size of a batch is set.

    Raises:
        ResourceError: with what may help.
        UsageError: for an operator that has no deterministic implementation where one was asked for.
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
            raise ResourceError(f"a process that loads data has died: {text[:200]}; say trainer.workers=0") from error
        raise


def quiet() -> None:
    """Keep Lightning's notices, which speak of settings that are ours, out of the user's terminal."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"pytorch_lightning\..*")
    warnings.filterwarnings("ignore", category=UserWarning, message=r".*(num_workers|dataloader|lr_scheduler).*")
