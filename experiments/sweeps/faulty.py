"""A VAE that fails in a way of its own for some seeds, unless GENZOO_CURED is set."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genzoo.conditions import Condition
from genzoo.event import EventSpec
from genzoo.families.vae import VAE
from genzoo.model import Loss


class Faulty(VAE):
    """See above.

    Args:
        event, condition: as in ``GenerativeModel``.
        faults: what happens in the loss, by seed.
        seed: of this run.
        arguments: of the VAE.
    """

    def __init__(
        self,
        event: EventSpec,
        condition: Condition | None = None,
        *,
        faults: dict[str, str],
        seed: int,
        **arguments: Any,
    ):
        super().__init__(event, condition, **arguments)
        self.fault = None if os.environ.get("GENZOO_CURED") else faults.get(f"seed_{seed}")

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        loss = super()._loss(x, y, rng)
        if self.fault == "exception":
            raise KeyError("a bug in a family")
        if self.fault == "nan":
            return loss._replace(total=loss.total * float("nan"))
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "memory":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28,) * 2)
            torch.ones(2**30)
        if self.fault == "hang":
            time.sleep(10**6)
        return loss
