"""The trainer's section of a configuration, typed; ``conf/trainer/default.yaml`` has a comment for each key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainerSettings:
    """How a model is trained. Defaults stand in for keys that runs of earlier releases do not have.

    Attributes:
        accelerator: "cpu", "cuda" or "auto".
        precision: as Lightning's ``Trainer`` takes it, or "auto".
        threads: of the CPU; None for all that are free.
        batch_size: of all processes together.
        clip: largest norm of a network's gradient, None for no limit.
        ema_half_life: of the averaged weights, in images; None for no average.
        grids, saves, scores: pictures of samples, checkpoints and interim scores in a run.
        score_samples: drawn for each interim score.
        learning_rate: the configuration of the schedule.
        devices, nodes: processes on each machine, and machines.
        compile: whether torch compiles the networks.
        deterministic: whether a GPU uses deterministic operators alone.
        channels_last: memory layout of images.
        workers: processes that gather batches.
        save_seconds: after which there is one more checkpoint, None for never.
    """

    accelerator: str
    precision: str
    threads: int | None
    batch_size: int
    clip: float | None
    ema_half_life: float | None
    grids: int
    saves: int
    scores: int
    score_samples: int
    learning_rate: dict[str, Any]
    devices: int = 1
    nodes: int = 1
    compile: bool = False
    deterministic: bool = False
    channels_last: bool = False
    workers: int = 0
    save_seconds: float | None = None

    @property
    def processes(self) -> int:
        """Processes that train together."""
        return self.devices * self.nodes
