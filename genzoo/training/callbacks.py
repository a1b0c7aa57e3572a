"""What happens beside the optimisation: hand-overs, records, grids, checkpoints and a progress bar.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from genzoo.console import log_stderr, stderr
from genzoo.model import GenerativeModel, Precomputed
from genzoo.prob import ranks
from genzoo.runs import Run, RunError, storing, write_atomically
from genzoo.training import checkpoints
from genzoo.training.launcher import Launcher
from genzoo.training.loggers import numbers
from genzoo.training.module import GenerativeModule
from genzoo.training.stopping import Signals, Stopped

RECORDS = 200  # lines of metrics.jsonl that a whole run writes


def milestones(planned: int, count: int) -> set[int]:
    """Spread ``count`` steps evenly over a plan, the last step included."""
    return {max(1, round(planned * (i + 1) / count)) for i in range(count)}


class HandOvers:
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
        position, seconds, speed = module.steps, module.train_seconds, 0.0
        while not module.finished:
            # Asked anew each time: a plan by the clock is corrected on the way.
            ends = {*self.milestones(), *module.boundaries}
            end = min((step for step in ends if step > position), default=position + 1)
            within = 0.25 if module.budget.seconds is None else min(0.25, module.budget.seconds - module.train_seconds)
            stop = min(end, position + min(max(int(within * speed), 1), 1000))
            yield position, stop
            spent = module.train_seconds - seconds
            # The speed of a new stage is not known yet.
            speed = (stop - position) / spent if spent > 0 and stop not in module.boundaries else 0.0
            position, seconds = stop, module.train_seconds


class Record(pl.Callback):
    """Writes losses, speed and learning rate to ``metrics.jsonl`` and Lightning's loggers, some 200 times in a run."""

    def __init__(self, run: Run):
        self.run = run

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        last = [pl_module.steps, pl_module.own_seconds]

        def record() -> None:
            every = max(1, (pl_module.planned_steps or 1) // RECORDS)
            ends = {*pl_module.boundaries, pl_module.planned_steps}  # a record holds terms of one stage
            if pl_module.steps % every and pl_module.steps not in ends:
                return
            stage = pl_module.stage_at(pl_module.steps - 1)[0].name
            pl_module.check_finite()  # before a NaN is written
            pl_module.read_clock()
            current = pl_module.own_seconds
            rate = (pl_module.steps - last[0]) * pl_module.batches.batch_size / max(current - last[1], 1e-9)
            last[:] = [pl_module.steps, current]
            values = {f"train/{name}": value for name, value in pl_module.window.flush().items()}
            if pl_module.scaler:
                values["train/skipped_steps"] = pl_module.skipped
            values["train/lr"] = max(p.optimizer.param_groups[0]["lr"] for p in pl_module.players[stage].values())
            event = {
                "event": "train",
                "stage": stage,
                "step": pl_module.steps,
                "images": pl_module.images,
                "planned_images": pl_module.planned_images,
                "seconds": round(pl_module.train_seconds, 3),
                "flops": pl_module.flops,
                "images_per_second": round(rate, 2),
                "values": values,
            }
            self.run.log(**event)
            for logger in trainer.loggers:
                logger.log_metrics(numbers(event), step=pl_module.images)
            pl_module.latest = {"values": values, "images_per_second": rate}

        pl_module.on_step = record


class Milestones(pl.Callback, ABC):
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
        return self.signals.free() if ranks.world() == 1 else contextlib.nullcontext()

    @abstractmethod
    def milestones(self, planned: int) -> set[int]:
        """Return the steps."""

    @abstractmethod
    def act(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        """Do it, and log the event."""

    def due(self, pl_module: GenerativeModule) -> bool:
        """Whether this step is one of them; the end is a matter of its own."""
        return not pl_module.finished and pl_module.steps in self.milestones(pl_module.planned_steps or 1)

    def done(self, step: int) -> bool:
        """Whether it was done at a step, before the run was interrupted there."""
        return any(event.get("event") == self.event and event.get("step") == step for event in self.run.events())

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        if pl_module.steps and self.due(pl_module) and not self.done(pl_module.steps):
            self.act(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        if self.due(pl_module):
            self.act(trainer, pl_module)


PRECOMPUTED = "precomputed"  # folder of a run


def precomputed_parts(module: GenerativeModule) -> dict[str, Precomputed]:
    """List the parts of a model whose losses read what is computed once, by the names of their files."""
    parts = module.model.named_modules(prefix="model")
    return {name: part for name, part in parts if isinstance(part, Precomputed) and part.precomputed_shapes()}


def take_precomputed(module: GenerativeModule, run: Run) -> None:
    """Give a model what was computed before the first step of its run, where that was done.

    Raises:
        RunError: where a file is missing or damaged, or belongs to another model.
    """
    folder = run.path / PRECOMPUTED
    if not folder.is_dir():
        return
    for name, part in precomputed_parts(module).items():
        shapes = part.precomputed_shapes()
        limit = 8 * sum(math.prod(shape) for shape in shapes.values()) + 2**16  # of numbers in double precision
        tensors = checkpoints.load_tensors(folder, name, limit)
        try:
            if (found := {key: tuple(tensor.shape) for key, tensor in tensors.items()}) != shapes:
                raise ValueError(f"has {found}, not {shapes}")
            part.set_precomputed(tensors)
        except ValueError as error:
            raise RunError(f"{folder / name}.safetensors: does not fit the model of config.yaml: {error}") from error


class Precompute(pl.Callback):
    """Computes what losses read before the clock starts, and keeps it in the run; the status says how long that took.

    Args:
        run: where it is kept; None in a process that is not the first.
        signals: heard at once meanwhile.
    """

    def __init__(self, run: Run | None, signals: Signals):
        self.run, self.signals = run, signals

    def on_fit_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        parts = precomputed_parts(pl_module)
        begun = time.monotonic()
        self.signals.listen()  # Lightning may have taken them for itself
        with self.signals.free() if ranks.world() == 1 else contextlib.nullcontext():
            tensors = {name: part.precompute() for name, part in parts.items()}
        if not tensors or self.run is None or (self.run.path / PRECOMPUTED).is_dir():
            return
        checkpoints.keep_tensors(self.run.path / PRECOMPUTED, tensors)
        seconds = round(time.monotonic() - begun, 3)
        self.run.update_status(precompute_seconds=seconds)
        rows = ", ".join(f"{len(next(iter(own.values()))):,} rows for {name}" for name, own in tensors.items())
        log_stderr(f"computed before the clock: {rows}, in {seconds:.3g} s")


class Grids(Milestones):
    """Draws samples of the averaged model at intervals.

    Args:
        run: where the pictures go.
        draw: makes a picture of the model's samples at a path.
        count: how many pictures in a run, the last one at its end.
        signals: of the run.
    """

    def __init__(self, run: Run, draw: Callable[[GenerativeModel, Any], None], count: int, signals: Signals):
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


class Scores(Milestones):
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
        score: Callable[[GenerativeModel], dict[str, float | None]] | None,
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
            "seconds": round(pl_module.train_seconds, 3),
            "flops": pl_module.flops,
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
    """Saves the run at intervals, at its end, and when it is told to stop.

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

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        if pl_module.finished:
            return
        late = self.seconds is not None and time.monotonic() - self.saved > self.seconds
        if late or pl_module.steps in self.milestones(pl_module.planned_steps or 1):
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self.save(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: GenerativeModule, exception: BaseException) -> None:
        # A second signal may have come in the middle of a step.
        if isinstance(exception, Stopped) and not exception.abrupt and pl_module.planned_steps:
            self.save(trainer, pl_module)

    def save(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        pl_module.check_finite()
        checkpoint = {
            "step": pl_module.steps,
            "model": pl_module.model,
            "ema": pl_module.ema.model,
            "state": {**pl_module.state(), "logged": self.run.logged()},
        }
        path = self.run.path / "checkpoints" / f"step-{pl_module.steps}"
        trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
        self.saved = time.monotonic()
        self.run.update_status(
            step=pl_module.steps,
            images=pl_module.images,
            planned_images=pl_module.planned_images if pl_module.planned else None,
            planned_by=pl_module.planned_by,
            ended_by=pl_module.ended_by,
            train_seconds=round(pl_module.train_seconds, 3),
            train_flops=pl_module.flops,
        )


class Stop(pl.Callback):
    """Ends the run between steps when a signal was heard, by any process, after what was due at the last of them.

    The first of the callbacks, so that it has the signals before any other does its work.
    """

    def __init__(self, signals: Signals):
        self.signals = signals

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self.signals.listen()  # Lightning has taken them for itself
        pl_module.told_to_stop = lambda: self.signals.heard is not None

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
        self.start, self.begun = pl_module.own_seconds, pl_module.steps
        self.task = self.progress.add_task("training", total=self.total(pl_module), detail="")
        self.progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        detail = f"{self.describe(pl_module)}  {self.left(pl_module):.0f} s left"
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
        return pl_module.planned_steps if pl_module.planned else None

    def left(self, pl_module: GenerativeModule) -> float:
        """Return the seconds of training that are left; grids, scores and checkpoints are no part of them."""
        limit = pl_module.budget.seconds
        left = math.inf if limit is None else limit - pl_module.train_seconds
        done = pl_module.steps - self.begun
        if pl_module.planned and pl_module.planned_steps and done:
            each = (pl_module.own_seconds - self.start) / done
            left = min(left, each * (pl_module.planned_steps - pl_module.steps))
        return max(left, 0.0) if math.isfinite(left) else 0.0

    @staticmethod
    def describe(pl_module: GenerativeModule) -> str:
        """Say the latest terms of the loss and the speed."""
        latest = pl_module.latest
        shown = [name for name in latest["values"] if not name.endswith(("grad_norm", "/lr"))]
        terms = "  ".join(f"{name.removeprefix('train/')} {latest['values'][name]:.4g}" for name in shown)
        return f"{terms}  {latest['images_per_second']:,.0f} images/s"

    def on_train_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self.progress.stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: GenerativeModule, exception: BaseException) -> None:
        self.progress.stop()


class Shares(DDPStrategy):
    """Lightning's way to start and join processes; gradients are averaged by ``GenerativeModule``."""

    def configure_ddp(self) -> None:
        """Leave the module as it is."""

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


def fit(
    module: GenerativeModule,
    run: Run | None,
    draw: Callable[[GenerativeModel, Any], None],
    *,
    grids: int,
    saves: int,
    save_seconds: float | None = None,
    score: Callable[[GenerativeModel], dict[str, float | None]] | None = None,
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
        draw: makes a picture of a model's samples at a path.
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
    writers: list[Any] = []
    if run is not None:
        writers = [Record(run), Grids(run, draw, grids, signals), Scores(run, score, scores, signals)]
        writers += [Checkpoints(run, saves, save_seconds), ProgressBar()]

    def stops() -> set[int]:
        # The same in every process: Lightning lets them wait for each other at the end of each range.
        counts = grids, saves, scores and scores + 1
        return {step for count in counts if count for step in milestones(module.planned_steps or 1, count)}

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
        strategy=Shares() if devices * nodes > 1 else "auto",
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
            lightning.fit(module, train_dataloaders=HandOvers(module, stops))
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
