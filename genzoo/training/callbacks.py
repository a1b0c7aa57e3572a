"""Callbacks of Lightning beside the optimisation: records, grids, scores, checkpoints, signals and a progress bar.

What is recorded, drawn and scored happens at steps that follow from the plan alone, never from the machine's speed. Checkpoints
are also written when some time has passed and when the run is told to stop: whenever that is, a run that goes on from there
records, draws and scores what it would have done without.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins.io import CheckpointIO
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from genzoo.console import stderr
from genzoo.model import TrainableModel
from genzoo.numerics import distributed
from genzoo.runs import Run, storing, write_atomically
from genzoo.training import checkpoints
from genzoo.training.loggers import numbers
from genzoo.training.module import GenerativeModule
from genzoo.training.stopping import Signals, Stopped

RECORDS = 200  # lines of metrics.jsonl that a whole run writes


def milestones(planned: int, count: int) -> set[int]:
    """Spread ``count`` steps evenly over a plan, the last step included."""
    return {max(1, round(planned * (i + 1) / count)) for i in range(count)}


class Record(pl.Callback):
    """Writes losses, speed and learning rate to ``metrics.jsonl`` and Lightning's loggers, some 200 times in a run."""

    def __init__(self, run: Run):
        self.run = run

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        last = [pl_module.steps, pl_module.clock.seconds]

        def record() -> None:
            every = max(1, (pl_module.plan.planned_steps or 1) // RECORDS)
            ends = {*pl_module.plan.boundaries, pl_module.plan.planned_steps}  # a record holds terms of one stage
            if pl_module.steps % every and pl_module.steps not in ends:
                return
            stage = pl_module.stage_at(pl_module.steps - 1)[0].name
            pl_module.finite.read()  # before a NaN is written
            pl_module.read_clock()
            current = pl_module.clock.seconds
            rate = (pl_module.steps - last[0]) * pl_module.batches.batch_size / max(current - last[1], 1e-9)
            last[:] = [pl_module.steps, current]
            values = {f"train/{name}": value for name, value in pl_module.progress.window.flush().items()}
            if pl_module.scaler:
                values["train/skipped_steps"] = pl_module.progress.skipped
            values["train/lr"] = max(p.optimizer.param_groups[0]["lr"] for p in pl_module.players[stage].values())
            event = {
                "event": "train",
                "stage": stage,
                "step": pl_module.steps,
                "images": pl_module.images,
                "planned_images": pl_module.planned_images,
                "seconds": round(pl_module.progress.train_seconds, 3),
                "flops": pl_module.progress.flops,
                "images_per_second": round(rate, 2),
                "values": values,
            }
            self.run.log(**event)
            for logger in trainer.loggers:
                logger.log_metrics(numbers(event), step=pl_module.images)
            pl_module.latest = {"values": values, "images_per_second": rate}

        pl_module.on_step = record


class PeriodicCallback(pl.Callback, ABC):
    """Does something at steps of the plan, once each, however often the run is interrupted.

    Args:
        run: whose record says what was done.
        event: what it is called there.
        signals: heard at once while it is being done.
    """

    def __init__(self, run: Run, event: str, signals: Signals):
        self.run, self.event, self.signals = run, event, signals

    def interruptible(self) -> contextlib.AbstractContextManager[None]:
        """Hear signals at once, unless other processes would wait for this one for ever."""
        return self.signals.free() if distributed.world_size() == 1 else contextlib.nullcontext()

    @abstractmethod
    def milestones(self, planned: int) -> set[int]:
        """Return the steps."""

    @abstractmethod
    def act(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        """Do it, and log the event."""

    def due(self, pl_module: GenerativeModule) -> bool:
        """Whether this step is one of them; the end is a matter of its own."""
        return not pl_module.finished and pl_module.steps in self.milestones(pl_module.plan.planned_steps or 1)

    def done(self, step: int) -> bool:
        """Whether it was done at a step, before the run was interrupted there."""
        return any(event.get("event") == self.event and event.get("step") == step for event in self.run.events())

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        if pl_module.steps and self.due(pl_module) and not self.done(pl_module.steps):
            self.act(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        if self.due(pl_module):
            self.act(trainer, pl_module)


class Grids(PeriodicCallback):
    """Draws samples of the averaged model at intervals.

    Args:
        run: where the pictures go.
        draw: makes a picture of the model's samples at a path.
        count: how many pictures in a run, the last one at its end.
        signals: of the run.
    """

    def __init__(self, run: Run, draw: Callable[[TrainableModel, Any], None], count: int, signals: Signals):
        super().__init__(run, "samples", signals)
        self.draw, self.count = draw, count

    def milestones(self, planned: int) -> set[int]:
        return milestones(planned, self.count) if self.count else set()

    def on_train_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        if not self.done(pl_module.steps):
            self.act(trainer, pl_module)

    def act(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        path = self.run.path / "samples" / f"step-{pl_module.steps}.png"
        with storing(path):
            with self.interruptible():
                self.draw(pl_module.ema.model, path)  # type: ignore[arg-type]
            write_atomically(self.run.path / "samples.png", path.read_bytes())
        self.run.log(event="samples", step=pl_module.steps, images=pl_module.images, file=f"samples/{path.name}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(path)], step=pl_module.images)


class Scores(PeriodicCallback):
    """Scores samples of the averaged model at intervals; the end has a scoring of its own.

    Args:
        run: whose record the scores go into.
        score: measures a model.
        count: how many times.
        signals: of the run.
    """

    def __init__(
        self,
        run: Run,
        score: Callable[[TrainableModel], dict[str, float | None]] | None,
        count: int,
        signals: Signals,
    ):
        super().__init__(run, "interim", signals)
        self.score, self.count = score, count

    def milestones(self, planned: int) -> set[int]:
        if not self.score or not self.count:
            return set()
        return {step for step in milestones(planned, self.count + 1) if step < planned}

    def act(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        assert self.score is not None
        model: Any = pl_module.ema.model
        was_training = model.training
        with self.interruptible():
            values = self.score(model)
        model.train(was_training)
        event = {
            "event": self.event,
            "step": pl_module.steps,
            "images": pl_module.images,
            "seconds": round(pl_module.progress.train_seconds, 3),
            "flops": pl_module.progress.flops,
            "values": values,
        }
        self.run.log(**event)
        for logger in trainer.loggers:
            logger.log_metrics(numbers(event), step=pl_module.images)


class CheckpointFolders(CheckpointIO):
    """What Lightning's strategies save by: a checkpoint is a folder, see ``genzoo.training.checkpoints``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        checkpoints.save(Path(path).parent, **checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return checkpoints.load(Path(path))._asdict()

    def remove_checkpoint(self, path: Any) -> None:
        checkpoints.remove(Path(path))


class Checkpoints(pl.Callback):
    """Saves the run at intervals, at its end and on a stop request; and once, in another folder, before the decay of the rate.

    Args:
        run: where.
        count: how many times in a plan.
        seconds: after which it is saved in any case; None for never.
    """

    def __init__(self, run: Run, count: int, seconds: float | None):
        self.run, self.count, self.seconds = run, count, seconds
        self.saved = time.monotonic()

    def milestones(self, planned: int) -> set[int]:
        return milestones(planned, self.count)

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        def save_stable() -> None:
            checkpoints.save(self.run.path / checkpoints.STABLE, **self.contents(pl_module), keep=1)

        pl_module.on_decay = save_stable

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        if pl_module.finished:
            return
        late = self.seconds is not None and time.monotonic() - self.saved > self.seconds
        if late or pl_module.steps in self.milestones(pl_module.plan.planned_steps or 1):
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self.save(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: GenerativeModule, exception: BaseException) -> None:
        # A second signal may have come in the middle of a step.
        if isinstance(exception, Stopped) and not exception.abrupt and pl_module.plan.planned_steps:
            self.save(trainer, pl_module)

    def contents(self, pl_module: GenerativeModule) -> dict[str, Any]:
        """Return what a checkpoint of this moment holds."""
        pl_module.finite.read()
        return {
            "step": pl_module.steps,
            "model": pl_module.model,
            "ema": pl_module.ema.model,
            "state": {**pl_module.state(), "logged": self.run.logged()},
        }

    def save(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        path = self.run.path / "checkpoints" / f"step-{pl_module.steps}"
        trainer.strategy.checkpoint_io.save_checkpoint(self.contents(pl_module), path)
        self.saved = time.monotonic()
        self.run.update_status(
            step=pl_module.steps,
            images=pl_module.images,
            planned_images=pl_module.planned_images if pl_module.plan.known else None,
            planned_by=pl_module.plan.planned_by,
            ended_by=pl_module.ended_by,
            train_seconds=round(pl_module.progress.train_seconds, 3),
            train_flops=pl_module.progress.flops,
        )


class Stop(pl.Callback):
    """Ends the run between steps when a signal was heard, by any process, after what was due at the last of them.

    The first of the callbacks, so that it has the signals before any other does its work.
    """

    def __init__(self, signals: Signals):
        self.signals = signals

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self.signals.listen()  # Lightning has taken them for itself
        pl_module.stop_requested = lambda: self.signals.heard is not None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        if pl_module.stopping:
            raise Stopped(self.signals.heard or signal.SIGTERM)


class ProgressBar(pl.Callback):
    """Loss, images a second and the time left: a bar on a terminal, a line every ten seconds elsewhere; on stderr."""

    def __init__(self) -> None:
        self.console = Console(file=stderr())
        self.printed = 0.0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            console=self.console,
            refresh_per_second=1,
            disable=not self.console.is_terminal,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self.start, self.begun, self.stage = pl_module.clock.seconds, pl_module.steps, -1
        self.task = self.progress.add_task("training", total=self.total(pl_module), detail="")
        self.progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        detail = "  ".join([*self.describe(pl_module), f"{self.left(pl_module):.0f} s left"])
        total = self.total(pl_module)
        self.progress.update(self.task, completed=pl_module.steps, total=total, detail=detail)
        current = time.monotonic()
        if not self.console.is_terminal and (current - self.printed > 10 or pl_module.finished):
            self.printed = current
            of = "" if total is None else f"/{total}"
            print(f"step {pl_module.steps}{of}  {detail}", file=stderr(), flush=True)

    @staticmethod
    def total(pl_module: GenerativeModule) -> int | None:
        """Return the steps of the plan, None before they are known."""
        return pl_module.plan.planned_steps if pl_module.plan.known else None

    def left(self, pl_module: GenerativeModule) -> float:
        """Return the seconds of training that are left; grids, scores and checkpoints are no part of them."""
        plan = pl_module.plan
        left = math.inf if plan.budget.seconds is None else plan.budget.seconds - pl_module.progress.train_seconds
        stage = sum(pl_module.steps >= stop for stop in plan.boundaries)
        if stage != self.stage:  # whose steps may take longer than those of the one before it
            self.stage, self.start, self.begun = stage, pl_module.clock.seconds, pl_module.steps
        done = pl_module.steps - self.begun
        if plan.planned_by != "seconds" and plan.planned_steps and done:
            each = (pl_module.clock.seconds - self.start) / done
            left = min(left, each * (plan.planned_steps - pl_module.steps))
        return max(left, 0.0) if math.isfinite(left) else 0.0

    @staticmethod
    def describe(pl_module: GenerativeModule) -> list[str]:
        """Say the latest terms of the loss and the speed, nothing before they are measured."""
        latest = pl_module.latest
        shown = [name for name in latest["values"] if not name.endswith(("grad_norm", "/lr"))]
        terms = [f"{name.removeprefix('train/')} {latest['values'][name]:.4g}" for name in shown]
        return [*terms, f"{latest['images_per_second']:,.0f} images/s"] if shown else []

    def on_train_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self.progress.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: GenerativeModule, exception: BaseException) -> None:
        self.progress.stop()
