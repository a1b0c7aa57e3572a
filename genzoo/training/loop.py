"""The steps of a training, without Lightning: noise, gradients, optimisers, averages of the weights, the plan, the costs.

Every step is a function of the weights and of its number alone: its batch is ``batches(step)``, the noise of example ``j``
of the batch f(seed, step, j). A run that is resumed from a checkpoint therefore ends in the same bits as one that was never
interrupted.

Stages follow each other with optimisers, schedules and averages of their own. A finished stage gets the average of its
weights, which is what will be used and so what the next one must build on.

Several processes that train together take a part of each batch and average the gradients of the network whose turn it is; the
same message carries stop requests and the seconds, so that all do the same steps; on accelerators it is read after
each range of steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genzoo.data.loader import Batches
from genzoo.distributions.discretization import dequantize
from genzoo.model import Adversarial, Loss, Stage, TrainableModel
from genzoo.numerics import distributed
from genzoo.numerics.random import batch_generator, reseed, seed_of
from genzoo.training.averaging import ProcessAverage
from genzoo.training.budget import Budget, LearningRate
from genzoo.training.clock import Clock
from genzoo.training.ema import EMA, ema_decay
from genzoo.training.flops import count_step
from genzoo.training.optimization import (
    OptimizerFactory,
    Player,
    clip_gradient,
    only,
    parts_of,
    players_of,
    stages_of,
)
from genzoo.training.plan import CORRECTIONS, CYCLE, UNPLANNED, Plan
from genzoo.training.precision import PATIENCE, FiniteCheck, step_unless
from genzoo.training.state import TrainState
from genzoo.training.state_checks import (
    StateError,
    check_optimizer_state,
    check_progress,
    check_weights,
    upgraded_weights,
)


@dataclass(frozen=True)
class _OneBatch:
    """Replaces ``Batches`` where the FLOPs of a step are counted."""

    batch: tuple[Tensor, Tensor | None]
    device: torch.device
    batch_size: int

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        return self.batch


class TrainingLoop:
    """Trains a generative model by hand:

        loop = TrainingLoop(model, functools.partial(torch.optim.Adam, lr=1e-3), batches, Budget(images=100_000))
        loop.run()

    Args:
        model: the model.
        optimizer: builds an optimiser from a list of parameters, one for each network of each stage.
        batches: the data, by step.
        budget: limits of the run; None for steps without an end.
        learning_rate: factor of the optimiser's rate as a function of progress; constant by default.
        ema_half_life: images after which a weight counts half in the averaged weights, see ``ema_decay``; None for no average.
        clip: largest norm of a network's gradient, None for no limit.
        seed: of the noise.
        scaler: of the loss, where it is computed in half precision.
        compiled: whether torch has compiled the networks.
        channels_last: whether batches of images lie in memory pixel by pixel, as the model's weights then should.

    Attributes:
        ema: the averaged weights, ``ema.model``.
        progress: steps, seconds, FLOPs and the plan, what a checkpoint holds besides weights, averages and optimisers.
        clock: seconds of computing in this process.
        finite: the check of losses and gradients.
        stop_requested: called before every step.
        on_step: called after every step.
        initial: weights that the run begins with, by name, beside those that keep their random or data-dependent values.
        on_decay: called where a longer run would go on in another way, before the first step of the last stage whose learning
            rate depends on the end.
    """

    def __init__(
        self,
        model: TrainableModel,
        optimizer: OptimizerFactory,
        batches: Batches,
        budget: Budget | None = None,
        learning_rate: LearningRate | None = None,
        ema_half_life: float | None = 500_000,
        clip: float | None = None,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
        compiled: bool = False,
        channels_last: bool = False,
    ):
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be positive, or null for none, not {clip}")
        if model.condition and batches.y is not None:
            model.conditioner.fit(batches.y)  # which checks all values once, on the host: no step on a GPU reads them
        self.model = model
        self.batches = batches
        self.budget = budget
        self.learning_rate = learning_rate or LearningRate()
        self.clip = clip
        self.seed = seed
        self.scaler = scaler
        self.compiled, self.channels_last = compiled, channels_last
        self.ema = EMA(model, ema_decay(ema_half_life, batches.batch_size))
        self.stages = stages_of(model)
        self._make_optimizer = optimizer
        self.players = {stage.name: players_of(stage.module, optimizer) for stage in self.stages}
        for stage in self.stages:
            for name, part in parts_of(stage.module).items():
                self.ema.watch(f"{stage.name}/{name}", part)
        shares = [stage.fraction for stage in self.stages]
        endless = Budget(images=(UNPLANNED - 1) * batches.batch_size)
        self.progress = TrainState(Plan(budget or endless, shares, batches.batch_size))
        self.clock = Clock()
        self.finite = FiniteCheck()
        self.stop_requested: Callable[[], bool] = lambda: False
        self.on_step: Callable[[], None] = lambda: None
        self.on_decay: Callable[[], None] = lambda: None
        self.initial: Mapping[str, Tensor] = {}
        self._processes = ProcessAverage()
        self._unshared = 0.0  # seconds of the last step, which other processes do not have yet
        self._costs: dict[tuple[str, str | None], int] = {}  # FLOPs of a step, by stage and turn
        self._given: tuple[Tensor, Tensor | None] | None = None  # a batch that replaces that of ``batches``
        self._terms: dict[str, Tensor] = {}  # of the last step

    # Progress

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return self.progress.plan

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self.progress.steps

    @property
    def images(self) -> int:
        """Real images delivered so far, to any network."""
        return self.steps * self.batches.batch_size

    @property
    def planned_images(self) -> int:
        """Images that schedules expect."""
        assert self.plan.planned_steps is not None, "the plan is made before the first step"
        return self.plan.planned_steps * self.batches.batch_size

    def stage_at(self, step: int) -> tuple[Stage, int, int]:
        """Return the stage of a step, the step's number within it, and how many steps it has."""
        index, number, length = self.plan.stage_at(step)
        return self.stages[index], number, length

    def extend_plan(self) -> None:
        """Plan a restored run anew by its budget, which is larger than that of the plan, see ``Plan.extend``."""
        self.plan.extend(self._cycle, self.steps, self.progress.train_seconds, self.progress.flops)

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
        assert self.plan.planned_steps is not None
        if self.steps >= self.plan.planned_steps:
            return self.plan.planned_by
        late = self.budget and self.budget.seconds is not None and self.progress.train_seconds >= self.budget.seconds
        return "seconds" if late else None

    @property
    def stopping(self) -> bool:
        """Whether this process, or one of those that train with it, is to stop."""
        return self._processes.stop if distributed.world_size() > 1 else self.stop_requested()

    # Steps

    def run(self, end: int | None = None, *, wait: bool = True) -> None:
        """Do the steps before ``end``, or all that the budget allows.

        Args:
            end: the first step that is not done.
            wait: whether to wait at the end for an accelerator: then its seconds are counted, and what is not finite raises.

        Raises:
            NonFiniteError: where a loss or a gradient is not finite.
        """
        if self.plan.planned_steps is None:
            self.make_plan()
        with self.clock.running():
            while (end is None or self.steps < end) and not self.finished and not self.stopping:
                self.step()
                if not self.asynchronous:
                    self._count_seconds()
            if wait:
                self.finite.read()
            if wait and self.asynchronous:
                self._count_seconds()

    def step(self) -> None:
        """Do one optimiser step of one network.

        Raises:
            NonFiniteError: where the loss or a gradient is not finite; no weight has changed then.
        """
        stage, number, planned = self.stage_at(self.steps)
        module, players = stage.module, self.players[stage.name]
        turn = module.turn(number) if isinstance(module, Adversarial) else None
        player = players[turn or "model"]
        batch = self.batches.batch_size
        if stage is self.stages[-1] and not self.progress.decaying:
            self._begin_decay(number * batch, planned * batch)

        if number == 0:
            x, y, rng = self._batch()
            module.initialize(x, y if module.condition else None, rng=rng)
            if self.initial and not self.steps:
                self.model.load_state_dict({**self.model.state_dict(), **self.initial})
        with only(player, players.values()):
            loss, rng = self._backward(module, turn)
        self.progress.flops += self.cost(stage.name, turn)
        if distributed.world_size() > 1:
            loss = self._processes.average(player.parameters, loss, self.stop_requested(), self._unshared)
            self._unshared = 0.0
            if not self.asynchronous:
                self._read_processes()
        if self.scaler:
            self.scaler.unscale_(player.optimizer)
        norm = clip_gradient(player, self.clip)
        if not self._overflows(loss, norm):
            bad = self.finite.check(self.steps, loss, norm)
            factor = self.learning_rate(number * batch, planned * batch)
            for group, base in zip(player.optimizer.param_groups, player.base_lrs, strict=True):
                group["lr"] = base * factor
            take = self._stepper(player)
            if bad is None:
                take()
            else:
                step_unless(bad, player.optimizer, take)
            terms = module.after_step(loss.aux, batch, rng=rng)
            self.ema.update(f"{stage.name}/{player.name}")
            prefix = "" if turn is None else f"{turn}_"
            self._terms = {**loss.terms, **terms, f"{prefix}grad_norm": norm}
            if distributed.rank() == 0:  # which alone writes
                self.progress.window.add(self._terms)
        player.optimizer.zero_grad()
        self.progress.steps += 1
        if self.steps in self.plan.boundaries:
            for name in players:
                self.ema.hand_back(f"{stage.name}/{name}")
        self.on_step()

    def _begin_decay(self, images: int, planned: int) -> None:
        """Call ``on_decay`` where the decay begins; what it does is no part of training."""
        rate = self.learning_rate
        if images and rate.decay == "wsd" and not rate.is_stable(images, planned):
            self.read_clock()
            self.on_decay()
            self.clock.skip()
            self.progress.decaying = True

    def _stepper(self, player: Player) -> Callable[[], Any]:
        """Return what steps an optimiser."""
        return player.optimizer.step

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

    def _backward(self, module: TrainableModel, turn: str | None) -> tuple[Loss, torch.Generator]:
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

    def _overflows(self, loss: Loss, norm: Tensor) -> bool:
        """Whether half precision does not hold the scaled gradients, so that the step is skipped; adapt the scale."""
        if self.scaler is None:
            return False
        state = self.progress
        overflows = bool(torch.isfinite(loss.total.detach()) & ~torch.isfinite(norm)) and state.in_a_row < PATIENCE
        self.scaler.update()
        state.skipped += overflows
        state.in_a_row = state.in_a_row + 1 if overflows else 0
        return overflows

    # Costs and the clock

    def cost(self, stage: str, turn: str | None) -> int:
        """Return the FLOPs of a step, counted the first time, which is no part of training."""
        kind = stage, turn
        if kind not in self._costs:
            self.read_clock()
            self._costs[kind] = self._count(stage, turn) * distributed.world_size()
            self.clock.skip()
        return self._costs[kind]

    def _count(self, stage: str, turn: str | None) -> int:
        other = copy.copy(self)
        batch = self.batches(self.steps) if self._given is None else self._given
        other.batches = _OneBatch(batch, self.batches.device, self.batches.batch_size)  # type: ignore[assignment]
        other.scaler, other._given = None, None  # a scaler makes its tensors when it is first used

        def step(model: TrainableModel) -> None:
            module = next(s.module for s in stages_of(model) if s.name == stage)
            for name, part in parts_of(module).items():
                part.requires_grad_(name == (turn or "model"))
            other._backward(module, turn)

        return count_step(self.model, step, 1 if self.steps else 2)

    @property
    def asynchronous(self) -> bool:
        """Whether a step returns before it is computed."""
        return self.batches.device.type != "cpu"

    def read_clock(self) -> None:
        """Wait for the device, and count the seconds since the clock was last read, if it runs."""
        if self.clock.stands:
            return
        elapsed = self.clock.read(self.batches.device)
        if distributed.world_size() == 1:
            self.progress.train_seconds += elapsed
        else:  # shared with the gradients of the next step
            self._unshared += elapsed

    def _read_processes(self) -> None:
        """Read stop requests and seconds of all processes; on an accelerator this waits for the device."""
        self.progress.train_seconds += self._processes.read()

    def _count_seconds(self) -> None:
        """Read the clock, on an accelerator also those of the other processes, and fit the plan to it."""
        self.read_clock()
        if self.asynchronous:
            self._read_processes()
        self.plan.correct(self.steps, self.progress.train_seconds)

    # State

    def every_player(self) -> list[Player]:
        """Return the networks of all stages."""
        return [player for players in self.players.values() for player in players.values()]

    def state(self) -> dict[str, Any]:
        """Return what, beside the weights and their average, is needed to resume."""
        return {
            **self.progress.state_dict(),
            "ema_updates": dict(self.ema.updates),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "optimizers": [player.optimizer.state_dict() for player in self.every_player()],
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
        found, players = state.get("optimizers"), self.every_player()
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
        for player, own in zip(self.every_player(), optimizer_states, strict=True):
            player.optimizer.load_state_dict(own)
        self.ema.updates = dict(state["ema_updates"])
        self.progress.load_state_dict(state)
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])

    def state_to_device(self) -> None:
        """Move what was restored beside the weights to their device."""
        for player in self.every_player():
            if player.optimizer.state:
                # Which distinguishes what belongs beside a weight and what on the host; Lightning leaves counts there.
                player.optimizer.load_state_dict(player.optimizer.state_dict())
        self.progress.window.to(self.model.device)

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Describe the recorded terms of which the families define more than the name."""
        return {
            f"train/{name}": diagnostic._asdict()
            for stage in self.stages
            for name, diagnostic in stage.module.diagnostics.items()
        }
