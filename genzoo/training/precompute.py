"""What a model computes once, before its training, and keeps in the run: the pairs of a teacher."""

from __future__ import annotations

import contextlib
import math
import time

import pytorch_lightning as pl

from genzoo.console import log_stderr
from genzoo.model import Precomputed
from genzoo.numerics import distributed
from genzoo.runs import Run, RunError
from genzoo.training import checkpoints
from genzoo.training.module import GenerativeModule
from genzoo.training.stopping import Signals

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
    """Precomputes the inputs of losses before the clock starts and stores them in the run; the status records the seconds.

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
        with self.signals.free() if distributed.world_size() == 1 else contextlib.nullcontext():
            tensors = {name: part.precompute() for name, part in parts.items()}
        if not tensors or self.run is None or (self.run.path / PRECOMPUTED).is_dir():
            return
        checkpoints.keep_tensors(self.run.path / PRECOMPUTED, tensors)
        seconds = round(time.monotonic() - begun, 3)
        self.run.update_status(precompute_seconds=seconds)
        rows = ", ".join(f"{len(next(iter(own.values()))):,} rows for {name}" for name, own in tensors.items())
        log_stderr(f"computed before the clock: {rows}, in {seconds:.3g} s")
