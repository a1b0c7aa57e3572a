"""A VAE that fails in a way of its own for some seeds, unless GENZOO_CURED is set."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch

from genzoo.families.vae import VAE
from genzoo.model import Loss


class Faulty(VAE):
    """See above.

    Args:
        faults: what happens in the loss, by seed.
        seed: of this run.
        arguments: of the VAE.
    """

    def __init__(self, faults: dict[str, str], seed: int, **arguments: Any):
        super().__init__(**arguments)
        self.fault = None if os.environ.get("GENZOO_CURED") else faults.get(f"seed_{seed}")

    def loss(self, x: Any, y: Any = None, *, turn: str | None = None, rng: torch.Generator | None = None) -> Loss:
        loss = super().loss(x, y, turn=turn, rng=rng)
        if self.fault == "exception":
            raise KeyError("a bug in a family")
        if self.fault == "nan":
            return Loss(loss.total * float("nan"), loss.terms)
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "memory":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**28,) * 2)
            torch.ones(2**30)
        if self.fault == "hang":
            time.sleep(10**6)
        return loss
