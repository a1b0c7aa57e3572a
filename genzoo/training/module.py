"""One Lightning module trains any family.

It owns what no family should do again: optimisers, averages of the weights, the learning rate, the noise of each step,
the count of images, and the check that everything is finite. Optimisation is manual, and ``genzoo.training.callbacks.fit``
hands over several steps at once where steps are short, since Lightning's own loop would cost more than a small model's step.
In a Trainer of the user's own it is an ordinary module: one step for each batch, logged, validated and checkpointed.

Every step is a function of the weights and of its number alone: its batch is ``batches(step)``, the noise of example ``j``
of the batch f(seed, step, j). A run that is resumed from a checkpoint therefore ends in the same bits as one that was never
interrupted.

Stages follow each other with optimisers, schedules and averages of their own. A finished stage gets the average of its
weights, which is what will be used and so what the next one must build on.

Seconds are those of computing. On an accelerator a step returns when it is launched, so the clock is read after waiting for
the device, once per hand-over.

Several processes that train together take a part of each batch and average the gradients of the network whose turn it is; the
same sum carries whether one is to stop, and the seconds, so that all do the same steps; on accelerators it is read after
each hand-over. Torch's ``DistributedDataParallel`` is not used: it expects one backward pass for one call of one module.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from genzoo.data.loader import Batches, Split
from genzoo.distributions.discretization import dequantize
from genzoo.model import Adversarial, GenerativeModel, Loss, Stage, Staged
from genzoo.numerics import distributed
from genzoo.numerics.random import batch_generator, generator, reseed, seed_of
from genzoo.training.budget import Budget, LearningRate
from genzoo.training.compilation import compile_networks
from genzoo.training.ema import EMA
from genzoo.training.flops import count_step
from genzoo.training.plan import CORRECTIONS, CYCLE, UNPLANNED, Plan
from genzoo.training.precision import ADVICE, PATIENCE, NonFiniteError, step_unless
from genzoo.training.state import TrainState, Window
from genzoo.training.state_checks import (
    StateError,
    check_optimizer_state,
    check_progress,
    check_weights,
    upgraded_weights,
)

# By which Lightning has torch load the driver's library at each step of an optimiser, to see if there is a GPU: .5 ms.
os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Player:
    """One network of one stage that is trained: its weights and their optimiser."""

    name: str
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    base_lr: float


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed what was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _OneBatch:
    """Replaces ``Batches`` where the FLOPs of a step are counted."""

    batch: tuple[Tensor, Tensor | None]
    device: torch.device
    batch_size: int

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        return self.batch


class _Epoch:
    """The steps of one epoch, as a data loader of a user's Trainer: (step, step + 1) for each batch."""

    def __init__(self, module: GenerativeModule):
        self.module = module

    def __len__(self) -> int:
        return max(self.module.batches.size // self.module.batches.batch_size, 1)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.module.steps
        return ((step, step + 1) for step in range(first, first + len(self)))


def _stages(model: GenerativeModel) -> list[Stage]:
    return model.stages() if isinstance(model, Staged) else [Stage("train", model, 1.0)]


def _parts(module: GenerativeModel) -> Mapping[str, nn.Module]:
    return module.players() if isinstance(module, Adversarial) else {"model": module}


class GenerativeModule(pl.LightningModule):
    """Trains a generative model, in genzoo's own ``fit`` or in a Trainer of the user's own:

        module = GenerativeModule(VAE((1, 8, 8), levels=17), data=genzoo.data.digits())
        pl.Trainer(max_epochs=10, callbacks=[ModelCheckpoint(monitor="val/loss")]).fit(module)

    There it logs the terms of the loss as ``train/...``, and the loss of the averaged weights on held-out examples as
    ``val/...``. With several devices, give that Trainer ``genzoo.training.callbacks.ManualDDPStrategy``.

    Args:
        model: the model.
        optimizer: builds an optimiser from a list of parameters, one for each network of each stage; Adam with lr=1e-3 by
            default.
        batches: the data, by step; or ``data``.
        budget: limits of the run; None where a Trainer's ``max_steps`` or ``max_epochs`` ends it.
        learning_rate: factor of the optimiser's rate as a function of progress.
        ema_decay: of the averaged weights, see ``EMA``.
        clip: largest norm of a network's gradient, None for no limit.
        seed: of the noise.
        scaler: of the loss, where it is computed in half precision.
        compiled: whether torch compiles the networks, for training alone.
        channels_last: whether batches of images lie in memory pixel by pixel, as the model's weights then should.
        data: a data set, or its training split.
        batch_size: of ``data``.
        val_fraction: of ``data``'s training split, held out for validation.

    Attributes:
        ema: the averaged weights, ``ema.model``.
    """

    def __init__(
        self,
        model: GenerativeModel,
        optimizer: OptimizerFactory | None = None,
        batches: Batches | None = None,
        budget: Budget | None = None,
        learning_rate: LearningRate | None = None,
        ema_decay: float = 0.9999,
        clip: float | None = None,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
        compiled: bool = False,
        channels_last: bool = False,
        *,
        data: Any = None,
        batch_size: int = 128,
        val_fraction: float = 0.1,
    ):
        super().__init__()
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be positive, or null for none, not {clip}")
        self._validation: Split | None = None
        if batches is None:
            if data is None:
                raise ValueError("data: give a data set, or batches")
            train, self._validation = _held_out(getattr(data, "train", data), val_fraction, seed)
            batches = Batches(train, min(batch_size, len(train.x)), seed)
            if train.y is not None and model.condition:
                model.conditioner.fit(train.y)
        if model.condition and batches.y is not None:
            model.conditioner.check(batches.y, len(batches.y))  # once, on the host: no step on a GPU reads their values
        self.automatic_optimization = False
        self.model = model
        self.batches = batches
        self.budget = budget
        self.learning_rate = learning_rate or LearningRate()
        self.clip = clip
        self.seed = seed
        self.scaler = scaler
        self.compiled, self.channels_last = compiled, channels_last
        self.ema = EMA(model, ema_decay)
        self.stages = _stages(model)
        self._make_optimizer = optimizer or functools.partial(torch.optim.Adam, lr=1e-3)
        self.players = {stage.name: self._players(stage) for stage in self.stages}
        shares = [stage.share for stage in self.stages]
        self.progress = TrainState(Plan(budget or Budget(images=batches.batch_size), shares, batches.batch_size))
        self.own_seconds = 0.0  # of computing in this process, since it began
        self._costs: dict[tuple[str, str | None], int] = {}  # FLOPs of a step, by stage and turn
        self._read_at: float | None = None  # when the clock was last read, in a hand-over
        self.latest: dict[str, Any] = {"values": {}, "images_per_second": 0.0}  # what was recorded last
        self.on_step: Callable[[], None] = lambda: None  # called after every step
        self.stop_requested: Callable[[], bool] = lambda: False  # called before every step
        self._elapsed = 0.0  # seconds of the last step, which other processes do not have yet
        self._all_stop = False  # whether one of several processes is to stop
        self._shared: Tensor | None = None  # stops and seconds of all processes that were not read yet
        self._first_bad: Tensor | None = None  # on an accelerator: the first step that was not finite
        self.managed = False  # whether genzoo's own ``fit`` trains it
        self._given: tuple[Tensor, Tensor | None] | None = None  # a batch of the user's own data loader
        self._terms: dict[str, Tensor] = {}  # of the last step
        self._checkpoint: Mapping[str, Any] | None = None  # of Lightning, to be restored

    def _players(self, stage: Stage) -> dict[str, Player]:
        players = {}
        for name, part in _parts(stage.module).items():
            parameters = [p for p in part.parameters() if p.requires_grad]
            built = self._make_optimizer(parameters)
            players[name] = Player(name, parameters, built, built.param_groups[0]["lr"])
            self.ema.watch(f"{stage.name}/{name}", part)
        return players

    # Progress

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self.progress.plan

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self.progress.steps

    @steps.setter
    def steps(self, value: int) -> None:
        self.progress.steps = value

    @property
    def train_seconds(self) -> float:
        """Seconds of computing so far."""
        return self.progress.train_seconds

    @train_seconds.setter
    def train_seconds(self, value: float) -> None:
        self.progress.train_seconds = value

    @property
    def flops(self) -> int:
        """FLOPs of all steps so far."""
        return self.progress.flops

    @flops.setter
    def flops(self, value: int) -> None:
        self.progress.flops = value

    @property
    def skipped(self) -> int:
        """Steps whose scaled gradients overflowed."""
        return self.progress.skipped

    @property
    def window(self) -> Window:
        """Terms of the loss that were not written yet."""
        return self.progress.window

    @property
    def boundaries(self) -> list[int]:
        """The steps at which all stages but the last end."""
        return self.plan.boundaries

    @property
    def planned_steps(self) -> int | None:
        """Steps of the whole run, None before the plan is made."""
        return self.plan.planned_steps

    @planned_steps.setter
    def planned_steps(self, value: int) -> None:
        self.plan.planned_steps = value

    @property
    def planned_by(self) -> str:
        """The limit that the plan follows."""
        return self.plan.planned_by

    @property
    def images(self) -> int:
        """Real images delivered so far, to any network."""
        return self.steps * self.batches.batch_size

    @property
    def planned_images(self) -> int:
        """Images that schedules expect."""
        assert self.planned_steps is not None, "the plan is made before the first step"
        return self.planned_steps * self.batches.batch_size

    @property
    def planned(self) -> bool:
        """Whether the end of the plan is known, as by the clock it is not before some steps were measured."""
        return self.plan.known

    def stage_at(self, step: int) -> tuple[Stage, int, int]:
        """Return the stage of a step, the step's number within it, and how many steps it has."""
        index, number, length = self.plan.stage_at(step)
        return self.stages[index], number, length

    def make_plan(self) -> None:
        """Fix how many steps schedules expect, see ``Plan.start``."""
        self.plan.start(self._cycle)

    def _cycle(self, stage: int) -> list[int]:
        """Return the FLOPs of each of ``CYCLE`` steps of a stage."""
        name, module = self.stages[stage].name, self.stages[stage].module
        turns = [module.turn(i) if isinstance(module, Adversarial) else None for i in range(CYCLE)]
        return [self.cost(name, turn) for turn in turns]

    @property
    def finished(self) -> bool:
        """Whether the plan is fulfilled or the seconds are spent."""
        return self.ended_by is not None

    @property
    def ended_by(self) -> str | None:
        """The limit that has ended the run: images, seconds or flops; None before its end."""
        assert self.planned_steps is not None
        if self.steps >= self.planned_steps:
            return self.planned_by
        late = self.budget and self.budget.seconds is not None and self.train_seconds >= self.budget.seconds
        return "seconds" if late else None

    @property
    def stopping(self) -> bool:
        """Whether this process, or one of those that train with it, is to stop."""
        return self._all_stop if distributed.world_size() > 1 else self.stop_requested()

    # One step

    def step(self) -> None:
        """Do one optimiser step of one network.

        Raises:
            NonFiniteError: where the loss or a gradient is not finite; no weight has changed then.
        """
        stage, number, planned = self.stage_at(self.steps)
        module, players = stage.module, self.players[stage.name]
        turn = module.turn(number) if isinstance(module, Adversarial) else None
        player = players[turn or "model"]

        if number == 0:
            x, y, rng = self._batch()
            module.initialize(x, y if module.condition else None, rng=rng)
        with self._only(player, players):
            loss, rng = self._backward(module, turn)
        self.flops += self.cost(stage.name, turn)
        if distributed.world_size() > 1:
            loss = self._average(player, loss)
            self._elapsed = 0.0
        if self.scaler:
            self.scaler.unscale_(player.optimizer)
        norm = self._clip(player)
        if self._overflows(loss, norm):
            player.optimizer.zero_grad()
        else:
            bad = self._guard(player, loss, norm)
            batch = self.batches.batch_size
            factor = self.learning_rate(number * batch, planned * batch)
            for group in player.optimizer.param_groups:
                group["lr"] = player.base_lr * factor
            take = self._stepper(player)
            if bad is None:
                take()
            else:
                step_unless(bad, player.optimizer, take)
            player.optimizer.zero_grad()
            terms = module.after_step(loss.aux, batch, rng=rng)
            self.ema.update(f"{stage.name}/{player.name}")
            prefix = "" if turn is None else f"{turn}_"
            self._terms = {**loss.terms, **terms, f"{prefix}grad_norm": norm}
            if distributed.rank() == 0:  # which alone writes
                self.window.add(self._terms)
        self.steps += 1
        if self.steps in self.boundaries:
            for name in players:
                self.ema.hand_back(f"{stage.name}/{name}")
        self.on_step()

    def _stepper(self, player: Player) -> Callable[[], Any]:
        """Return what steps an optimiser: in a user's Trainer Lightning's wrapper of it, which counts steps."""
        if self.managed or self._trainer is None:
            return player.optimizer.step
        wrapped = self.optimizers()
        every = wrapped if isinstance(wrapped, list) else [wrapped]
        return next(one for one in every if one.optimizer is player.optimizer).step

    def _batch(self) -> tuple[Tensor, Tensor | None, torch.Generator]:
        """Return data and conditions of the present step, and its source of noise."""
        rng = batch_generator("noise", self.seed, self.steps, device=self.batches.device)
        x, y = self.batches(self.steps) if self._given is None else self._given
        if self.model.levels is not None and not x.is_floating_point():
            x = dequantize(x, self.model.levels, rng)
        x = x.to(self.model.dtype)
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y, rng

    def _backward(self, module: GenerativeModel, turn: str | None) -> tuple[Loss, torch.Generator]:
        """Compute the loss of the present step and its gradients; return the source of noise too."""
        # Dropout draws from the global generator. torch.manual_seed would seed every kind of device at each step.
        device = self.batches.device
        reseed(torch.default_generator, "layers", self.seed, self.steps)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed_of("layers", self.seed, self.steps))
        x, y, rng = self._batch()
        y = y if module.condition else None
        if self.compiled:  # what the graphs of the last step hold may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        loss = module.loss(x, y, turn=turn, rng=rng) if isinstance(module, Adversarial) else module.loss(x, y, rng=rng)
        with torch.autocast(device.type, enabled=False):  # gradients have the types of what they are gradients of
            (self.scaler.scale(loss.total) if self.scaler else loss.total).backward()
        return loss, rng

    @staticmethod
    @contextlib.contextmanager
    def _only(player: Player, players: dict[str, Player]) -> Iterator[None]:
        """Compute gradients for one network alone."""
        others = [p for other in players.values() if other is not player for p in other.parameters]
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)

    @torch.no_grad()
    def _clip(self, player: Player) -> Tensor:
        """Limit the norm of a network's gradient, and return what it was; as ``clip_grad_norm_``, in a third of its time."""
        gradients = [p.grad for p in player.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        # Where the norm can be read without waiting, a factor of one is spared.
        if self.clip is not None and (norm.device.type != "cpu" or not norm.item() + 1e-6 <= self.clip):
            torch.nn.utils.clip_grads_with_norm_(player.parameters, self.clip, norm)
        return norm

    def _overflows(self, loss: Loss, norm: Tensor) -> bool:
        """Whether this step is to be skipped, since half precision does not hold its scaled gradients; adapt the scale."""
        if self.scaler is None:
            return False
        state = self.progress
        overflows = bool(torch.isfinite(loss.total.detach()) & ~torch.isfinite(norm)) and state.in_a_row < PATIENCE
        self.scaler.update()
        state.skipped += overflows
        state.in_a_row = state.in_a_row + 1 if overflows else 0
        return overflows

    @staticmethod
    def deferred(player: Player) -> bool:
        """Whether a step that is not finite is left out on the device and reported later."""
        return player.parameters[0].device.type != "cpu"

    def _guard(self, player: Player, loss: Loss, norm: Tensor) -> Tensor | None:
        """Raise where a step is not finite; where that is deferred, return its flag, () bool, and remember the first."""
        if self.deferred(player):
            bad = ~(torch.isfinite(loss.total.detach()) & torch.isfinite(norm))
            if self._first_bad is None:
                self._first_bad = torch.full((), -1, device=bad.device)
            self._first_bad = torch.where(bad & (self._first_bad < 0), self.steps, self._first_bad)
            return bad
        if not (math.isfinite(loss.total.item()) and math.isfinite(norm.item())):
            terms = [name for name, value in loss.terms.items() if not bool(torch.isfinite(value).all())]
            where = f"loss term '{terms[0]}'" if terms else "gradient" if bool(torch.isfinite(loss.total)) else "loss"
            raise NonFiniteError(f"{where} is not finite at step {self.steps}: {ADVICE}")
        return None

    def check_finite(self) -> None:
        """Wait for the device and read the flag of a step that was skipped.

        Raises:
            NonFiniteError: naming the first such step.
        """
        if self._first_bad is not None and (first := int(self._first_bad)) >= 0:
            raise NonFiniteError(f"loss or gradient is not finite at step {first}: {ADVICE}")

    # Several processes

    @torch.no_grad()
    def _average(self, player: Player, loss: Loss) -> Loss:
        """Average a network's gradients and losses over processes, and what all of them must share."""
        gradients = [p.grad for p in player.parameters if p.grad is not None]
        like = gradients[0]
        # Numbers of the host are filled in: to copy them would wait for the device.
        own = [like.new_full((), float(number)) for number in (self.stop_requested(), self._elapsed)]
        facts = torch.stack([*own, *(value.detach().to(like.dtype) for value in (loss.total, *loss.terms.values()))])
        flat = distributed.all_reduce_mean(torch.cat([tensor.flatten() for tensor in (*gradients, facts)]))
        *averages, facts = flat.split([tensor.numel() for tensor in (*gradients, facts)])
        torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(averages, gradients, strict=True)])
        self._shared = facts[:2] if self._shared is None else self._shared + facts[:2]
        if facts.device.type == "cpu":
            self._read_shared()
        total, *terms = facts[2:]
        return Loss(total, dict(zip(loss.terms, terms, strict=True)), loss.aux)

    def _read_shared(self) -> None:
        """Read what all processes have shared since the last time: whether to stop, and their seconds.

        On an accelerator that waits for the device, and is done at the end of each hand-over, by all of them alike.
        """
        if self._shared is None:
            return
        stop, elapsed = self._shared.tolist()
        self._shared = None
        self._all_stop = stop > 0
        self.train_seconds += elapsed

    # Costs and the clock

    def cost(self, stage: str, turn: str | None) -> int:
        """Return the FLOPs of a step, counted the first time, which is no part of training."""
        kind = stage, turn
        if kind not in self._costs:
            if self._read_at is not None:
                self.read_clock()
            self._costs[kind] = self._count(stage, turn) * distributed.world_size()
            if self._read_at is not None:
                self._read_at = time.monotonic()
        return self._costs[kind]

    def _count(self, stage: str, turn: str | None) -> int:
        other = copy.copy(self)
        batch = self.batches(self.steps) if self._given is None else self._given
        other.batches = _OneBatch(batch, self.batches.device, self.batches.batch_size)  # type: ignore[assignment]
        other.scaler, other._given = None, None  # a scaler makes its tensors when it is first used

        def step(model: GenerativeModel) -> None:
            module = next(s.module for s in _stages(model) if s.name == stage)
            for name, part in _parts(module).items():
                part.requires_grad_(name == (turn or "model"))
            other._backward(module, turn)

        return count_step(self.model, step, 1 if self.steps else 2)

    @property
    def asynchronous(self) -> bool:
        """Whether a step returns before it is computed."""
        return self.batches.device.type != "cpu"

    def read_clock(self) -> None:
        """Wait for the device, and count the seconds since the clock was last read in this hand-over."""
        assert self._read_at is not None
        synchronize(self.batches.device)
        now = time.monotonic()
        elapsed, self._read_at = now - self._read_at, now
        self.own_seconds += elapsed
        if distributed.world_size() == 1:
            self.train_seconds += elapsed
        else:  # shared with the gradients of the next step
            self._elapsed += elapsed

    # Lightning

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Do the steps of a range (first, end), as many of them as the budget allows, or one step on a batch (x, y)."""
        steps = batch if isinstance(batch, tuple | list) and isinstance(batch[0], int) else None
        if steps is None:
            self._given = (
                (batch[0], batch[1] if len(batch) > 1 else None) if isinstance(batch, tuple | list) else (batch, None)
            )
            steps = self.steps, self.steps + 1
        self._read_at = time.monotonic()
        try:
            while self.steps < steps[1] and not self.finished and not self.stopping:
                self.step()
                if not self.asynchronous:
                    self.read_clock()
                    self.plan.correct(self.steps, self.train_seconds)
            if self.managed:
                self.check_finite()
            if self.asynchronous and self.managed:
                self.read_clock()
                self._read_shared()
                self.plan.correct(self.steps, self.train_seconds)
        finally:
            self._read_at, self._given = None, None
        if not self.managed:
            self.log_dict({f"train/{name}": value for name, value in self._terms.items()}, prog_bar=True)
            if self.finished:
                self.trainer.should_stop = True

    def on_train_epoch_end(self) -> None:
        """In a user's Trainer: read the flag of a step that was not finite."""
        if not self.managed:
            self.check_finite()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss of the averaged weights on held-out examples."""
        x, *rest = batch if isinstance(batch, tuple | list) else (batch,)
        model: GenerativeModel = self.ema.model  # type: ignore[assignment]
        rng = torch.Generator(x.device).manual_seed(seed_of("validation", self.seed, batch_idx))
        x = (dequantize(x, model.levels, rng) if model.levels and not x.is_floating_point() else x).to(model.dtype)
        y = rest[0] if rest and model.condition else None
        if isinstance(model, Adversarial):
            losses = {turn: model.loss(x, y, turn=turn, rng=rng).total for turn in model.players()}
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
        if not self.managed:
            self._join_trainer()
        self.batches.share(distributed.rank(), distributed.world_size())
        self._state_to_device()
        if self.compiled:
            graphs = self.batches.device.type == "cuda"  # which spare the launches, one by one, of many small kernels
            compile_networks(self.model, mode="reduce-overhead" if graphs else "default", dynamic=False)
        if self.planned_steps is None:
            with self.trainer.precision_plugin.train_step_context():
                self.make_plan()

    def _join_trainer(self) -> None:
        """Fit budget, devices and a restored checkpoint to a user's Trainer."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError("precision=16-mixed needs genzoo's own scaler: use bf16-mixed, or python -m genzoo")
        if self.batches.device != self.device:
            self.batches.to(self.device)
        self.ema.model.to(self.device)
        if self.budget is None:
            steps = self.trainer.estimated_stepping_batches
            endless = not math.isfinite(steps) or steps < 1
            self.plan.budget = Budget(images=(UNPLANNED - 1 if endless else int(steps)) * self.batches.batch_size)
        if self._checkpoint is not None:
            saved, self._checkpoint = self._checkpoint, None
            self.restore(self.model.state_dict(), saved["ema"], saved["state"])
            if self.budget is None:  # the end is this Trainer's
                self.make_plan()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the averaged weights and the progress to a checkpoint of Lightning's."""
        average = {name: value.cpu() for name, value in self.ema.model.state_dict().items()}
        checkpoint["genzoo"] = {"ema": average, "state": self.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what ``on_save_checkpoint`` has added, until the Trainer has set up the devices."""
        self._checkpoint = checkpoint.get("genzoo")

    def _state_to_device(self) -> None:
        """Move what was restored beside the weights to their device."""
        for player in self._every_player():
            if player.optimizer.state:
                # Which distinguishes what belongs beside a weight and what on the host; Lightning leaves counts there.
                player.optimizer.load_state_dict(player.optimizer.state_dict())
        self.window.to(self.model.device)

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Describe the recorded terms of which the families define more than the name."""
        return {
            f"train/{name}": diagnostic._asdict()
            for stage in self.stages
            for name, diagnostic in stage.module.diagnostics.items()
        }

    def _every_player(self) -> list[Player]:
        return [player for players in self.players.values() for player in players.values()]

    def configure_optimizers(self) -> Any:
        """Return the optimisers, which the module steps itself; in a user's Trainer with schedulers that only show the rate."""
        optimizers = [player.optimizer for player in self._every_player()]
        if self.managed:
            return optimizers
        shown = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0) for optimizer in optimizers]
        return optimizers, [{"scheduler": scheduler, "interval": "step"} for scheduler in shown]

    # State

    def state(self) -> dict[str, Any]:
        """Return what, beside the weights and their average, is needed to resume."""
        return {
            **self.progress.state_dict(),
            "ema_updates": dict(self.ema.updates),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "optimizers": [player.optimizer.state_dict() for player in self._every_player()],
        }

    def _checked(self, state: Any) -> list[dict[str, Any]]:
        """Check a state that ``state`` has returned, in any process; return what the optimisers may load."""
        images = self.budget.images if self.budget else None
        check_progress(
            state,
            stages=len(self.stages),
            longest=None if images is None else math.ceil(images / self.batches.batch_size),
            corrections=len(CORRECTIONS),
            updates=self.ema.updates,
        )
        found, players = state.get("optimizers"), self._every_player()
        if not isinstance(found, list) or len(found) != len(players):
            raise StateError(f"optimizers: must be a list of {len(players)}")
        return [
            check_optimizer_state(own, player.optimizer, self._make_optimizer, f"optimizers[{i}]")
            for i, (player, own) in enumerate(zip(players, found, strict=True))
        ]

    def restore(self, weights: dict[str, Tensor], average: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Resume from where ``state`` was returned.

        Args:
            weights, average: of the model, and of its averaged copy.
            state: the rest.

        Raises:
            RuntimeError, ValueError: where the weights are another model's.
            StateError: where the state is not that of a training of this configuration.
        """
        weights = upgraded_weights(weights, self.model.state_dict())
        average = upgraded_weights(average, self.model.state_dict())
        for name, found, model in (("weights", weights, self.model), ("ema", average, self.ema.model)):
            try:
                check_weights(found, model.state_dict())
            except ValueError as error:
                raise ValueError(f"{name}.safetensors: {error}") from error
        self.model.load_state_dict(weights)
        self.ema.model.load_state_dict(average)
        optimizer_states = self._checked(state)
        for player, own in zip(self._every_player(), optimizer_states, strict=True):
            player.optimizer.load_state_dict(own)
        self.ema.updates = dict(state["ema_updates"])
        self.progress.load_state_dict(state)
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])


def _held_out(split: Any, fraction: float, seed: int) -> tuple[Split, Split | None]:
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
