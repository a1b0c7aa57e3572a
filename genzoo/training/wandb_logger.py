"""wandb as a view of a run: its failures are none of the run's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pytorch_lightning.loggers import WandbLogger

from genzoo.console import log_stderr
from genzoo.runs.redact import redact


class FaultTolerantWandbLogger(WandbLogger):
    """Lightning's logger for wandb, whose failures end no run: it says so once, and the run goes on without it."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.lost = False
        self._wandb_init.pop("anonymous", None)  # Lightning always sets it, and wandb warns of it

    def quietly(self, work: Callable[[], object]) -> None:
        """Do something with wandb, unless it has failed before."""
        if self.lost:
            return
        try:
            work()
        except Exception as error:
            self.lost = True
            log_stderr(f"wandb fails, and the run goes on without it: {redact(repr(error))}")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.quietly(lambda: super(FaultTolerantWandbLogger, self).log_metrics(metrics, step))

    def log_image(self, key: str, images: list[Any], step: int | None = None, **details: Any) -> None:
        self.quietly(lambda: super(FaultTolerantWandbLogger, self).log_image(key, images, step, **details))

    def finalize(self, status: str) -> None:
        self.quietly(lambda: super(FaultTolerantWandbLogger, self).finalize(status))
