"""What happens beside the optimisation: hand-overs, records, grids, checkpoints and a progress bar.

Everything that is written happens at steps that follow from the plan alone, never from the machine's speed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from genzoo.model import GenerativeModel
from genzoo.runs import Run
from genzoo.training import checkpoints
from genzoo.training.module import GenerativeModule

RECORDS = 200  # lines of metrics.jsonl that a whole run writes


def milestones(planned: int, count: int) -> set[int]:
    """Spread ``count`` steps evenly over a plan, the last step included."""
    return {max(1, round(planned * (i + 1) / count)) for i in range(count)}


class HandOvers:
    """What Lightning takes for a data loader: ranges of steps that last about a quarter of a second.

    A range ends at every milestone. How long the others are depends on the machine, and nothing depends on it.

    Args:
        module: whose steps are handed over.
        milestones: gives the steps at which a range must end.
    """

    def __init__(self, module: GenerativeModule, milestones: Callable[[], set[int]]):
        self.module, self.milestones = module, milestones

    def __iter__(self) -> Iterator[tuple[int, int]]:
        module = self.module
        position = module.steps
        while not module.finished:
            # Asked anew each time: a plan by the clock is corrected on the way.
            end = min((step for step in self.milestones() if step > position), default=position + 1)
            done, seconds = module.steps, module.train_seconds
            length = int(0.25 * done / seconds) if done and seconds > 0 else 1
            stop = min(end, position + min(max(length, 1), 1000))
            yield position, stop
            position = stop


class Record(pl.Callback):
    """Writes losses, speed and learning rate to ``metrics.jsonl`` and Lightning's loggers, some 200 times in a run."""

    def __init__(self, run: Run):
        self.run = run

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        begun = time.monotonic()
        last = [pl_module.steps, begun]

        def record() -> None:
            every = max(1, (pl_module.planned_steps or 1) // RECORDS)
            ends = {*pl_module.boundaries, pl_module.planned_steps}  # a record holds terms of one stage
            if pl_module.steps % every and pl_module.steps not in ends:
                return
            current = time.monotonic()
            stage = pl_module.stage_at(pl_module.steps - 1)[0].name
            rate = (pl_module.steps - last[0]) * pl_module.batches.batch_size / max(current - last[1], 1e-9)
            last[:] = [pl_module.steps, current]
            pl_module.check_finite()  # before a NaN is written
            values = {f"train/{name}": value for name, value in pl_module.window.flush().items()}
            values["train/lr"] = max(p.optimizer.param_groups[0]["lr"] for p in pl_module.players[stage].values())
            self.run.log(
                event="train",
                stage=stage,
                step=pl_module.steps,
                images=pl_module.images,
                planned_images=pl_module.planned_images,
                seconds=round(pl_module.train_seconds, 3),
                flops=pl_module.flops,
                images_per_second=round(rate, 2),
                values=values,
            )
            for logger in trainer.loggers:
                logger.log_metrics(
                    {**values, "train/images_per_second": rate, "images": pl_module.images}, step=pl_module.images
                )
            pl_module.latest = {"values": values, "images_per_second": rate}

        pl_module.on_step = record


class Grids(pl.Callback):
    """Draws samples of the averaged model at intervals.

    Args:
        run: where the pictures go.
        draw: makes a picture of the model's samples at a path.
        count: how many pictures in a run, the last one at its end.
    """

    def __init__(self, run: Run, draw: Callable[[GenerativeModel, Any], None], count: int):
        self.run, self.draw, self.count = run, draw, count

    def milestones(self, planned: int) -> set[int]:
        return milestones(planned, self.count) if self.count else set()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        if pl_module.steps in self.milestones(pl_module.planned_steps or 1) and not pl_module.finished:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self.save(trainer, pl_module)

    def save(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        path = self.run.path / "samples" / f"step-{pl_module.steps}.png"
        self.draw(pl_module.ema.model, path)  # type: ignore[arg-type]
        latest = self.run.path / "samples.png"
        latest.write_bytes(path.read_bytes())
        self.run.log(event="samples", step=pl_module.steps, images=pl_module.images, file=f"samples/{path.name}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(path)], step=pl_module.images)


class Scores(pl.Callback):
    """Scores samples of the averaged model at intervals; the end has a scoring of its own.

    Args:
        run: whose record the scores go into.
        score: measures a model.
        count: how many times.
    """

    def __init__(self, run: Run, score: Callable[[GenerativeModel], dict[str, float | None]] | None, count: int):
        self.run, self.score, self.count = run, score, count

    def milestones(self, planned: int) -> set[int]:
        if not self.score or not self.count:
            return set()
        return {step for step in milestones(planned, self.count + 1) if step < planned}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        if pl_module.steps not in self.milestones(pl_module.planned_steps or 1) or pl_module.finished:
            return
        assert self.score is not None
        model: Any = pl_module.ema.model
        was_training = model.training
        values = self.score(model)
        model.train(was_training)
        self.run.log(
            event="interim",
            step=pl_module.steps,
            images=pl_module.images,
            seconds=round(pl_module.train_seconds, 3),
            flops=pl_module.flops,
            values=values,
        )
        for logger in trainer.loggers:
            numbers = {f"interim/{name}": value for name, value in values.items() if value is not None}
            logger.log_metrics({**numbers, "images": pl_module.images}, step=pl_module.images)


class Checkpoints(pl.Callback):
    """Saves the run at intervals and at its end."""

    def __init__(self, run: Run, count: int):
        self.run, self.count = run, count

    def milestones(self, planned: int) -> set[int]:
        return milestones(planned, self.count)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        if pl_module.steps in self.milestones(pl_module.planned_steps or 1) and not pl_module.finished:
            self.save(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self.save(pl_module)

    def save(self, pl_module: GenerativeModule) -> None:
        folder = self.run.path / "checkpoints"
        checkpoints.save(folder, pl_module.steps, pl_module.model, pl_module.ema.model, pl_module.state())
        self.run.update_status(
            step=pl_module.steps,
            images=pl_module.images,
            planned_images=pl_module.planned_images,
            train_seconds=round(pl_module.train_seconds, 3),
            train_flops=pl_module.flops,
        )


class ProgressBar(pl.Callback):
    """Loss, images a second and the time left: a bar on a terminal, a line every ten seconds elsewhere; on stderr."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr)
        self.printed = 0.0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=1,
            disable=not self.console.is_terminal,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: GenerativeModule) -> None:
        self.start = time.monotonic()
        self.task = self.progress.add_task("training", total=pl_module.planned_steps, detail="")
        self.progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: GenerativeModule, *_: Any) -> None:
        detail = self.describe(pl_module)
        self.progress.update(self.task, completed=pl_module.steps, total=pl_module.planned_steps, detail=detail)
        current = time.monotonic()
        if not self.console.is_terminal and (current - self.printed > 10 or pl_module.finished):
            self.printed = current
            left = (current - self.start) * ((pl_module.planned_steps or 0) / max(pl_module.steps, 1) - 1)
            print(
                f"step {pl_module.steps}/{pl_module.planned_steps}  {detail}  {max(left, 0):.0f} s left",
                file=sys.stderr,
                flush=True,
            )

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


def fit(
    module: GenerativeModule,
    run: Run,
    draw: Callable[[GenerativeModel, Any], None],
    *,
    grids: int,
    saves: int,
    score: Callable[[GenerativeModel], dict[str, float | None]] | None = None,
    scores: int = 0,
    loggers: list[Any],
    **trainer: Any,
) -> None:
    """Train a module into a run directory.

    Args:
        module: what is trained.
        run: where everything is written.
        draw: makes a picture of a model's samples at a path.
        grids, saves: how many pictures and checkpoints.
        score, scores: measures a few samples of a model, and how many times.
        loggers: of Lightning.
        trainer: accelerator, devices and precision, as Lightning's ``Trainer`` takes them.

    Raises:
        NonFiniteError: when a loss or gradient is not finite.
    """
    pictures, saver, scorer = Grids(run, draw, grids), Checkpoints(run, saves), Scores(run, score, scores)

    def stops() -> set[int]:
        planned = module.planned_steps or 1
        return pictures.milestones(planned) | saver.milestones(planned) | scorer.milestones(planned)

    lightning = pl.Trainer(
        max_epochs=1,
        logger=loggers,
        callbacks=[Record(run), pictures, saver, scorer, ProgressBar()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10**9,
        default_root_dir=str(run.path),
        **trainer,
    )
    if module.batches.x.device != lightning.strategy.root_device:
        module.batches.to(lightning.strategy.root_device)
    module.ema.model.to(lightning.strategy.root_device)
    with torch.random.fork_rng(devices=[]):
        lightning.fit(module, train_dataloaders=HandOvers(module, stops))
