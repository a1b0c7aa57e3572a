"""One Lightning module trains any family.

It owns what no family should do again: optimisers, averages of the weights, the learning rate, the noise of each step,
the count of images seen, and the check that everything is finite. Optimisation is manual, and Lightning hands over
several steps at once where steps are short, since its own loop would cost more than a small model's step. The module
therefore keeps its own step counter; Lightning's ``global_step`` is never read.

Every step is a function of the weights and of its number alone: its batch is ``batches(step)``, its noise
f(seed, step, rank). A run that goes on from a checkpoint therefore ends in the same bits as one that was never interrupted.

Stages follow each other with optimisers, schedules and averages of their own. A finished stage gets the average of its
weights, which is what will be used and so what the next one must build on. A plan gives each stage its share of the images,
or where only seconds are given its share of the seconds, since the steps of one stage may take longer than another's.

Several processes that train together take a share of each batch and average the gradients of the player whose turn it is; the
same sum tells all of them whether one was told to stop, and what time it is, so that all do the same steps; on
accelerators it is read after each hand-over. Torch's
``DistributedDataParallel`` is not used: it expects one backward pass for one call of one module.

A step whose loss or gradient is not finite moves no weight. On a CPU it raises at once; on an accelerator, where
looking would stall the device, a flag on the device makes a fused optimiser skip the step, or undoes that of another
one, and is read after each hand-over and before anything is recorded. In half precision the loss is scaled so that
small gradients do not vanish; a step whose scaled gradients overflow is skipped and counted, and the scale is halved,
for which the host does look.

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
from genzoo.model import Adversarial, GenerativeModel, Loss, Stage, Staged
from genzoo.prob import ranks
from genzoo.prob.measure import dequantize
from genzoo.prob.random import seed_of
from genzoo.training.budget import Budget, LearningRate
from genzoo.training.ema import EMA
from genzoo.training.flops import count

CORRECTIONS = (
    0.1,
    0.2,
    0.35,
    0.5,
    0.65,
    0.8,
)  # shares of a stage's plan or seconds after which a plan by the clock is refitted
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
    """Let torch compile the networks of a model in place, each as a whole; copies of the model are not compiled.

    Args:
        model: whose networks are called in training.
        options: as ``torch.compile`` takes them.
    """
    for name, part in model.named_children():
        if isinstance(part, (GenerativeModel, nn.ModuleList)):
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
        if model.num_classes and batches.y is not None:
            model.check_labels(batches.y, len(batches.y))  # once, on the host: no step on a GPU reads their values
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
        self.players = {stage.name: self._players(stage, optimizer) for stage in self.stages}
        self.planned_steps: int | None = None  # set before the first step
        self.steps = 0
        self.train_seconds = 0.0
        self.flops = 0  # of all steps so far
        self._costs: dict[tuple[str, str | None], int] = {}  # FLOPs of a step, by stage and turn
        self.boundaries: list[int] = []  # the steps at which all stages but the last end
        self._speeds: list[float] = []  # of each stage, in steps a second, where the plan is made by the clock
        self._begun = 0, 0.0  # steps and seconds when the present stage began
        self._fitted = 0, 0.0  # and when the plan was last fitted to its speed
        self._corrections = 0  # of the present stage
        self.window = Window()
        self.latest: dict[str, Any] = {"values": {}, "images_per_second": 0.0}  # what was recorded last
        self.on_step: Callable[[], None] = lambda: None  # called after every step
        self.told_to_stop: Callable[[], bool] = lambda: False  # asked before every step
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

        self.flops += self.cost(stage.name, turn)
        with self._only(player, players):
            loss = self._backward(module, turn)
        if ranks.world() > 1:
            loss = self._average(player, loss)
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
            self.ema.update(f"{stage.name}/{player.name}")
            prefix = "" if turn is None else f"{turn}_"
            if ranks.rank() == 0:  # which alone writes
                self.window.add({**loss.terms, f"{prefix}grad_norm": norm})
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
        own = [like.new_full((), float(number)) for number in (self.told_to_stop(), self._elapsed)]
        facts = torch.stack([*own, *(value.detach().to(like.dtype) for value in (loss.total, *loss.terms.values()))])
        flat = ranks.all_mean(torch.cat([tensor.flatten() for tensor in (*gradients, facts)]))
        *averages, facts = flat.split([tensor.numel() for tensor in (*gradients, facts)])
        torch._foreach_copy_(gradients, [mean.view_as(g) for mean, g in zip(averages, gradients, strict=True)])
        self._shared = facts[:2] if self._shared is None else self._shared + facts[:2]
        if facts.device.type == "cpu":
            self._read_shared()
        total, *terms = facts[2:]
        return Loss(total, dict(zip(loss.terms, terms, strict=True)))

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

    def _backward(self, module: GenerativeModel, turn: str | None) -> Loss:
        """Compute the loss of the present step and its gradients."""
        # Dropout draws from the global generator. torch.manual_seed would ask for every kind of device at each step.
        layers, device = seed_of("layers", self.seed, self.steps, ranks.rank()), self.batches.device
        torch.default_generator.manual_seed(layers)
        if device.type == "cuda":
            torch.cuda.manual_seed(layers)
        rng = torch.Generator(device).manual_seed(seed_of("noise", self.seed, self.steps, ranks.rank()))
        x, y = self.batches(self.steps)
        x = (x if self.model.levels is None else dequantize(x, self.model.levels, rng)).to(self.model.dtype)
        if self.channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.compiled:  # what the graphs of the last step hold may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        loss = module.loss(x, y if module.num_classes else None, turn=turn, rng=rng)
        with torch.autocast(device.type, enabled=False):  # gradients have the types of what they are gradients of
            (self.scaler.scale(loss.total) if self.scaler else loss.total).backward()
        return loss

    def cost(self, stage: str, turn: str | None) -> int:
        """Return the FLOPs of a step, counted the first time on a copy of the model, since counting changes last bits."""
        kind = stage, turn
        if kind not in self._costs:
            model = copy.deepcopy(self.model)
            module = next(s.module for s in _stages(model) if s.name == stage)
            parts = _parts(module)
            for name, part in parts.items():
                if name != (turn or "model"):
                    part.requires_grad_(False)
            # The first step may do once what later ones share.
            self._costs[kind] = [count(lambda: self._backward(module, turn)) for _ in range(2)][-1] * ranks.world()
        return self._costs[kind]

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
        assert self.planned_steps is not None
        late = self.budget.seconds is not None and self.train_seconds >= self.budget.seconds
        return late or self.steps >= self.planned_steps

    def training_step(self, steps: tuple[int, int], batch_idx: int) -> None:
        """Do the steps that Lightning hands over, or as many of them as the budget allows."""
        alone = ranks.world() == 1
        while self.steps < steps[1] and not self.finished and not self.stopping:
            start = time.monotonic()
            self.step()
            self._elapsed = time.monotonic() - start
            if alone:
                self.train_seconds += self._elapsed
            self._correct_plan()
        self.check_finite()
        self._read_shared()

    @property
    def stopping(self) -> bool:
        """Whether this process, or one of those that train with it, was told to stop."""
        return self._all_stop if ranks.world() > 1 else self.told_to_stop()

    def _time_since(self, start: float) -> float:
        """Return the seconds since ``start``, the same for all processes that train together."""
        seconds = time.monotonic() - start
        if ranks.world() == 1:
            return seconds
        return float(ranks.all_mean(torch.tensor(seconds, device=self.batches.device)))

    def plan(self) -> None:
        """Fix how many steps schedules expect; where only seconds are given, by measuring this machine's speed."""
        plans = []
        if self.budget.images is not None:
            steps = math.ceil(self.budget.images / self.batches.batch_size)
            plans.append([round(share * steps) for share in self._shares()])
        if self.budget.flops is not None:
            lengths = [self._affordable(i, stage.share * self.budget.flops) for i, stage in enumerate(self.stages)]
            plans.append(list(itertools.accumulate(lengths)))
        if plans:
            *self.boundaries, self.planned_steps = min(plans, key=lambda ends: ends[-1])
        else:
            assert self.budget.seconds is not None
            start, trial = time.monotonic(), min(3.0, 0.05 * self.budget.seconds)
            self._speeds = [self.measure_speed(trial * stage.share, i) for i, stage in enumerate(self.stages)]
            self.train_seconds = self._time_since(start)
            self._plan_by_clock(0)
            self._fitted = self.steps, self.train_seconds

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
        """Plan from the present stage on as many steps as its share of the seconds will hold: a little less than fits."""
        assert self.budget.seconds is not None
        stop, seconds, ends = self.steps, self.train_seconds, self.boundaries[:present]
        for share, speed in zip(self._shares()[present:], self._speeds[present:], strict=True):
            # So that a schedule ends before the clock does; a stage that is late takes its time from the next one.
            stop += max(1, int(0.97 * speed * (share * self.budget.seconds - seconds)))
            seconds = max(seconds, share * self.budget.seconds)
            ends.append(stop)
        self.boundaries, self.planned_steps = ends[:-1], ends[-1]

    def _correct_plan(self) -> None:
        """Where only seconds are given, fit the plan a few times a stage to the speed since it was last fitted.

        A machine that was busy when the speed was measured would otherwise end its schedule long before the clock. A stage
        that is over stays as it was.
        """
        if self.budget.images is not None or self.budget.flops is not None:
            return
        assert self.budget.seconds is not None and self.planned_steps is not None
        present = sum(self.steps >= stop for stop in self.boundaries)
        if self.steps in self.boundaries:  # a stage has just ended
            self._begun = self._fitted = self.steps, self.train_seconds
            self._corrections = 0
            return
        if self._corrections == len(CORRECTIONS):
            return
        begun_steps, begun_seconds = self._begun
        stop = [*self.boundaries, self.planned_steps][present]
        steps = (self.steps - begun_steps) / (stop - begun_steps)
        # Nothing is left where an earlier stage was very late.
        left = self._shares()[present] * self.budget.seconds - begun_seconds
        seconds = (self.train_seconds - begun_seconds) / max(left, 1e-9)
        if max(steps, seconds) < CORRECTIONS[self._corrections]:
            return
        self._corrections += 1
        done, spent = self.steps - self._fitted[0], self.train_seconds - self._fitted[1]
        self._fitted = self.steps, self.train_seconds
        if spent > 0:
            self._speeds[present] = done / spent
            self._plan_by_clock(present)

    def on_fit_start(self) -> None:
        """Plan before the first step, and before any callback asks for the plan."""
        self.batches.share(ranks.rank(), ranks.world())
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

    def measure_speed(self, seconds: float, stage: int = 0) -> float:
        """Train one stage for about ``seconds`` and undo it all; return steps a second.

        The first steps, which warm up allocators and caches, do not count.
        """
        weights = copy.deepcopy(self.model.state_dict())
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.configure_optimizers()]
        average, updates = copy.deepcopy(self.ema.model.state_dict()), dict(self.ema.updates)
        scale = self.scaler.state_dict() if self.scaler else {}
        on_step, self.on_step = self.on_step, lambda: None
        plan, endless = (self.planned_steps, self.boundaries), 10**9
        self.planned_steps, self.boundaries = (
            endless,
            [0 if i < stage else endless for i in range(len(self.stages) - 1)],
        )
        for _ in range(6):
            self.step()
        start, counted = time.monotonic(), 0
        while (elapsed := self._time_since(start)) < seconds or counted < 6:
            self.step()
            counted += 1
        self.model.load_state_dict(weights)
        for optimizer, state in zip(self.configure_optimizers(), states, strict=True):
            optimizer.load_state_dict(state)
        self.ema.model.load_state_dict(average)
        self.ema.updates = updates
        self.planned_steps, self.boundaries = plan
        self.steps, self.on_step, self.window, self.flops = 0, on_step, Window(), 0
        self.skipped = self._in_a_row = 0
        if self.scaler:
            self.scaler.load_state_dict(scale)
        return counted / elapsed

    def state(self) -> dict[str, Any]:
        """Return what, beside the weights and their average, is needed to go on."""
        return {
            "steps": self.steps,
            "planned_steps": self.planned_steps,
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

    def restore(self, weights: dict[str, Tensor], average: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from where ``state`` was returned.

        Args:
            weights, average: of the model, and of its averaged copy.
            state: the rest.

        Raises:
            RuntimeError, ValueError, KeyError: where they are another model's.
        """
        self.model.load_state_dict(weights)
        self.ema.model.load_state_dict(average)
        for optimizer, of_optimizer in zip(self.configure_optimizers(), state["optimizers"], strict=True):
            optimizer.load_state_dict(of_optimizer)
        self.ema.updates = dict(state["ema_updates"])
        self.steps, self.planned_steps, self.boundaries = state["steps"], state["planned_steps"], state["boundaries"]
        self.train_seconds, self.flops = state["train_seconds"], state["flops"]
        self._speeds, self._corrections = state["speeds"], state["corrections"]
        self.skipped, self._in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self._begun, self._fitted = tuple(state["begun"]), tuple(state["fitted"])
        self.window = Window({name: list(values) for name, values in state["window"].items()})
