"""Training in a run directory: Lightning's Trainer, set up so that its own loop costs next to nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy

from genzoo.model import TrainableModel
from genzoo.runs import Run
from genzoo.training.callbacks import (
    CheckpointFolders,
    Checkpoints,
    Grids,
    ProgressBar,
    Record,
    Scores,
    Stop,
    milestones,
)
from genzoo.training.launcher import Launcher
from genzoo.training.module import GenerativeModule
from genzoo.training.precompute import Precompute
from genzoo.training.stopping import Signals


class StepRanges:
    """What Lightning takes for a data loader: ranges of steps that last about a quarter of a second.

    A range ends at every milestone and at the end of each stage. How long the others are depends on the machine, and nothing
    depends on it; several processes that train together share the clock, and so the ranges.

    Args:
        module: whose steps are handed over.
        milestones: gives the steps at which a range must end.
    """

    def __init__(self, module: GenerativeModule, milestones: Callable[[], set[int]]):
        self.module, self.milestones = module, milestones

    def __iter__(self) -> Iterator[tuple[int, int]]:
        module = self.module
        position, seconds, speed = module.steps, module.progress.train_seconds, 0.0
        while not module.finished:
            # Asked anew each time: a plan by the clock is corrected on the way.
            ends = {*self.milestones(), *module.plan.boundaries}
            end = min((step for step in ends if step > position), default=position + 1)
            seconds_left = (module.plan.budget.seconds or math.inf) - module.progress.train_seconds
            within = min(0.25, seconds_left)
            stop = min(end, position + min(max(int(within * speed), 1), 1000))
            yield position, stop
            spent = module.progress.train_seconds - seconds
            # The speed of a new stage is not known yet.
            speed = (stop - position) / spent if spent > 0 and stop not in module.plan.boundaries else 0.0
            position, seconds = stop, module.progress.train_seconds


class ManualDDPStrategy(DDPStrategy):
    """Lightning's way to start and join processes; gradients are averaged by ``GenerativeModule``."""

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


def fit(
    module: GenerativeModule,
    run: Run | None,
    draw: Callable[[TrainableModel, Any], None] | None,
    *,
    grids: int,
    saves: int,
    save_seconds: float | None = None,
    score: Callable[[TrainableModel], dict[str, float | None]] | None = None,
    scores: int = 0,
    loggers: list[Any],
    signals: Signals | None = None,
    devices: int = 1,
    nodes: int = 1,
    **trainer: Any,
) -> None:
    """Train a module, new or restored, into a run directory.

    Args:
        module: what is trained.
        run: where everything is written; None in a process that is not the first.
        draw: makes a picture of a model's samples at a path; None for a model without samples.
        grids, saves: how many pictures and checkpoints.
        save_seconds: after which there is one more checkpoint.
        score, scores: measures a few samples of a model, and how many times.
        loggers: of Lightning.
        signals: that end the run after a checkpoint; entered by the caller, or by this function where they are None.
        devices, nodes: how many processes on each machine, and machines, share a batch; Lightning starts those of this machine.
        trainer: accelerator and precision, as Lightning's ``Trainer`` takes them.

    Raises:
        NonFiniteError: when a loss or gradient is not finite.
        Stopped: by a signal.
    """
    signals, entered = (Signals(), False) if signals is None else (signals, True)
    module.managed = True
    writers: list[Any] = []
    if run is not None:
        writers = [
            Record(run),
            *([Grids(run, draw, grids, signals)] if draw else []),
            Scores(run, score, scores, signals),
        ]
        writers += [Checkpoints(run, saves, save_seconds), ProgressBar()]

    def stops() -> set[int]:
        # The same in every process: Lightning lets them wait for each other at the end of each range.
        counts = grids, saves, scores and scores + 1
        return {step for count in counts if count for step in milestones(module.plan.planned_steps or 1, count)}

    half = None
    if trainer["precision"] == "16-mixed":  # for which Lightning would choose bfloat16 on a CPU
        device = "cuda" if trainer["accelerator"] == "gpu" else "cpu"
        half = MixedPrecision("16-mixed", device, module.scaler)
        del trainer["precision"]
    lightning = pl.Trainer(
        max_epochs=1,
        logger=loggers,
        callbacks=[Stop(signals), Precompute(run, signals), *writers],
        devices=devices,
        num_nodes=nodes,
        strategy=ManualDDPStrategy() if devices * nodes > 1 else "auto",
        plugins=[CheckpointFolders(), *([] if half is None else [half])],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**9,
        default_root_dir=str(run.path) if run else None,
        **trainer,
    )
    if module.batches.device != lightning.strategy.root_device:
        module.batches.to(lightning.strategy.root_device)
    module.ema.model.to(lightning.strategy.root_device)
    with contextlib.nullcontext() if entered else signals, torch.random.fork_rng(devices=[]), signals.held():
        launcher = lightning.strategy.launcher
        if isinstance(launcher, Launcher) and run is not None:
            launcher.on_hang = lambda cause: run.update_status(state="failed", why=cause)
        try:
            lightning.fit(module, train_dataloaders=StepRanges(module, stops))
        except Exception as error:
            if not isinstance(launcher, Launcher):
                raise
            cause = launcher.explain(error)
            launcher.end()
            if cause is error:
                raise
            raise cause from error
        finally:
            if isinstance(launcher, Launcher):
                launcher.leaving = True
            if torch.distributed.is_initialized():  # what follows is the first process's alone
                torch.distributed.destroy_process_group()
