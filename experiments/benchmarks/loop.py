"""A training step of a tiny network: all that genzoo does at a step, beside Lightning's defaults and beside a bare loop.

The model is flow matching in the plane by an MLP of one residual layer of width 32, with 256 points a batch. All compute
the loss of that model and take a step of the same fused Adam. Genzoo adds what every run of it has: noise by name, the
norm of the gradient and its limit, the check that all is finite, the average of the weights, the schedule of the
learning rate, records, the progress bar, checkpoints. Lightning adds what it does by default: a ``DataLoader``, the loss
logged at each step, the bar, the CSV logger, checkpoints; and in a row of its own also the limit, the check and the
average by the means that it has for them. The bare loop adds nothing. A step is the difference of two trainings, a long
and a short one, over the steps between them, so that what happens once does not count.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from run import Pair, processor_seconds

from genzoo.data.dataset import Split
from genzoo.families.flow_matching import FlowMatching
from genzoo.nn.mlp import TimeMLP

BATCH, SHORT, LONG = 256, 300, 2300
ADAM = functools.partial(torch.optim.Adam, lr=2e-3, fused=True)


def points() -> torch.Tensor:
    """Data of the plane."""
    return torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))


def flow() -> FlowMatching:
    """The tiny model."""
    torch.manual_seed(0)
    return FlowMatching((2,), network=functools.partial(TimeMLP, width=32, depth=1))


def by_genzoo(steps: int, folder: str) -> None:
    """Train as ``python -m genzoo`` does, without pictures of samples."""
    from genzoo.data.loader import Batches
    from genzoo.runs import Run
    from genzoo.training.budget import Budget, LearningRate
    from genzoo.training.fit import fit
    from genzoo.training.module import GenerativeModule

    batches = Batches(Split(points(), None), BATCH, seed=0)
    module = GenerativeModule(flow(), ADAM, batches, Budget(images=steps * BATCH), LearningRate("cosine"), clip=1.0)
    run = Run.create(folder, "flow", {})
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
    fit(module, run, lambda _, path: path.touch(), grids=0, saves=4, loggers=[], **trainer)


def by_lightning(steps: int, folder: str, everything: bool = False) -> None:
    """Train as Lightning's guide does; with everything, clip, average and check as well."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import EMAWeightAveraging
    from torch.utils.data import DataLoader, TensorDataset

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = flow()

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            loss = self.model.loss(batch[0]).total
            self.log("loss", loss, prog_bar=True)
            if everything and not torch.isfinite(loss):
                raise ValueError("the loss is not finite")
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return ADAM(self.parameters())

    loader = DataLoader(TensorDataset(points()), BATCH, shuffle=True, drop_last=True)
    more = {"gradient_clip_val": 1.0, "callbacks": [EMAWeightAveraging(decay=0.9999)]} if everything else {}
    pl.Trainer(max_steps=steps, default_root_dir=folder, accelerator="cpu", devices=1, **more).fit(Module(), loader)


def bare(steps: int, folder: str) -> None:
    """Train with nothing around it."""
    data, model = points(), flow()
    optimizer = ADAM(model.parameters())
    for _ in range(steps):
        loss = model.loss(data[torch.randint(len(data), (BATCH,))]).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def seconds_a_step(train: Callable[[int, str], None]) -> Callable[[], Callable[[], float]]:
    """Set a way to train up."""

    def build() -> Callable[[], float]:
        warnings.filterwarnings("ignore")

        def timed(steps: int) -> float:
            with contextlib.ExitStack() as stack:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                nowhere = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
                start = processor_seconds()
                train(steps, folder)
                return processor_seconds() - start

        return lambda: (timed(LONG) - timed(SHORT)) / (LONG - SHORT)

    return build


def pairs() -> Iterator[Pair]:
    """The step as genzoo does it, against Lightning's, and against one with nothing around it."""
    name, ours = "training step of a tiny MLP", seconds_a_step(by_genzoo)
    yield Pair(name, "Lightning's defaults", ours, seconds_a_step(by_lightning), 3.0, measure="returned")
    everything = seconds_a_step(functools.partial(by_lightning, everything=True))
    yield Pair(name, "Lightning with clipping, check and average", ours, everything, 3.0, measure="returned")
    yield Pair(name, "bare loop", ours, seconds_a_step(bare), 1.1, at_most=True, measure="returned")
