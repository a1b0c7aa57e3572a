"""One Lightning module trains any family.

It owns what no family should do again: optimisers, averages of the weights, the learning rate, the noise of each step,
the count of images seen, and the check that everything is finite. Optimisation is manual, and Lightning hands over
several steps at once where steps are short, since its own loop would cost more than a small model's step. The module
therefore keeps its own step counter; Lightning's ``global_step`` is never read.

Every step is a function of the weights and of its number alone: its batch is ``batches(step)``, the noise of example ``j``
of the batch f(seed, step, j). A run that goes on from a checkpoint therefore ends in the same bits as one that was never
interrupted.

Stages follow each other with optimisers, schedules and averages of their own. A finished stage gets the average of its
weights, which is what will be used and so what the next one must build on. A plan gives each stage its share of the images,
or where the seconds end the run its share of the seconds, since the steps of one stage may take longer than another's.

Seconds are those of computing. On an accelerator a step returns when it is launched, so the clock is read after waiting for
the device, once per hand-over. A plan by the clock is fitted to the speed of the steps that were trained: the first time
after a few percent of the seconds, until when schedules stand at their beginning, and a few times later.

Several processes that train together take a share of each batch and average the gradients of the player whose turn it is; the
same sum carries whether one was told to stop, and the seconds, so that all do the same steps; on accelerators it is read after
each hand-over. Torch's ``DistributedDataParallel`` is not used: it expects one backward pass for one call of one module.

A step whose loss or gradient is not finite moves no weight. On a CPU it raises at once; on an accelerator, where looking would
stall the device, a flag on the device makes a fused optimiser skip the step, or undoes that of another one, and is read after
each hand-over and before anything is recorded. In half precision the loss is scaled so that small gradients do not vanish; a
step whose scaled gradients overflow is skipped and counted, and the scale is halved, for which the host waits.

References:
    Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740 (sec. 3.2, scaling of the loss).
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from genzoo.data.loader import Batches
from genzoo.distributions.discretization import dequantize
from genzoo.model import Adversarial, GenerativeModel, Loss, Stage, Staged
from genzoo.numerics import distributed
from genzoo.numerics.random import batch_generator, reseed, seed_of
from genzoo.training.budget import Budget, LearningRate
from genzoo.training.ema import EMA
from genzoo.training.flops import count_step
from genzoo.training.state_checks import (
    StateError,
    check_optimizer_state,
    check_progress,
    check_weights,
    upgraded_weights,
)

# Fractions of a stage's plan or seconds after which the plan is fitted to the clock.
CORRECTIONS = (0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)
UNPLANNED = 10**9  # steps that a stage seems to have before the first of them
MARGIN = 1.05  # times the seconds left: a count of images or FLOPs that takes less keeps its own plan
# By which Lightning has torch load the driver's library at each step of an optimiser, to see if there is a GPU: .5 ms.
os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
_ADVICE = "try a lower optimizer.lr or trainer.clip"
PATIENCE = 20  # steps in a row that may overflow in half precision: from 2^16 the scale has then come down to 1/16


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or infinite; the step that met it changed no weight."""

    exit_code = 3  # of the command line


@dataclass
class Player:
    """One player of one stage: its weights and their optimiser."""

    name: str
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    base_lr: float


@dataclass
class Window:
    """Terms of the loss since they were last written, kept on the device."""

    terms: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            self.terms.setdefault(name, []).append(value)

    def state(self) -> dict[str, Tensor]:
        """Return the terms so far, each as one tensor."""
        return {name: torch.stack(values) for name, values in self.terms.items()}

    def flush(self) -> dict[str, float]:
        """Return the mean of each term and forget them."""
        if not self.terms:
            return {}
        means = torch.stack([torch.stack(values).float().mean() for values in self.terms.values()]).tolist()
        names, self.terms = list(self.terms), {}
        return dict(zip(names, means, strict=True))

    def to(self, device: torch.device) -> None:
        """Move the terms to a device."""
        self.terms = {name: list(torch.stack(values).to(device)) for name, values in self.terms.items()}


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed what was launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _OneBatch:
    """Stands in for ``Batches`` where a step is counted."""

    batch: tuple[Tensor, Tensor | None]
    device: torch.device

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        return self.batch


def _stages(model: GenerativeModel) -> list[Stage]:
    return model.stages() if isinstance(model, Staged) else [Stage("train", model, 1.0)]


def _parts(module: GenerativeModel) -> Mapping[str, nn.Module]:
    return module.players() if isinstance(module, Adversarial) else {"model": module}


@torch.no_grad()
def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step an optimiser, and leave all weights as they were where ``bad``, () bool, is true; the host does not wait for it.

    Fused optimisers skip the step by themselves. The weights of others are put back: a few large operations rather than many
    small ones, which cost some passes over the weights and the memory of three copies. Their averages get a gradient of zero.
    """
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # what the fused kernels call the flag
        optimizer.step()
        return
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients: list[Tensor] = [p.grad for p in weights if p.grad is not None]

    def flat(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors])

    def assign(tensors: Sequence[Tensor], values: Tensor) -> None:
        parts = values.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])

    assign(gradients, torch.where(bad, 0, flat(gradients)))
    before = flat(weights)
    optimizer.step()
    assign(weights, torch.where(bad, before, flat(weights)))


def compile_networks(model: nn.Module, **options: Any) -> None:
    """Compile the networks of a model in place, each as a whole; copies of the model are not compiled.

    A module without a ``forward`` of its own, such as a list or the ladder of a hierarchical autoencoder, is never called:
    its parts are compiled one by one.

    Args:
        model: whose networks are called in training.
        options: as ``torch.compile`` takes them.
    """
    for name, part in model.named_children():
        if isinstance(part, GenerativeModel) or type(part).forward is nn.Module.forward:
            compile_networks(part, **options)
        elif not isinstance(model, GenerativeModel) or name not in model.eager:
            part.compile(**options)


class GenerativeModule(pl.LightningModule):
    """Trains a generative model.

    Args:
        model: the model.
        optimizer: builds an optimiser from a list of parameters; one for each player of each stage.
        batches: the data, by step.
        budget: what the run may spend.
        learning_rate: factor of the optimiser's rate as a function of progress.
        ema_decay: of the averaged weights, see ``EMA``.
        clip: largest norm of a player's gradient, None for no limit.
        seed: of the noise.
        scaler: of the loss, where it is computed in half precision.
        compiled: whether torch compiles the networks, for training alone.
        channels_last: whether batches of images lie in memory pixel by pixel, as the model's weights then should.
    """

    def __init__(
        self,
        model: GenerativeModel,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        batches: Batches,
        budget: Budget,
        learning_rate: LearningRate | None = None,
        ema_decay: float = 0.9999,
        clip: float | None = None,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
        compiled: bool = False,
        channels_last: bool = False,
    ):
        super().__init__()
        if clip is not None and clip <= 0:
            raise ValueError(f"clip must be positive, or null for none, not {clip}")
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
        self.skipped, self._in_a_row = 0, 0  # steps whose scaled gradients overflowed
        self.ema = EMA(model, ema_decay)
        self.stages = _stages(model)
        self._make_optimizer = optimizer
        self.players = {stage.name: self._players(stage, optimizer) for stage in self.stages}
        self.planned_steps: int | None = None  # set before the first step
        self.planned_by = ""  # the limit that the plan follows
        self.steps = 0
        self.train_seconds = 0.0
        self.own_seconds = 0.0  # of computing in this process, since it began
        self.flops = 0  # of all steps so far
        self._costs: dict[tuple[str, str | None], int] = {}  # FLOPs of a step, by stage and turn
        self.boundaries: list[int] = []  # the steps at which all stages but the last end
        self._counted: list[int] = []  # the ends of all stages by a count of images or FLOPs
        self._counted_by = ""  # the stricter of the two
        self._speeds: list[float | None] = [None] * len(self.stages)  # of each stage, in steps a second, once measured
        self._begun = 0, 0.0  # steps and seconds when the present stage began
        self._fitted: tuple[int, float] | None = None  # and from when on its speed is measured
        self._corrections = 0  # of the present stage
        self._read_at: float | None = None  # when the clock was last read, in a hand-over
        self.window = Window()
        self.latest: dict[str, Any] = {"values": {}, "images_per_second": 0.0}  # what was recorded last
        self.on_step: Callable[[], None] = lambda: None  # called after every step
        self.stop_requested: Callable[[], bool] = lambda: False  # asked before every step
        self._elapsed = 0.0  # seconds of the last step, which other processes have not heard of
        self._all_stop = False  # whether one of several processes was told to stop
        self._shared: Tensor | None = None  # stops and seconds of all processes that were not read yet
        self._first_bad: Tensor | None = None  # on an accelerator: the first step that was not finite

    def _players(
        self, stage: Stage, optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> dict[str, Player]:
        players = {}
        for name, part in _parts(stage.module).items():
            parameters = [p for p in part.parameters() if p.requires_grad]
            built = optimizer(parameters)
            players[name] = Player(name, parameters, built, built.param_groups[0]["lr"])
            self.ema.watch(f"{stage.name}/{name}", part)
        return players

    @property
    def images(self) -> int:
        """Real images delivered so far, to any player."""
        return self.steps * self.batches.batch_size

    @property
    def planned_images(self) -> int:
        """Images that schedules expect."""
        assert self.planned_steps is not None, "the plan is set before the first step"
        return self.planned_steps * self.batches.batch_size

    @property
    def planned(self) -> bool:
        """Whether the end of the plan is known, as by the clock it is not before some steps were measured."""
        return self.planned_steps is not None and self.planned_steps < UNPLANNED

    def stage_at(self, step: int) -> tuple[Stage, int, int]:
        """Return the stage of a step, the step's number within it, and how many steps it has."""
        assert self.planned_steps is not None
        start = 0
        for stage, stop in zip(self.stages, self.boundaries, strict=False):  # the last has the end of the plan
            if step < stop:
                return stage, step - start, stop - start
            start = stop
        return self.stages[-1], step - start, self.planned_steps - start

    def step(self) -> None:
        """Do one optimiser step of one player.

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
            if bad is None:
                player.optimizer.step()
            else:
                step_unless(bad, player.optimizer)
            player.optimizer.zero_grad()
            terms = module.after_step(loss.aux, batch, rng=rng)
            self.ema.update(f"{stage.name}/{player.name}")
            prefix = "" if turn is None else f"{turn}_"
            if distributed.rank() == 0:  # which alone writes
                self.window.add({**loss.terms, **terms, f"{prefix}grad_norm": norm})
        self.steps += 1
        if self.steps in self.boundaries:
            for name in players:
                self.ema.hand_back(f"{stage.name}/{name}")
        self.on_step()

    @torch.no_grad()
    def _clip(self, player: Player) -> Tensor:
        """Limit the norm of a player's gradient, and return what it was; as ``clip_grad_norm_``, in a third of its time."""
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
        overflows = bool(torch.isfinite(loss.total.detach()) & ~torch.isfinite(norm)) and self._in_a_row < PATIENCE
        self.scaler.update()
        self.skipped += overflows
        self._in_a_row = self._in_a_row + 1 if overflows else 0
        return overflows

    @torch.no_grad()
    def _average(self, player: Player, loss: Loss) -> Loss:
        """Average a player's gradients and losses over processes, and what all of them must agree on."""
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
        """Read what all processes have agreed on since the last time: whether to stop, and their seconds.

        On an accelerator that waits for the device, and is done at the end of each hand-over, by all of them alike.
        """
        if self._shared is None:
            return
        stop, elapsed = self._shared.tolist()
        self._shared = None
        self._all_stop = stop > 0
        self.train_seconds += elapsed

    def _batch(self) -> tuple[Tensor, Tensor | None, torch.Generator]:
        """Return data and conditions of the present step, and its source of noise."""
        rng = batch_generator("noise", self.seed, self.steps, device=self.batches.device)
        x, y = self.batches(self.steps)
        x = (x if self.model.levels is None else dequantize(x, self.model.levels, rng)).to(self.model.dtype)
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y, rng

    def _backward(self, module: GenerativeModel, turn: str | None) -> tuple[Loss, torch.Generator]:
        """Compute the loss of the present step and its gradients; return the source of noise too."""
        # Dropout draws from the global generator. torch.manual_seed would ask for every kind of device at each step.
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
        other.batches = _OneBatch(self.batches(self.steps), self.batches.device)  # type: ignore[assignment]
        other.scaler = None  # which makes its tensors when it is first used

        def step(model: GenerativeModel) -> None:
            module = next(s.module for s in _stages(model) if s.name == stage)
            for name, part in _parts(module).items():
                part.requires_grad_(name == (turn or "model"))
            other._backward(module, turn)

        return count_step(self.model, step, 1 if self.steps else 2)

    @staticmethod
    @contextlib.contextmanager
    def _only(player: Player, players: dict[str, Player]) -> Iterator[None]:
        """Compute gradients for one player alone."""
        others = [p for other in players.values() if other is not player for p in other.parameters]
        for p in others:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p in others:
                p.requires_grad_(True)

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
            raise NonFiniteError(f"{where} is not finite at step {self.steps}: {_ADVICE}")
        return None

    def check_finite(self) -> None:
        """Wait for the device and read the flag of a step that was skipped.

        Raises:
            NonFiniteError: naming the first such step.
        """
        if self._first_bad is not None and (first := int(self._first_bad)) >= 0:
            raise NonFiniteError(f"loss or gradient is not finite at step {first}: {_ADVICE}")

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
        late = self.budget.seconds is not None and self.train_seconds >= self.budget.seconds
        return "seconds" if late else None

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

    def training_step(self, steps: tuple[int, int], batch_idx: int) -> None:
        """Do the steps that Lightning hands over, or as many of them as the budget allows."""
        self._read_at = time.monotonic()
        try:
            while self.steps < steps[1] and not self.finished and not self.stopping:
                self.step()
                if not self.asynchronous:
                    self.read_clock()
                    self._correct_plan()
            self.check_finite()
            if self.asynchronous:
                self.read_clock()
                self._read_shared()
                self._correct_plan()
        finally:
            self._read_at = None

    @property
    def stopping(self) -> bool:
        """Whether this process, or one of those that train with it, was told to stop."""
        return self._all_stop if distributed.world_size() > 1 else self.stop_requested()

    def plan(self) -> None:
        """Fix how many steps schedules expect; where only seconds are given, that is known once some were measured."""
        plans = {}
        if self.budget.images is not None:
            steps = math.ceil(self.budget.images / self.batches.batch_size)
            plans["images"] = [round(share * steps) for share in self._shares()]
        if self.budget.flops is not None:
            lengths = [self._affordable(i, stage.share * self.budget.flops) for i, stage in enumerate(self.stages)]
            plans["flops"] = list(itertools.accumulate(lengths))
        if plans:
            self._counted_by, self._counted = min(plans.items(), key=lambda plan: plan[1][-1])
            self.planned_by = self._counted_by
            *self.boundaries, self.planned_steps = self._counted
        else:
            self.planned_by = "seconds"
            self._unplan(0)

    def _unplan(self, present: int) -> None:
        """Leave open where the present stage and those after it end."""
        self.boundaries = [*self.boundaries[:present], *[UNPLANNED] * (len(self.stages) - 1 - present)]
        self.planned_steps = UNPLANNED

    def _shares(self) -> list[float]:
        """Return the share of the budget that is spent at the end of each stage."""
        return list(itertools.accumulate(stage.share for stage in self.stages))

    def _affordable(self, stage: int, flops: float) -> int:
        """Return how many steps of one stage some FLOPs pay for, at least one."""
        name, module = self.stages[stage].name, self.stages[stage].module
        turns = [module.turn(i) if isinstance(module, Adversarial) else None for i in range(5040)]  # of any short cycle
        spent = list(itertools.accumulate(self.cost(name, turn) for turn in turns))
        cycles, left = divmod(flops, spent[-1])
        return max(int(cycles) * len(turns) + bisect.bisect_right(spent, left), 1)

    def _plan_by_clock(self, present: int) -> None:
        """Plan from the present stage on, whose speed is known, by the limit that will end the run.

        By the clock each stage gets as many steps as its share of the seconds will hold, a little less than fits, so that a
        schedule ends before the clock does. A stage that is late takes its time from the next one.
        """
        assert self.budget.seconds is not None and self._speeds[present] is not None
        # A stage that has not run yet is taken to be as fast as this one.
        speeds = [speed or self._speeds[present] or 0.0 for speed in self._speeds[present:]]
        ends = self.boundaries[:present]
        if self._counted:
            starts = [self.steps, *self._counted[present:-1]]
            lengths = [stop - start for start, stop in zip(starts, self._counted[present:], strict=True)]
            needed = sum(max(steps, 0) / speed for steps, speed in zip(lengths, speeds, strict=True))
            if needed <= MARGIN * (self.budget.seconds - self.train_seconds):
                self.planned_by = self._counted_by
                *self.boundaries, self.planned_steps = [*ends, *self._counted[present:]]
                return
        self.planned_by, stop, seconds = "seconds", self.steps, self.train_seconds
        for share, speed in zip(self._shares()[present:], speeds, strict=True):
            stop += max(1, int(0.97 * speed * (share * self.budget.seconds - seconds)))
            seconds = max(seconds, share * self.budget.seconds)
            ends.append(min(stop, self._counted[-1]) if self._counted else stop)
        self.boundaries, self.planned_steps = ends[:-1], ends[-1]

    def _correct_plan(self) -> None:
        """Where seconds are given, fit the plan a few times a stage to the speed since it was last fitted.

        The first step of a stage, which warms up allocators and caches, does not count. A stage that is over stays as it was.
        """
        if self.budget.seconds is None:
            return
        assert self.planned_steps is not None
        present = sum(self.steps >= stop for stop in self.boundaries)
        if self.steps in self.boundaries:  # a stage has just ended
            self._begun, self._fitted, self._corrections = (self.steps, self.train_seconds), None, 0
            if self.planned_by == "seconds":
                self._unplan(present)
            return
        if self._corrections == len(CORRECTIONS):
            return
        begun_steps, begun_seconds = self._begun
        stop = [*self.boundaries, self.planned_steps][present]
        steps = (self.steps - begun_steps) / max(stop - begun_steps, 1)
        # Nothing is left where an earlier stage was very late.
        left = self._shares()[present] * self.budget.seconds - begun_seconds
        seconds = (self.train_seconds - begun_seconds) / max(left, 1e-9)
        if self._fitted is None:
            if self.train_seconds == begun_seconds:  # nothing was measured yet
                return
            self._fitted = (self.steps, self.train_seconds) if seconds < 1 else self._begun
        done, spent = self.steps - self._fitted[0], self.train_seconds - self._fitted[1]
        if max(steps, seconds) < CORRECTIONS[self._corrections] or not done or spent <= 0:
            return
        self._corrections += 1
        self._fitted = self.steps, self.train_seconds
        if self._counted and self._corrections == 1:  # a count that can be reached is not given up for a slow start
            return
        self._speeds[present] = done / spent
        self._plan_by_clock(present)

    def on_fit_start(self) -> None:
        """Plan before the first step, and before any callback asks for the plan."""
        self.batches.share(distributed.rank(), distributed.world_size())
        self._state_to_device()
        if self.compiled:
            graphs = self.batches.device.type == "cuda"  # which spare the launches, one by one, of many small kernels
            compile_networks(self.model, mode="reduce-overhead" if graphs else "default", dynamic=False)
        if self.planned_steps is None:
            with self.trainer.precision_plugin.train_step_context():
                self.plan()

    def _state_to_device(self) -> None:
        """Move what was restored beside the weights to where these lie by now."""
        for optimizer in self.configure_optimizers():
            if optimizer.state:
                # Which knows what belongs beside a weight and what on the host; Lightning leaves all counts of steps there.
                optimizer.load_state_dict(optimizer.state_dict())
        self.window.to(self.model.device)

    def diagnostics(self) -> dict[str, dict[str, Any]]:
        """Say what the recorded terms mean of which the families know more than the name."""
        return {
            f"train/{name}": diagnostic._asdict()
            for stage in self.stages
            for name, diagnostic in stage.module.diagnostics.items()
        }

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Show Lightning the optimisers; the module steps them itself."""
        return [player.optimizer for players in self.players.values() for player in players.values()]

    def state(self) -> dict[str, Any]:
        """Return what, beside the weights and their average, is needed to go on."""
        return {
            "steps": self.steps,
            "planned_steps": self.planned_steps,
            "planned_by": self.planned_by,
            "counted": list(self._counted),
            "counted_by": self._counted_by,
            "boundaries": list(self.boundaries),
            "speeds": list(self._speeds),
            "begun": self._begun,
            "fitted": self._fitted,
            "corrections": self._corrections,
            "window": self.window.state(),
            "train_seconds": self.train_seconds,
            "flops": self.flops,
            "ema_updates": dict(self.ema.updates),
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "optimizers": [optimizer.state_dict() for optimizer in self.configure_optimizers()],
        }

    def _checked(self, state: Any) -> list[dict[str, Any]]:
        """Check what ``state`` has returned, in whichever process of whoever; return what the optimisers may load."""
        images = self.budget.images
        check_progress(
            state,
            stages=len(self.stages),
            longest=None if images is None else math.ceil(images / self.batches.batch_size),
            corrections=len(CORRECTIONS),
            updates=self.ema.updates,
        )
        found, optimizers = state.get("optimizers"), self.configure_optimizers()
        if not isinstance(found, list) or len(found) != len(optimizers):
            raise StateError(f"optimizers: must be a list of {len(optimizers)}")
        return [
            check_optimizer_state(of_optimizer, optimizer, self._make_optimizer, f"optimizers[{i}]")
            for i, (optimizer, of_optimizer) in enumerate(zip(optimizers, found, strict=True))
        ]

    def restore(self, weights: dict[str, Tensor], average: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from where ``state`` was returned.

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
        for optimizer, of_optimizer in zip(self.configure_optimizers(), optimizer_states, strict=True):
            optimizer.load_state_dict(of_optimizer)
        self.ema.updates = dict(state["ema_updates"])
        self.steps, self.planned_steps, self.boundaries = state["steps"], state["planned_steps"], state["boundaries"]
        self.train_seconds, self.flops = state["train_seconds"], state["flops"]
        self._speeds, self._corrections = list(state["speeds"]) or self._speeds, state["corrections"]
        if "planned_by" in state:
            self.planned_by, self._counted = state["planned_by"], list(state["counted"])
            self._counted_by = state["counted_by"]
        else:  # a run of an earlier release, which never fitted a count to the clock
            counts = [name for name in ("images", "flops") if getattr(self.budget, name) is not None]
            self._counted_by = counts[0] if counts else ""
            self.planned_by = self._counted_by or "seconds"
            self._counted = [*self.boundaries, self.planned_steps] if counts else []
        self.skipped, self._in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self._begun = tuple(state["begun"])
        self._fitted = None if state["fitted"] is None else tuple(state["fitted"])
        self.window = Window({name: list(values) for name, values in state["window"].items()})
