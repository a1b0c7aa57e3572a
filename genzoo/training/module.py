"""One Lightning module trains any family.

``genzoo.training.loop`` has the steps. Optimisation is manual, and ``genzoo.training.fit.fit`` hands over several steps
at once where steps are short, since Lightning's own loop would cost more than a small model's step. In a Trainer of the user's
own it is an ordinary module: one step for each batch, logged, validated and checkpointed.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from genzoo.data.loader import Batches, Split
from genzoo.distributions.discretization import dequantize
from genzoo.model import Adversarial, TrainableModel
from genzoo.numerics import distributed
from genzoo.numerics.random import generator, seed_of
from genzoo.training.budget import Budget, LearningRate
from genzoo.training.compilation import compile_networks
from genzoo.training.loop import TrainingLoop
from genzoo.training.optimization import OptimizerFactory, Player
from genzoo.training.plan import UNPLANNED

# By which Lightning has torch load the driver's library at each step of an optimiser, to see if there is a GPU: .5 ms.
os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


class _Epoch:
    """The steps of one epoch, as a data loader of a user's Trainer: (step, step + 1) for each batch."""

    def __init__(self, module: GenerativeModule):
        self.module = module

    def __len__(self) -> int:
        return max(self.module.batches.size // self.module.batches.batch_size, 1)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.module.steps
        return ((step, step + 1) for step in range(first, first + len(self)))


class GenerativeModule(TrainingLoop, pl.LightningModule):
    """Trains a generative model, in genzoo's own ``fit`` or in a Trainer of the user's own:

        module = GenerativeModule(VAE((1, 8, 8), levels=17), data=genzoo.data.digits())
        pl.Trainer(max_epochs=10, callbacks=[ModelCheckpoint(monitor="val/loss")]).fit(module)

    There it logs the terms of the loss as ``train/...``, and the loss of the averaged weights on held-out examples as
    ``val/...``. With several devices, give that Trainer ``genzoo.training.fit.ManualDDPStrategy``.

    Args:
        model: the model.
        optimizer: Adam with lr=1e-3 by default.
        batches: the data, by step; or ``data``.
        budget: limits of the run; None where a Trainer's ``max_steps`` or ``max_epochs`` ends it.
        data: a data set, or its training split.
        batch_size: of ``data``.
        val_fraction: of ``data``'s training split, held out for validation.
        seed: of the noise.
        compiled: whether torch compiles the networks, for training alone.
        settings: ``learning_rate``, ``ema_half_life``, ``clip``, ``scaler`` and ``channels_last`` of ``TrainingLoop``.
    """

    def __init__(
        self,
        model: TrainableModel,
        optimizer: OptimizerFactory | None = None,
        batches: Batches | None = None,
        budget: Budget | None = None,
        learning_rate: LearningRate | None = None,
        *,
        data: Any = None,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        seed: int = 0,
        compiled: bool = False,
        **settings: Any,
    ):
        pl.LightningModule.__init__(self)
        self._validation: Split | None = None
        if batches is None:
            if data is None:
                raise ValueError("data: give a data set, or batches")
            train, self._validation = _held_out(_training_split(data, model), val_fraction, seed)
            batches = Batches(train, min(batch_size, len(train.x)), seed)
        optimizer = optimizer or functools.partial(torch.optim.Adam, lr=1e-3)
        loop = {"seed": seed, "compiled": compiled, **settings}
        TrainingLoop.__init__(self, model, optimizer, batches, budget, learning_rate, **loop)
        self.automatic_optimization = False
        self.managed = False  # whether genzoo's own ``fit`` trains it
        self.latest: dict[str, Any] = {"values": {}, "images_per_second": 0.0}  # what was recorded last
        self._checkpoint: Mapping[str, Any] | None = None  # of Lightning, to be restored
        self._earlier = 0  # steps that other Trainers have done before this one

    @property
    def in_users_trainer(self) -> bool:
        """Whether a Trainer other than that of genzoo's own ``fit`` trains it."""
        return self._trainer is not None and not self.managed

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do the steps of a range (first, end), as many of them as the budget allows, or one step on a batch (x, y)."""
        if isinstance(batch, tuple | list) and isinstance(batch[0], int):
            # A user's Trainer may have counted these steps before it restored a checkpoint.
            end = self.steps + batch[1] - batch[0] if self.in_users_trainer else batch[1]
        else:
            x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
            self._given, end = (x, rest[0] if rest else None), self.steps + 1
        try:
            self.run(end, wait=not self.in_users_trainer)
        finally:
            self._given = None
        if self.in_users_trainer:
            self.log_dict({f"train/{name}": value for name, value in self._terms.items()}, prog_bar=True)
            if self.finished:
                self.trainer.should_stop = True

    def _stepper(self, player: Player) -> Callable[[], Any]:
        """Return what steps an optimiser: in a user's Trainer Lightning's wrapper of it, which counts steps."""
        if not self.in_users_trainer:
            return player.optimizer.step
        wrapped = self.optimizers()
        every = wrapped if isinstance(wrapped, list) else [wrapped]
        return next(one for one in every if one.optimizer is player.optimizer).step

    def on_train_epoch_end(self) -> None:
        """Raise where a step was not finite."""
        self.finite.read()

    def on_validation_start(self) -> None:
        """Move the averaged weights to where a Trainer has moved the others."""
        self._match_average()

    def _match_average(self) -> None:
        """Give the averaged model the device and the floating-point type of the trained one."""
        average: TrainableModel = self.ema.model  # type: ignore[assignment]
        average.to(self.model.device)
        if average.dtype != self.model.dtype:  # as by precision="64-true"
            average.to(self.model.dtype)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss of the averaged weights on held-out examples."""
        x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
        model: TrainableModel = self.ema.model  # type: ignore[assignment]
        rng = torch.Generator(x.device).manual_seed(seed_of("validation", self.seed, batch_idx))
        x = (dequantize(x, model.levels, rng) if model.levels and not x.is_floating_point() else x).to(model.dtype)
        y = rest[0] if rest and model.condition else None
        if isinstance(model, Adversarial):
            losses = {turn: model.loss(x, y, turn=turn, rng=rng).total for turn in model.networks()}
        else:
            losses = {"loss": model.loss(x, y, rng=rng).total}
        self.log_dict({f"val/{name}": value for name, value in losses.items()}, batch_size=len(x), prog_bar=True)

    def train_dataloader(self) -> _Epoch:
        """Return the steps of an epoch, for a Trainer that was given no data loader."""
        return _Epoch(self)

    def val_dataloader(self) -> Any:
        """Return held-out examples, if there are any."""
        if self.managed or self._validation is None:
            return []
        split = self._validation
        tensors = (split.x,) if split.y is None else (split.x, split.y)
        return DataLoader(TensorDataset(*tensors), batch_size=self.batches.batch_size)

    def on_fit_start(self) -> None:
        """Plan before the first step, and before any callback uses the plan."""
        if self.in_users_trainer:
            self._join_trainer()
        self.batches.share(distributed.rank(), distributed.world_size())
        self.state_to_device()
        if self.compiled:
            graphs = self.batches.device.type == "cuda"  # which spare the launches, one by one, of many small kernels
            compile_networks(self.model, mode="reduce-overhead" if graphs else "default", dynamic=False)
        if self.plan.planned_steps is None:
            with self.trainer.precision_plugin.train_step_context():
                self.make_plan()

    def _join_trainer(self) -> None:
        """Fit budget, devices and a restored checkpoint to a user's Trainer."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError("precision=16-mixed needs genzoo's own scaler: use bf16-mixed, or python -m genzoo")
        if self.batches.device != self.device:
            self.batches.to(self.device)
        self._match_average()
        self._earlier = self.steps
        if self._checkpoint is not None:
            saved, self._checkpoint = self._checkpoint, None
            self._earlier = saved.get("earlier", 0)
            self.restore(self.model.state_dict(), saved["ema"], saved["state"])
        if self.budget is None:  # the end is this Trainer's
            steps = self.trainer.estimated_stepping_batches
            endless = not math.isfinite(steps) or steps < 1
            steps = UNPLANNED - 1 if endless else self._earlier + int(steps)
            self.plan.budget = Budget(images=steps * self.batches.batch_size)
            if self.plan.planned_steps is not None:
                self.make_plan()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights and the progress to a checkpoint of Lightning's."""
        average: dict[str, Tensor] = {name: value.cpu() for name, value in self.ema.model.state_dict().items()}
        checkpoint["genzoo"] = {"ema": average, "state": self.state(), "earlier": self._earlier}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the averaged weights, and keep the progress until a Trainer that trains has set up the devices."""
        self._checkpoint = checkpoint.get("genzoo")
        if self._checkpoint is not None:  # validation and sampling of a loaded module use these weights without a fit
            self.ema.model.load_state_dict(self._checkpoint["ema"])

    def configure_optimizers(self) -> Any:
        """Return the optimisers, which the module steps itself; in a user's Trainer with schedulers that only show the rate."""
        optimizers = [player.optimizer for player in self.every_player()]
        if not self.in_users_trainer:
            return optimizers
        shown = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0) for optimizer in optimizers]
        return optimizers, [{"scheduler": scheduler, "interval": "step"} for scheduler in shown]


def _training_split(data: Any, model: TrainableModel) -> Split:
    """Return the training split of a data set, or a split as it is.

    Raises:
        ValueError: for anything else, and for data of another shape or other levels than the model's.
    """
    split = getattr(data, "train", data)
    if not isinstance(split, Split):
        raise ValueError(
            f"data: {type(data).__name__} is no DataSet or Split of genzoo.data; "
            "genzoo.data.from_arrays makes one of an array"
        )
    shape, levels = tuple(split.x.shape[1:]), getattr(data, "levels", model.levels)
    if (shape, levels) != (model.shape, model.levels):
        raise ValueError(f"data: shape={shape}, levels={levels}, but the model has {model.shape} and {model.levels}")
    return split


def _held_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    """Cut a fraction of a split off, chosen by the seed."""
    n = len(split.x)
    held = round(fraction * n)
    if not 0 <= fraction < 1 or held >= n:
        raise ValueError(f"val_fraction must be in [0, 1) and leave examples to train on, not {fraction}")
    order = torch.randperm(n, generator=generator("validation", seed))
    parts = []
    for chosen in (order[held:].sort().values, order[:held]):
        parts.append(Split(split.x[chosen], None if split.y is None else split.y[chosen]))
    return parts[0], parts[1] if held else None
