"""Lightning adds nothing to the steps of the module, and a run is written at steps that follow from the plan."""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.distributions.likelihoods import Gaussian
from genzoo.families.vae import VAE
from genzoo.model import GenerativeModel, Loss
from genzoo.nn.mlp import MLP
from genzoo.numerics.random import generator
from genzoo.runs import Run
from genzoo.training import checkpoints
from genzoo.training.budget import Budget, LearningRate
from genzoo.training.callbacks import ProgressBar, milestones
from genzoo.training.fit import StepRanges, fit
from genzoo.training.module import GenerativeModule
from genzoo.training.precision import NonFiniteError
from tests.toys import Jittered, Mean, Relay

ADAM = functools.partial(torch.optim.Adam, lr=1e-2, fused=True)
BATCH = 4


def module_of(model: GenerativeModel, budget: Budget, dtype: torch.dtype = torch.float32) -> GenerativeModule:
    x = torch.randn(32, 2, generator=generator("points")).to(dtype)
    return GenerativeModule(model, ADAM, Batches(Split(x, None), BATCH, 0), budget, LearningRate("cosine"))


def images(steps: int) -> Budget:
    return Budget(images=BATCH * steps)


def vae() -> VAE:
    torch.manual_seed(0)
    small = functools.partial(MLP, width=8, depth=1)
    return VAE((2,), encoder=small, decoder=small, likelihood=Gaussian(), latent_dim=2)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path, "toy-points", {"model": "toy"})


def fitted(module: GenerativeModule, run: Run, grids: int = 2, saves: int = 3, **trainer: Any) -> GenerativeModule:
    """Train on the CPU; a picture is a file that names the mean weight of the model that was drawn."""

    def draw(model: GenerativeModel, path: Path) -> None:
        path.write_text(repr(weights(model)))

    settings = {"accelerator": "cpu", "devices": 1, "precision": "32-true", **trainer}
    fit(module, run, draw, grids=grids, saves=saves, loggers=[], **settings)
    return module


def weights(model: nn.Module) -> list[list[float]]:
    return [p.detach().flatten().tolist() for p in model.parameters()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("make", [vae, Jittered, Relay])
def test_lightning_changes_no_bit(make, run):
    torch.manual_seed(0)
    by_hand = module_of(make(), images(60))
    by_hand.make_plan()
    by_hand.training_step((0, 60), 0)
    torch.manual_seed(0)
    trained = fitted(module_of(make(), images(60)), run)
    assert trained.steps == 60
    assert same(trained.model, by_hand.model) and same(trained.ema.model, by_hand.ema.model)


def test_a_run_directory_is_filled_at_steps_that_follow_from_the_plan(run):
    module = fitted(module_of(Mean(), images(400)), run, grids=2, saves=3)

    events = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    records = [event for event in events if event["event"] == "train"]
    assert [record["step"] for record in records] == list(range(2, 401, 2))
    assert [record["images"] for record in records] == [BATCH * record["step"] for record in records]
    assert {record["stage"] for record in records} == {"train"}
    assert all(set(record["values"]) == {"train/fit", "train/grad_norm", "train/lr"} for record in records)
    rates = [record["values"]["train/lr"] for record in records]
    cosine = LearningRate("cosine")
    assert rates == pytest.approx([1e-2 * cosine(record["step"] - 1, 400) for record in records])
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds) and seconds[-1] <= round(module.progress.train_seconds, 3)

    grids = [event for event in events if event["event"] == "samples"]
    assert [(grid["step"], grid["file"]) for grid in grids] == [
        (200, "samples/step-200.png"),
        (400, "samples/step-400.png"),
    ]
    pictures = [(run.path / grid["file"]).read_text() for grid in grids]
    assert pictures[1] == repr(weights(module.ema.model)) == (run.path / "samples.png").read_text()
    assert pictures[0] != pictures[1]

    assert [path.name for path in checkpoints.find(run.path / "checkpoints")] == ["step-267", "step-400"]
    for ema, source in ((True, module.ema.model), (False, module.model)):
        other = Mean(start=9.0)
        checkpoints.load_weights(checkpoints.latest(run.path), other, ema=ema)
        assert same(other, source)
    status = run.status
    assert (status["step"], status["images"], status["planned_images"]) == (400, 1600, 1600)
    assert status["train_seconds"] == pytest.approx(module.progress.train_seconds, abs=1e-3)


def test_a_picture_and_a_checkpoint_show_the_step_that_they_name(run):
    """Whatever the machine's speed, no hand-over runs over a milestone."""
    module = fitted(module_of(Mean(), images(90)), run, grids=3, saves=2)
    for steps in (30, 60):
        part = module_of(Mean(), images(90))
        part.make_plan()
        part.training_step((0, steps), 0)
        assert (run.path / f"samples/step-{steps}.png").read_text() == repr(weights(part.ema.model))
    half = module_of(Mean(), images(90))
    half.make_plan()
    half.training_step((0, 45), 0)
    other = Mean(start=9.0)
    checkpoints.load_weights(run.path / "checkpoints" / "step-45", other, ema=False)
    assert same(other, half.model) and not same(other, module.model)


def test_records_of_stages_name_the_stage_and_its_own_rate(run):
    fitted(module_of(Relay(), images(40)), run)
    records = [event for event in run.events() if event["event"] == "train"]
    assert [record["stage"] for record in records] == ["first"] * 10 + ["second"] * 30
    cosine = LearningRate("cosine")
    expected = [1e-2 * cosine(s, n) for n in (10, 30) for s in range(n)]
    assert [record["values"]["train/lr"] for record in records] == pytest.approx(expected)


def test_without_pictures_only_the_last_is_drawn(run):
    fitted(module_of(Mean(), images(20)), run, grids=0, saves=1)
    assert [path.name for path in (run.path / "samples").iterdir()] == ["step-20.png"]
    assert [path.name for path in checkpoints.find(run.path / "checkpoints")] == ["step-20"]


def test_the_random_state_of_the_caller_is_his_own(run):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fitted(module_of(Jittered(), images(10)), run)
    assert torch.equal(torch.get_rng_state(), state)


# Seconds


class Slow(Mean):
    def loss(self, *arguments: Any, **keywords: Any) -> Loss:
        time.sleep(0.005)
        return super().loss(*arguments, **keywords)


@pytest.mark.parametrize("limits", [{"images": 10**6}, {}])
def test_a_plan_made_from_seconds_is_kept_and_nearly_fills_them(run, limits):
    module = fitted(module_of(Slow(), Budget(seconds=0.8, **limits)), run)
    planned = module.plan.planned_steps
    assert (1 <= planned < 160 and module.steps == planned) or module.progress.train_seconds >= 0.8
    assert module.progress.train_seconds > 0.6 and checkpoints.latest(run.path).name == f"step-{module.steps}"
    assert (run.status["step"], run.status["planned_images"]) == (module.steps, BATCH * planned)
    assert run.status["ended_by"] == run.status["planned_by"] == "seconds"


def test_speed_and_time_left_leave_grids_and_scores_out(run, capsys):
    """A step takes 5 ms; a grid and the scores take .3 s each."""

    def dawdle(*_: Any) -> dict[str, float | None]:
        time.sleep(0.3)
        return {}

    def draw(model: GenerativeModel, path: Any) -> None:
        path.write_bytes(b"")
        dawdle()

    module = module_of(Slow(), images(60))
    start = time.monotonic()
    fit(
        module, run, draw, grids=4, saves=1, score=dawdle, scores=3, loggers=[],
        accelerator="cpu", precision="32-true",
    )  # fmt: skip
    whole = time.monotonic() - start
    rates = [event["images_per_second"] for event in run.events() if event["event"] == "train"]
    assert min(rates[2:]) > 2 * BATCH / 0.3
    bar = ProgressBar()
    bar.start, bar.begun, bar.stage = 0.0, 0, 0
    module.progress.steps = 30
    assert bar.left(module) == pytest.approx(module.clock.seconds, rel=0.01) and module.clock.seconds < whole - 1.8


def test_the_time_left_follows_the_speed_of_the_present_stage():
    module = module_of(Slow(), images(60))
    module.make_plan()
    module.plan.boundaries, module.plan.planned_steps = [40], 60
    bar = ProgressBar()
    bar.start, bar.begun, bar.stage = 0.0, 0, 0
    module.progress.steps, module.clock.seconds = 40, 4.0
    bar.left(module)
    module.progress.steps, module.clock.seconds = 50, 54.0  # 5 s each, fifty times those of the first stage
    assert bar.left(module) == pytest.approx(50.0)
    module.plan.budget, module.plan.planned_by = Budget(seconds=100.0), "seconds"
    module.progress.train_seconds = 70.0
    assert bar.left(module) == pytest.approx(30.0)  # whatever the steps take


# Precision


class Seeing(VAE):
    """A model that notes the types of numbers that its networks give."""

    def _encoder_output(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        self.seen = x.dtype, self.encoder(x, y).dtype
        return super()._encoder_output(x, y)


def seeing() -> Seeing:
    torch.manual_seed(0)
    small = functools.partial(MLP, width=8, depth=1)
    return Seeing((2,), encoder=small, decoder=small, likelihood=Gaussian(), latent_dim=2)


def test_double_precision_is_double_throughout(run):
    module = fitted(module_of(seeing().double(), images(30), torch.float64), run, precision="64-true")
    assert module.model.seen == (torch.float64, torch.float64)
    assert all(p.dtype == torch.float64 for p in [*module.model.parameters(), *module.ema.model.parameters()])
    by_hand = module_of(vae().double(), images(30), torch.float64)
    by_hand.make_plan()
    by_hand.training_step((0, 30), 0)
    assert same(module.model, by_hand.model)
    other = vae().double()
    checkpoints.load_weights(checkpoints.latest(run.path), other, ema=False)
    assert same(other, module.model)


def test_bfloat16_computes_in_networks_alone_and_learns_the_same(run):
    module = fitted(module_of(seeing(), images(100)), run, precision="bf16-mixed")
    assert module.model.seen == (torch.float32, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in module.model.parameters())
    single = module_of(vae(), images(100))
    single.make_plan()
    single.training_step((0, 100), 0)
    assert not same(module.model, single.model)
    x = single.batches.x
    with torch.no_grad():
        losses = [m.eval().loss(x, rng=generator("compare")).total.item() for m in (module.model, single.model)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


# Hand-overs and errors


@pytest.mark.parametrize("planned, count", [(400, 3), (10, 4), (3, 7), (1, 2), (1000, 1)])
def test_milestones_are_spread_evenly_and_end_at_the_end(planned, count):
    stops = sorted(milestones(planned, count))
    assert stops[-1] == planned and stops[0] >= 1 and len(stops) == min(planned, count)
    gaps = [b - a for a, b in zip([0, *stops], stops, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_hand_overs_cover_the_plan_once_and_stop_at_every_milestone():
    module = module_of(Mean(), images(5000))
    module.make_plan()
    ranges = []
    for start, stop in StepRanges(module, lambda: {7, 1234, 5000}):
        ranges.append((start, stop))
        module.progress.steps, module.progress.train_seconds = (
            stop,
            stop * 1e-3,
        )  # 1000 steps a second
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert {7, 1234, 5000} <= {stop for _, stop in ranges} and module.steps == 5000
    lengths = [stop - start for start, stop in ranges]
    assert lengths[0] == 1 and max(lengths) == 250, "a quarter of a second at a time, once the speed is known"


class Diverging(Mean):
    """A mean whose third loss is not a number."""

    calls = 0

    def loss(self, *arguments: Any, **keywords: Any) -> Loss:
        total = super().loss(*arguments, **keywords).total
        self.calls += 1
        return Loss(total * (float("nan") if self.calls == 3 else 1), {"fit": total.detach() * float(self.calls != 3)})


@pytest.mark.parametrize("deferred", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run_and_writes_no_nan(run, deferred):
    module = module_of(Diverging(), images(40))
    module.finite.deferred = lambda device: deferred
    with pytest.raises(NonFiniteError, match="not finite at step 2"):
        fitted(module, run)
    assert all(event["step"] <= 2 for event in run.events())
    assert checkpoints.find(run.path / "checkpoints") == []
