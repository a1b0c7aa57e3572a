"""One step of training is a function of the weights and of its number alone, and everything else follows from that.

Bitwise equality is meant wherever two runs are compared. The toys have losses whose gradients are known, so that
learning rates, clipping and the order of the steps are checked by where the weights end, not by what a log says.
"""

from __future__ import annotations

import copy
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from genzoo.conditions import ClassLabels
from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.distributions.likelihoods import DiscretizedLogistic, Gaussian
from genzoo.families.gan import WGANGP
from genzoo.families.vae import VAE
from genzoo.model import GenerativeModel, Loss
from genzoo.nn.mlp import MLP
from genzoo.numerics.random import generator
from genzoo.training import clock as clocks
from genzoo.training.budget import Budget, LearningRate
from genzoo.training.fit import StepRanges
from genzoo.training.loop import TrainingLoop
from genzoo.training.module import GenerativeModule
from genzoo.training.precision import PATIENCE, FiniteCheck, NonFiniteError
from tests.toys import Duel, Jittered, Mean, Relay

BATCH = 8
SGD = functools.partial(torch.optim.SGD, lr=1.0)
ADAM = functools.partial(torch.optim.Adam, lr=1e-2, fused=True)
CONSTANT = LearningRate("constant")
small = functools.partial(MLP, width=8, depth=1)


def points(n: int = 32) -> Split:
    return Split(torch.randn(n, 2, generator=generator("points")) + 3, None)


def module_of(
    model: GenerativeModel,
    steps: int = 100,
    optimizer: Callable[..., torch.optim.Optimizer] = ADAM,
    data: Split | None = None,
    seed: int = 0,
    **settings: Any,
) -> GenerativeModule:
    """Put a model into a trainer that plans a number of steps."""
    batches = Batches(data or points(), BATCH, seed)
    module = GenerativeModule(model, optimizer, batches, Budget(images=BATCH * steps), seed=seed, **settings)
    module.make_plan()
    return module


def vae(seed: int = 0) -> VAE:
    torch.manual_seed(seed)
    return VAE((2,), encoder=small, decoder=small, likelihood=Gaussian(), latent_dim=2)


def wgan() -> WGANGP:
    torch.manual_seed(0)
    return WGANGP((2,), generator=small, critic=small, latent_dim=2, n_critic=5)


def everything(module: GenerativeModule) -> list[Tensor]:
    """All numbers that training changes: weights, their averages, and the state of the optimisers."""
    states = [value for o in module.configure_optimizers() for s in o.state.values() for value in s.values()]
    numbers = [*module.model.state_dict().values(), *module.ema.model.state_dict().values(), *states]
    counts = [module.steps, *module.ema.updates.values()]
    return [*(n.clone() for n in numbers), torch.tensor(counts)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Images, turns and schedules


def test_every_batch_counts_whoever_it_is_delivered_to():
    module = module_of(wgan(), steps=12)
    order = []
    module.on_step = lambda: order.append(dict(module.ema.updates))
    module.training_step((0, 12), 0)
    assert module.images == 12 * BATCH and module.planned_images == 12 * BATCH
    assert order[4] == {"train/critic": 5, "train/generator": 0}
    assert order[5] == {"train/critic": 5, "train/generator": 1}
    assert order[-1] == {"train/critic": 10, "train/generator": 2}


@pytest.mark.parametrize("images, steps", [(1, 1), (BATCH, 1), (BATCH + 1, 2), (100, 13)])
def test_a_plan_delivers_the_images_asked_for_and_less_than_a_batch_more(images, steps):
    module = GenerativeModule(Mean(), SGD, Batches(points(), BATCH, 0), Budget(images=images))
    module.make_plan()
    assert module.plan.planned_steps == steps


@pytest.mark.parametrize("steps", [1, 7, 18])
def test_a_plan_by_operations_spends_them_and_no_more(steps):
    spent = module_of(wgan(), steps)
    spent.training_step((0, steps), 0)
    critic, generator = spent.cost("train", "critic"), spent.cost("train", "generator")
    assert critic > generator > 0 and spent.progress.flops == (steps - steps // 6) * critic + steps // 6 * generator
    for flops, planned in ((spent.progress.flops, steps), (spent.progress.flops - 1, max(steps - 1, 1))):
        module = GenerativeModule(wgan(), ADAM, Batches(points(), BATCH, 0), Budget(flops=flops))
        module.make_plan()
        assert module.plan.planned_steps == planned and module.progress.flops == 0
        module.training_step((0, 100), 0)
        assert module.steps == planned
    assert steps == 1 or module.progress.flops < spent.progress.flops


def test_stages_share_the_operations():
    module = GenerativeModule(Relay(), ADAM, Batches(points(), BATCH, 0), Budget(flops=10**6))
    module.make_plan()
    module.training_step((0, 10**6), 0)
    spent = [module.cost(stage.name, None) for stage in module.stages]
    lengths = module.plan.boundaries[0], module.steps - module.plan.boundaries[0]
    for stage, cost, steps in zip(module.stages, spent, lengths, strict=True):
        assert 0 <= stage.fraction * 10**6 - cost * steps < max(cost, 1)


def test_the_stricter_of_two_limits_is_planned():
    def planned(**limits: float) -> int | None:
        module = GenerativeModule(vae(), ADAM, Batches(points(), BATCH, 0), Budget(**limits))
        module.make_plan()
        return module.plan.planned_steps

    alone = planned(flops=10**6)
    assert planned(flops=10**6, images=10**9) == alone and planned(flops=10**15, images=3 * BATCH) == 3


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_each_step_moves_by_the_rate_of_its_own_images(decay):
    """With SGD at rate 1, m <- m - f(s) (m - mean of batch s)."""
    steps, rate = 20, LearningRate(decay, warmup=3 * BATCH)
    module = module_of(Mean().double(), steps, SGD, Split(points().x.double(), None), learning_rate=rate)
    expected = torch.zeros(2, dtype=torch.float64)
    for s in range(steps):
        factor = {"constant": 1.0, "linear": 1 - s / steps, "cosine": (1 + math.cos(math.pi * s / steps)) / 2}[decay]
        factor *= min(1.0, (s * BATCH + 1) / (3 * BATCH + 1))
        module.step()
        expected = expected - factor * (expected - module.batches(s)[0].mean(0))
        torch.testing.assert_close(module.model.mean.detach(), expected, rtol=1e-12, atol=1e-12)


def test_a_gradient_is_clipped_to_its_norm_and_recorded_as_it_was():
    module = module_of(Mean(start=1000.0), 1, SGD, learning_rate=CONSTANT, clip=0.5)
    before = module.model.mean.detach().clone()
    norm = float((before - module.batches(0)[0].mean(0)).norm())
    module.step()
    assert float((module.model.mean.detach() - before).norm()) == pytest.approx(0.5, rel=1e-3)
    assert module.progress.window.flush()["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 1000


def test_without_clipping_a_step_is_as_long_as_its_gradient():
    module = module_of(Mean(start=1000.0), 1, SGD, learning_rate=CONSTANT, clip=None)
    module.step()
    torch.testing.assert_close(module.model.mean.detach(), module.batches(0)[0].mean(0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("clip", [0.0, -1.0])
def test_an_impossible_clip_is_refused(clip):
    with pytest.raises(ValueError, match="clip must be positive"):
        module_of(Mean(), clip=clip)


def test_the_window_returns_the_mean_of_each_term_and_forgets():
    module = module_of(Mean(), 3, SGD, learning_rate=CONSTANT)
    losses = []
    for step in range(3):
        losses.append(0.5 * (module.batches(step)[0] - module.model.mean.detach()).square().sum(1).mean())
        module.step()
    assert module.progress.window.flush()["fit"] == pytest.approx(float(sum(losses)) / 3, rel=1e-5)
    assert module.progress.window.flush() == {}


def test_players_have_terms_of_their_own_and_gradients_of_their_own():
    module = module_of(Duel(), 3)
    module.training_step((0, 3), 0)
    assert set(module.progress.window.flush()) == {"generator", "critic", "generator_grad_norm", "critic_grad_norm"}
    assert all(p.requires_grad and p.grad is None for p in module.model.parameters())


def test_integer_images_reach_the_loss_as_points_inside_their_bins():
    seen: list[Tensor] = []

    class Spy(VAE):
        def loss(self, x: Tensor, *arguments: Any, **keywords: Any) -> Loss:
            seen.append(x)
            return super().loss(x, *arguments, **keywords)

    k = torch.randint(17, (16, 1, 2, 2), generator=generator("levels")).to(torch.uint8)
    model = Spy((1, 2, 2), encoder=small, decoder=small, likelihood=DiscretizedLogistic(17), levels=17, latent_dim=2)
    module = module_of(model, 3, data=Split(k, None))
    module.training_step((0, 3), 0)
    for step, x in enumerate(seen[-3:]):  # those before were counted
        u = (x + 1) * 17 / 2 - module.batches(step)[0]
        assert bool(((u >= 0) & (u < 1)).all()) and float(u.std()) > 0.15


def test_classes_reach_a_conditional_model_alone():
    data = Split(points(32).x, torch.arange(32) % 2)
    for num_classes in (0, 2):
        module = module_of(
            VAE(
                (2,),
                ClassLabels(num_classes) if num_classes else None,
                encoder=small,
                decoder=small,
                likelihood=Gaussian(),
                latent_dim=2,
            ),
            2,
            data=data,
        )
        module.step()


# A step is a function of its number


@pytest.mark.parametrize("make", [vae, wgan, Jittered, Relay, Duel])
def test_two_runs_of_a_seed_end_in_the_same_bits_and_another_seed_does_not(make):
    def run(seed: int, disturb: bool) -> list[Tensor]:
        torch.manual_seed(0)
        module = module_of(make(), 12, seed=seed)
        for step in range(12):
            if disturb:
                torch.manual_seed(99 + step)  # as another library in the same process would
            module.step()
        return everything(module)

    first = run(0, disturb=False)
    assert same(first, run(0, disturb=True))
    assert not same(first, run(1, disturb=False))


class Listening(Mean):
    """A mean that writes down what noise it could draw: from the step's generator, and from the one that layers use."""

    def loss(
        self, x: Tensor, y: Tensor | None = None, *, turn: str | None = None, rng: torch.Generator | None = None
    ) -> Loss:
        self.heard.append((torch.rand((), generator=rng).item(), torch.rand(()).item()))
        return super().loss(x)


def test_every_step_of_every_seed_has_noise_of_its_own():
    heard = []
    for seed in (0, 1, 0):
        model = Listening()
        model.heard = []
        module_of(model, 20, seed=seed).training_step((0, 20), 0)
        heard.append(model.heard)
    assert heard[0] == heard[2]
    numbers = [number for step in heard[0] + heard[1] for number in step]
    assert len(set(numbers)) == len(numbers) == 80


@pytest.mark.parametrize("make", [vae, wgan, Jittered])
def test_how_many_steps_are_handed_over_changes_nothing(make):
    def run(size: int) -> list[Tensor]:
        torch.manual_seed(0)
        module = module_of(make(), 21)
        for start in range(0, 21, size):
            module.training_step((start, min(start + size, 21)), 0)
        return everything(module)

    assert same(run(1), run(7)) and same(run(1), run(100))


def test_steps_stop_at_the_plan():
    module = module_of(Mean(), 5)
    module.training_step((0, 1000), 0)
    assert module.steps == 5 and module.finished


# Seconds


class Clock:
    """A clock that advances by a hundredth of a second whenever it is read."""

    def __init__(self) -> None:
        self.reads = 0

    def monotonic(self) -> float:
        self.reads += 1
        return self.reads / 100


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(clocks, "time", types.SimpleNamespace(monotonic=clock.monotonic))
    return clock


def by_seconds(clock: Clock, slow: Callable[[int], int] = lambda step: 0, **limits: float) -> GenerativeModule:
    """A mean whose step takes one reading of the clock, and as many more as ``slow`` says of its number."""
    model, rates = Mean(), []
    loss = model.loss

    def slowly(*arguments: Any, **keywords: Any) -> Loss:
        clock.reads += slow(module.steps)
        return loss(*arguments, **keywords)

    module = GenerativeModule(model, SGD, Batches(points(), BATCH, 0), Budget(**limits), LearningRate("cosine"))
    module.cost("train", None)  # which runs the loss too
    model.loss = slowly
    module.make_plan()
    module.on_step = lambda: rates.append(module.players["train"]["model"].optimizer.param_groups[0]["lr"])
    module.rates = rates
    return module


@pytest.mark.parametrize("limits", [{}, {"images": 10**9}])
def test_where_seconds_end_a_run_they_are_all_used_and_the_schedule_ends_with_them(clock, limits):
    module = by_seconds(clock, seconds=10.0, **limits)
    module.training_step((0, 10**6), 0)
    assert 970 <= module.steps <= 1000 and 9.7 <= module.progress.train_seconds <= 10.02
    assert module.ended_by == module.plan.planned_by == "seconds"
    assert module.rates[0] == 1 and module.rates[-1] < 1e-3


def test_no_step_is_spent_on_measuring(clock):
    timed, counted = by_seconds(clock, seconds=10.0), by_seconds(clock, images=10**6)
    for module in (timed, counted):
        module.learning_rate = CONSTANT
        module.training_step((0, 500), 0)
    assert timed.plan.known and same(everything(timed), everything(counted))


def test_a_plan_is_fitted_after_a_few_percent_of_the_seconds_and_kept_at_the_start_before(clock):
    module, seen = by_seconds(clock, seconds=10.0), []
    note = module.on_step
    module.on_step = lambda: (note(), seen.append((module.progress.train_seconds, module.plan.known)))
    module.training_step((0, 10**6), 0)
    fitted = [seconds for seconds, planned in seen if planned]
    assert 0.2 < fitted[0] < 0.4 and all(rate > 0.99 for rate in module.rates[: len(seen) - len(fitted)])


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 12])
def test_a_run_of_a_few_long_steps_trains_in_nearly_all_of_its_seconds(clock, steps):
    """Each step takes a second, of which a machine without measuring has ``steps``."""
    module = by_seconds(clock, lambda _: 99, seconds=float(steps))
    module.training_step((0, 10**6), 0)
    assert steps - 1 <= module.steps <= steps + 1 and module.steps >= 1
    assert module.ended_by == "seconds" and (module.rates[-1] < 1 or steps < 4)


@pytest.mark.parametrize("slow", [lambda step: 19 * (step < 60), lambda step: 9 * (step > 400)])
def test_a_plan_that_was_fitted_to_another_speed_is_corrected_on_the_way(clock, slow):
    module = by_seconds(clock, slow, seconds=30.0)
    module.training_step((0, 10**6), 0)
    assert module.progress.train_seconds > 29 and module.steps == module.plan.planned_steps
    assert module.rates[-1] < 0.01, "the schedule has run its course"


@pytest.mark.parametrize("slow", [lambda step: 0, lambda step: 30 * (step < 3), lambda step: 2 * (step % 2)])
def test_where_a_count_ends_a_run_its_seconds_change_no_bit(clock, slow):
    timed, alone = by_seconds(clock, slow, images=200 * BATCH, seconds=10.0), by_seconds(clock, images=200 * BATCH)
    for module in (timed, alone):
        module.training_step((0, 10**6), 0)
    assert timed.rates == alone.rates and same(everything(timed), everything(alone))
    assert timed.steps == timed.plan.planned_steps == 200 and timed.ended_by == alone.ended_by == "images"


def test_a_count_that_a_slow_machine_cannot_reach_gives_way_to_the_clock_and_comes_back(clock):
    module, limits = by_seconds(clock, lambda step: 9 * (step < 40), images=500 * BATCH, seconds=11.0), []
    note = module.on_step
    module.on_step = lambda: (note(), limits.append(module.plan.planned_by))
    module.training_step((0, 10**6), 0)
    assert list(dict.fromkeys(limits)) == ["images", "seconds"] and limits[-1] == "images"
    assert module.steps == 500 and module.ended_by == "images" and module.rates[-1] < 1e-3


class Queue:
    """An accelerator: launching a step takes a millisecond, computing it fifty, one after another."""

    def __init__(self) -> None:
        self.now, self.ready, self.waits = 0.0, 0.0, 0

    def launch(self) -> None:
        self.now += 0.001
        self.ready = max(self.ready, self.now) + 0.05

    def wait(self, device: torch.device) -> None:
        self.waits += 1
        self.now = max(self.now, self.ready)


@pytest.mark.parametrize("limits", [{"seconds": 20.0}, {"seconds": 20.0, "images": 10**9}])
def test_on_an_accelerator_seconds_are_those_of_computing(limits, monkeypatch):
    queue, model = Queue(), Mean()
    monkeypatch.setattr(clocks, "time", types.SimpleNamespace(monotonic=lambda: queue.now))
    monkeypatch.setattr(clocks, "synchronize", queue.wait)
    monkeypatch.setattr(GenerativeModule, "asynchronous", True)
    module = GenerativeModule(model, SGD, Batches(points(), BATCH, 0), Budget(**limits), LearningRate("cosine"))
    module.make_plan()
    module.on_step = queue.launch
    for number, (start, stop) in enumerate(StepRanges(module, lambda: {10**9})):
        module.training_step((start, stop), number)
        queue.now += 1.0  # a grid is drawn
        queue.ready = max(queue.now, queue.ready)
    assert module.progress.train_seconds == pytest.approx(20, rel=0.03) and module.steps == pytest.approx(400, rel=0.03)
    assert module.clock.seconds == pytest.approx(module.progress.train_seconds) and module.ended_by == "seconds"
    assert queue.waits <= number + 2 < module.steps / 3, "it waits once a hand-over, and not once a step"


# What is not finite


class Poisoned(Mean):
    """A mean whose loss or gradient is broken at some calls."""

    def __init__(self, at: set[int], kind: str):
        super().__init__()
        self.at, self.kind, self.calls = at, kind, 0

    def _loss(self, x: Tensor, y: Tensor | None, rng: torch.Generator | None) -> Loss:
        total, terms, _ = super()._loss(x, y, rng)
        broken, self.calls = self.calls in self.at, self.calls + 1
        other = torch.zeros(())
        if broken and self.kind == "gradient":
            total = total + (self.mean - self.mean.detach()).abs().sqrt().sum()  # 0, with an infinite slope
        elif broken:
            total, other = total * math.nan, torch.tensor(math.nan)
        return Loss(total, {**terms, "other": other})


@pytest.mark.parametrize("kind, where", [("loss", "loss term 'other'"), ("gradient", "gradient")])
@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_a_step_that_is_not_finite_moves_nothing_and_says_what_and_when(kind, where, optimizer):
    module = module_of(Poisoned({3}, kind), 10, optimizer)
    module.training_step((0, 3), 0)
    before = everything(module)
    with pytest.raises(NonFiniteError, match=f"^{where} is not finite at step 3: try a lower optimizer.lr"):
        module.training_step((3, 10), 0)
    assert same(before, everything(module)) and module.steps == 3


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("fused", [ADAM, functools.partial(torch.optim.AdamW, lr=1e-2, fused=True)])
def test_on_an_accelerator_the_fused_optimiser_skips_the_step_and_it_is_reported_after_the_hand_over(kind, fused):
    module = module_of(Poisoned({3, 5}, kind), 10, fused)
    module.finite.deferred = lambda device: True
    weights: list[list[Tensor]] = []
    module.on_step = lambda: weights.append(
        [module.model.mean.detach().clone(), *(v.clone() for s in _states(module) for v in s.values())]
    )
    with pytest.raises(NonFiniteError, match="not finite at step 3: try"):
        module.training_step((0, 10), 0)
    assert module.steps == 10, "nobody waited for the device"
    skipped = [s for s in range(1, 10) if same(weights[s], weights[s - 1])]
    assert skipped == [3, 5]


def _states(module: GenerativeModule) -> list[dict[str, Tensor]]:
    return [state for o in module.configure_optimizers() for state in o.state.values()]


UNFUSED = [
    functools.partial(torch.optim.Adam, lr=1e-2),
    functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    functools.partial(torch.optim.Adamax, lr=1e-2),
    functools.partial(torch.optim.RMSprop, lr=1e-2, momentum=0.9),
    functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", UNFUSED)
def test_on_an_accelerator_any_other_optimiser_moves_no_weight_by_a_step_that_is_not_finite(kind, optimizer):
    module = module_of(Poisoned({3, 5}, kind), 10, optimizer)
    module.finite.deferred = lambda device: True
    weights: list[Tensor] = []
    module.on_step = lambda: weights.append(module.model.mean.detach().clone())
    with pytest.raises(NonFiniteError, match="not finite at step 3: try"):
        module.training_step((0, 10), 0)
    assert module.steps == 10, "nobody waited for the device"
    still = [s for s in range(1, 10) if torch.equal(weights[s], weights[s - 1])]
    assert still == [3, 5] and all(w.isfinite().all() for w in weights)
    assert all(value.isfinite().all() for state in _states(module) for value in state.values())


@pytest.mark.parametrize("optimizer", [ADAM, *UNFUSED])
def test_deferring_changes_no_bit_of_a_run_that_is_finite_whatever_the_optimiser(optimizer):
    def run(deferred: bool) -> list[Tensor]:
        module = module_of(vae(), 10, optimizer)
        module.finite.deferred = lambda device: deferred
        module.training_step((0, 10), 0)
        return everything(module)

    assert same(run(True), run(False))


def test_only_on_a_cpu_a_step_that_is_not_finite_raises_at_once():
    assert not FiniteCheck.deferred(torch.device("cpu"))
    assert FiniteCheck.deferred(torch.device("cuda", 0)) and FiniteCheck.deferred(torch.device("meta"))


@pytest.mark.parametrize("wrong", [-1, 2])
def test_classes_that_do_not_exist_are_refused_before_the_first_step(wrong):
    model = VAE((2,), ClassLabels(2), encoder=small, decoder=small, likelihood=Gaussian(), latent_dim=2)
    y = torch.tensor([0, 1, wrong, 1])
    with pytest.raises(ValueError, match=r"^y must be \(4,\) int64 of classes 0\.\.1"):
        GenerativeModule(model, ADAM, Batches(Split(torch.zeros(4, 2), y), 4, seed=0), Budget(images=4))


# Without a Trainer


@pytest.mark.parametrize("make", [vae, wgan, Relay])
def test_a_loop_without_lightning_takes_the_steps_of_the_module(make):
    module = module_of(make(), 12)
    module.training_step((0, 5), 0)
    module.training_step((5, 12), 0)
    torch.manual_seed(0)
    loop = TrainingLoop(make(), ADAM, Batches(points(), BATCH, 0), Budget(images=12 * BATCH))
    loop.run(7)
    loop.run()
    assert loop.finished and loop.progress.train_seconds > 0
    weights, others = loop.ema.model.state_dict(), module.ema.model.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_without_a_budget_steps_by_hand_have_no_end_and_may_bring_their_own_batches():
    module = GenerativeModule(vae(), data=points(64), batch_size=8)
    module.make_plan()
    for step in range(20):
        x = module.batches(step)[0]
        module.training_step((x,) if step % 2 else (step, step + 1), step)
    assert module.steps == 20 and not module.finished
    whole = GenerativeModule(vae(), data=points(64), batch_size=8)
    whole.run(20)
    assert same(everything(module), everything(whole))


# Stages


@pytest.mark.parametrize("shares, expected", [((0.25, 0.75), 5), ((0.5, 0.5), 10), ((0.99, 0.01), 20)])
def test_stages_get_their_shares_of_the_steps(shares, expected):
    module = module_of(Relay(shares=shares), 20, learning_rate=LearningRate("cosine"))
    names, rates = [], []
    while not module.finished:
        names.append(module.stage_at(module.steps)[0].name)
        module.step()
        rates.append(module.players[names[-1]]["model"].optimizer.param_groups[0]["lr"])
    assert names == ["first"] * expected + ["second"] * (20 - expected)
    # Each stage has a schedule of its own, from its first step to its last.
    for start, stop in ((0, expected), (expected, 20)):
        planned = stop - start
        factors = [(1 + math.cos(math.pi * s / planned)) / 2 for s in range(planned)]
        assert rates[start:stop] == pytest.approx([1e-2 * factor for factor in factors])
    assert module.ema.updates == {"first/model": expected, "second/model": 20 - expected}


def test_a_later_stage_leaves_the_earlier_weights_alone():
    module = module_of(Relay(), 20)
    module.training_step((0, 5), 0)
    first, second = (copy.deepcopy(part.state_dict()) for part in (module.model.first, module.model.second))
    average = copy.deepcopy(module.ema.model.first.state_dict())
    module.training_step((5, 20), 0)
    assert all(torch.equal(first[key], value) for key, value in module.model.first.state_dict().items())
    assert all(torch.equal(average[key], value) for key, value in module.ema.model.first.state_dict().items())
    assert not torch.equal(second["map.weight"], module.model.second.map.weight)


# What is kept


def test_the_state_holds_plain_types_and_tensors_and_what_was_done():
    module = module_of(wgan(), 12)
    module.training_step((0, 12), 0)
    state = module.state()
    assert (state["steps"], state["planned_steps"]) == (12, 12) and state["train_seconds"] > 0
    assert state["ema_updates"] == {"train/critic": 10, "train/generator": 2}
    assert [len(o["state"]) for o in state["optimizers"]] == [
        len(p.parameters) for p in module.players["train"].values()
    ]


# Stages, continued: what is handed on, and whose seconds they are


def test_a_finished_stage_gets_the_average_of_its_weights_and_the_next_builds_on_it():
    module = module_of(Relay(), 20, ema_half_life=552)
    module.training_step((0, 4), 0)
    assert not torch.equal(module.model.first.map.weight, module.ema.model.first.map.weight)
    module.training_step((4, 5), 0)
    for part in (module.model, module.ema.model):
        assert same([*part.first.parameters()], [*module.model.first.parameters()])
    module.training_step((5, 20), 0)
    assert not torch.equal(module.model.second.map.weight, module.ema.model.second.map.weight)


def in_seconds(clock: Clock, shares: tuple[float, float], slowness: int, then: int | None = None) -> GenerativeModule:
    """A relay in twenty seconds whose second part's steps take ``slowness`` more readings of the clock.

    After its 100th step it takes ``then`` of them, where that is said.
    """
    model, calls = Relay(shares=shares), []
    loss = model.second.loss

    def slow(*arguments: Any, **keywords: Any) -> Loss:
        calls.append(1)
        clock.reads += slowness if then is None or len(calls) < 100 else then
        return loss(*arguments, **keywords)

    model.second.loss = slow
    slowly = functools.partial(torch.optim.SGD, lr=1e-3)
    module = GenerativeModule(model, slowly, Batches(points(), BATCH, 0), Budget(seconds=20.0))
    module.make_plan()
    return module


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.2, 0.8)])
def test_where_seconds_are_given_stages_share_the_seconds_and_not_the_steps(clock, shares):
    module, ended = in_seconds(clock, shares, slowness=9), []
    measuring = module.progress.train_seconds
    module.on_step = lambda: ended.append((module.stage_at(module.steps - 1)[0].name, module.progress.train_seconds))
    module.training_step((0, 10**6), 0)
    first = max(seconds for name, seconds in ended if name == "first")
    assert first == pytest.approx(20 * shares[0], rel=0.05) and module.progress.train_seconds == pytest.approx(
        20, rel=0.05
    )
    count = [sum(name == stage for name, _ in ended) for stage in ("first", "second")]
    assert count[0] / count[1] == pytest.approx(10 * (shares[0] - measuring / 20) / shares[1], rel=0.1)


def test_a_boundary_never_moves_back_over_steps_that_are_done(clock):
    """Even where a stage turns out ten times as slow as when it was measured."""
    module, seen = in_seconds(clock, (0.5, 0.5), slowness=1, then=30), []
    module.on_step = lambda: seen.append((module.steps, *module.plan.boundaries, module.plan.planned_steps))
    module.training_step((0, 10**6), 0)
    final = module.plan.boundaries[0]
    for steps, boundary, planned in seen:
        assert steps <= planned and (boundary == final if steps >= final else boundary > steps or boundary == final)
    assert len({planned for *_, planned in seen}) > 4, "the plan was corrected"
    assert module.finished and module.progress.train_seconds < 22


def test_each_stage_runs_its_own_schedule_to_its_end_by_the_clock(clock):
    module, rates = in_seconds(clock, (0.5, 0.5), slowness=4), {"first": [], "second": []}
    module.learning_rate = LearningRate("cosine")

    def note() -> None:
        name = module.stage_at(module.steps - 1)[0].name
        rates[name].append(module.players[name]["model"].optimizer.param_groups[0]["lr"])

    module.on_step = note
    module.training_step((0, 10**6), 0)
    for name, rate in rates.items():
        assert rate[0] == pytest.approx(1e-3, rel=1e-3) and rate[-1] < 1e-5, name


# Half precision


def scaled(scale: float, steps: int = 40) -> GenerativeModule:
    """A module whose scaled gradients become infinite above 1024, as those of half precision do above 65504."""
    x = torch.randn(32, 2, generator=generator("points"))
    torch.manual_seed(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    module = GenerativeModule(
        Mean(),
        functools.partial(torch.optim.SGD, lr=0.1),
        Batches(Split(x, None), 4, 0),
        Budget(images=4 * steps),
        scaler=scaler,
    )
    module.model.mean.register_hook(lambda g: torch.where(g.abs() > 1024, torch.inf, g))
    module.make_plan()
    return module


def test_steps_that_overflow_are_skipped_and_counted_until_the_scale_fits():
    module = scaled(2.0**16)
    start = module.model.mean.detach().clone()
    module.step()
    assert (
        module.progress.skipped == 1
        and torch.equal(module.model.mean, start)
        and module.ema.updates["train/model"] == 0
    )
    assert module.scaler is not None and module.scaler.get_scale() == 2.0**15
    done = []
    while module.steps < 40:
        before = module.progress.skipped
        module.step()
        done += [module.steps - 1] if module.progress.skipped == before else []
    assert 1 < module.progress.skipped < 12
    assert module.ema.updates["train/model"] == 40 - module.progress.skipped == len(done)
    # The steps that are done are the same, whatever the scale.
    plain = scaled(1.0)
    for step in done:
        plain.progress.steps = step
        plain.step()
    assert plain.progress.skipped == 0 and torch.allclose(module.model.mean, plain.model.mean, rtol=1e-6)


def test_what_overflows_for_ever_ends_the_run():
    module = scaled(2.0**16)
    module.model.mean.register_hook(lambda g: g * torch.inf)
    with pytest.raises(NonFiniteError, match=rf"^gradient is not finite at step {PATIENCE}: "):
        module.training_step((0, 40), 0)
    assert module.progress.skipped == PATIENCE


def test_the_scale_goes_on_where_a_run_does():
    module = scaled(2.0**16)
    for _ in range(5):
        module.step()
    other = scaled(2.0**16)
    other.restore(module.model.state_dict(), module.ema.model.state_dict(), copy.deepcopy(module.state()))
    for _ in range(5):
        module.step(), other.step()
    assert torch.equal(module.model.mean, other.model.mean) and module.progress.skipped == other.progress.skipped > 0
    assert module.scaler is not None and other.scaler is not None
    assert module.scaler.get_scale() == other.scaler.get_scale()


def test_a_loop_fits_the_distribution_of_conditions_to_its_data():
    model = VAE((2,), ClassLabels(3), encoder=small, decoder=small, likelihood=Gaussian(), latent_dim=2)
    y = torch.tensor([0, 0, 0, 1])
    TrainingLoop(model, ADAM, Batches(Split(torch.zeros(4, 2), y), 4, seed=0), Budget(images=4))
    assert model.conditioner.probs.tolist() == [0.75, 0.25, 0.0]
