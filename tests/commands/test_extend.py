"""Runs that go on with a larger budget, and runs that begin with the weights of another one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genzoo.runs import Run
from genzoo.training.budget import LearningRate
from genzoo.training.checkpoints import find
from tests.commands import SMALL, TINY, genzoo
from tests.commands.test_resume import FAMILIES, cut_short

WSD = [*TINY[1:], "trainer.learning_rate.decay=wsd", "trainer.grids=1", "trainer.saves=1", "outputs=made"]
IMAGES = 64 * 10  # ten steps, of which eight are stable
KINDS = {
    "vae": SMALL["vae"],
    "wgan_gp": SMALL["wgan_gp"],
    "ddpm of classes": [*SMALL["ddpm"], "data.conditional=true", "model.condition_dropout=0.1"],
    "realnvp of points": ["model=realnvp", "data=moons", "model.couplings=2", "model.network.width=8"],
    "masks": ["model=masked_diffusion", "model.network.width=16", "model.network.layers=1"],
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(*words: str) -> Path:
    """Train, and return the run."""
    code, out, err = genzoo(*words)
    assert code == 0, err
    return Path(out.splitlines()[-1].removeprefix("run: ").removeprefix("already done: "))


def weights(run: Path, folder: str = "checkpoints") -> list[dict[str, torch.Tensor]]:
    """Return the weights and averages of the last checkpoint in a folder of a run."""
    last = find(run / folder)[-1]
    return [load_file(last / f"{name}.safetensors") for name in ("weights", "ema")]


def equal(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_extended_twice_is_the_one_of_the_whole_budget(here, kind):
    words = [*WSD, *KINDS[kind]]
    once = run_of(*words, f"budget.images={IMAGES}")
    twice = run_of(f"resume={once}", f"budget.images={2 * IMAGES}")
    extended = run_of(f"resume={twice}", f"budget.images={4 * IMAGES}")
    whole = run_of(*words, f"budget.images={4 * IMAGES}", "outputs=whole")
    assert [Run(run).status["step"] for run in (once, twice, extended)] == [10, 20, 40]
    assert equal(weights(extended, "stable"), weights(whole, "stable"))
    assert equal(weights(extended), weights(whole))
    assert Run(extended).status["extends"] == {"run": twice.name, "step": 17}
    assert not equal(weights(once), weights(twice)) and Run(once).status["state"] == "done"
    steps = [event["step"] for event in Run(extended).events() if event["event"] == "train"]
    assert steps == sorted(set(steps))
    # Typed again, it is found.
    assert run_of(f"resume={once}", f"budget.images={2 * IMAGES}") == twice


@pytest.mark.parametrize("step", [9, 12, 19])
def test_an_extension_that_is_interrupted_goes_on(here, step):
    words = [*WSD, *SMALL["vae"]]
    once = run_of(*words, f"budget.images={IMAGES}")
    longer = f"budget.images={2 * IMAGES}"
    cut_short(step, f"resume={once}", longer)
    cut = max(once.parent.iterdir(), key=lambda path: path.name)
    assert cut != once
    assert (run_of(f"resume={once}", longer) if step == 12 else run_of(f"resume={cut}")) == cut
    assert equal(weights(cut), weights(run_of(*words, longer, "outputs=whole")))
    assert len(list(once.parent.iterdir())) == 2


def test_a_constant_rate_goes_on_from_the_end(here):
    words = [*WSD, *SMALL["vae"], "trainer.learning_rate.decay=constant"]
    once = run_of(*words, f"budget.images={IMAGES}")
    assert not (once / "stable").exists()
    longer = run_of(f"resume={once}", f"budget.images={2 * IMAGES}")
    assert Run(longer).status["extends"]["step"] == 10
    assert equal(weights(longer), weights(run_of(*words, f"budget.images={2 * IMAGES}", "outputs=whole")))


def test_of_stages_the_last_one_goes_on(here):
    once = run_of(*WSD, *FAMILIES["vqvae"], f"budget.images={IMAGES}")
    longer = run_of(f"resume={once}", f"budget.images={2 * IMAGES}")
    before, after = weights(once)[1], weights(longer)[1]
    codec = [name for name in before if name.startswith("codec.")]
    assert codec and all(torch.equal(before[name], after[name]) for name in codec)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("prior."))
    assert Run(longer).status["images"] == 2 * IMAGES


def test_a_teacher_and_captions_go_on_with_the_run_that_has_them(here):
    points = ["model=flow_matching", "data=moons", "model.network.width=8", "sampler.steps=2"]
    teacher = run_of(*WSD, *points, f"budget.images={IMAGES}", "outputs=teacher")
    once = run_of(*WSD, *points, f"budget.images={IMAGES}", "teacher=run", f"teacher.run={teacher}")
    shutil.rmtree("teacher")
    longer = run_of(f"resume={once}", f"budget.images={2 * IMAGES}")
    for folder in ("parents", "precomputed"):
        kept, found = (sorted(path.read_bytes() for path in (run / folder).iterdir()) for run in (once, longer))
        assert kept == found
    words = ["data=shapes", "data.size=16", "data.n=80", "data.n_test=24", "data.conditional=true", *SMALL["ddpm"]]
    once = run_of(*WSD, *words, f"budget.images={IMAGES}")
    longer = run_of(f"resume={once}", f"budget.images={2 * IMAGES}")
    shutil.rmtree(once)
    text = "text=a small red ring on the left"
    assert genzoo("sample", f"run={longer}", text, "n=1", "out=x.npz").code == 0


@pytest.mark.parametrize(("limit", "spent"), [("seconds", "train_seconds"), ("flops", "train_flops")])
def test_seconds_and_flops_go_on_too(here, limit, spent):
    once = run_of(*WSD, *SMALL["vae"], f"budget.images={16 * IMAGES}")
    more = 2 * Run(once).status[spent]
    longer = Run(run_of(f"resume={once}", f"budget.{limit}={more}"))
    assert longer.status["ended_by"] == limit and longer.status["images"] > 20 * IMAGES
    assert 0.85 * more < longer.status[spent] < 1.1 * more
    assert find(longer.path / "stable")[-1].name != find(once / "stable")[-1].name
    if limit == "flops":
        whole = run_of(*WSD, *SMALL["vae"], f"budget.flops={more}", "outputs=whole")
        assert equal(weights(longer.path), weights(whole))


def test_what_cannot_go_on_is_said_in_one_line(here):
    cosine = run_of(*WSD, *SMALL["vae"], f"budget.images={IMAGES}", "trainer.learning_rate.decay=cosine")
    wsd = run_of(*WSD, *SMALL["vae"], f"budget.images={IMAGES}")
    cut_short(3, *WSD, *SMALL["vae"], f"budget.images={IMAGES}", "outputs=cut")
    (cut,) = Path("cut").glob("*/*")
    lost = shutil.copytree(wsd, here / "lost")
    shutil.rmtree(lost / "stable")
    for words, said in (
        ([f"resume={cosine}", "budget.images=9999"], f"trainer.learning_rate.decay=cosine); train with decay=wsd to go on "
         f"later, or begin a new run from its weights by init={cosine}"),
        ([f"resume={wsd}", f"budget.images={IMAGES}"], f"budget.images={IMAGES}: run={wsd} has spent {IMAGES} already"),
        ([f"resume={wsd}", "budget.seconds=1e-3"], "already: give more"),
        ([f"resume={cut}", "budget.images=9999"], "is not finished: resume it first, without a budget"),
        ([f"resume={lost}", "budget.images=9999"], "no checkpoint from before the decay"),
        ([f"resume={wsd}", "budget.samples=9"], "keeps the run's configuration; omit it"),
    ):  # fmt: skip
        code, _, err = genzoo(*words)
        assert code == 2 and said in err and err.count("\n") == 1, (words, err)
    assert len(list(wsd.parent.iterdir())) == 2


# Weights of another run


def first_weights(*words: str) -> dict[str, torch.Tensor]:
    """Train for a step with a rate of nearly zero, and return the weights."""
    run = run_of(*TINY[1:], "budget.images=64", "optimizer.lr=1e-20", "trainer.grids=1", *words)
    return weights(run)[0]


@pytest.mark.parametrize("kind", [*KINDS, "glow"])
def test_a_run_begins_with_the_averaged_weights_of_another(here, kind):
    words = KINDS.get(kind, ["model=glow", "model.scales=1", "model.steps=2", "model.network.width=8"])
    source = run_of(*TINY[1:], f"budget.images={IMAGES}", "trainer.grids=1", *words)
    _, ema = weights(source)
    begun = first_weights(*words, f"init={source}", "seed=1")
    counts = ("conditioner.probs", "cost.seen")  # of the data, and of images
    assert all(torch.allclose(begun[name], ema[name], atol=1e-6) for name in ema if name not in counts)
    other = first_weights(*words, "seed=1")
    assert not all(torch.allclose(other[name], ema[name], atol=1e-6) for name in ema)


def test_weights_that_do_not_fit_are_named(here):
    source = run_of(*TINY, *SMALL["ddpm"])
    words = [*TINY, *SMALL["ddpm"], "data.conditional=true", f"init={source}"]
    code, _, err = genzoo(*words)
    assert code == 0
    (line,) = [line for line in err.splitlines() if "init=" in line]
    assert "; new: conditioner.probs, network.embedding.condition.embed_y.weight" in line
    for words, said in (
        ([*SMALL["vae"], f"init={source}"], "none of its weights fits this model"),
        ([*SMALL["vae"], f"init={here}"], "not a run directory"),
        ([f"resume={source}", f"init={source}"], "keeps the run's configuration; omit it"),
    ):
        code, _, err = genzoo(*words if "resume" in words[0] else [*TINY, *words])
        assert code == 2 and said in err and err.count("\n") == 1, err


def test_a_run_that_was_stopped_before_its_first_checkpoint_still_begins_with_these_weights(here):
    source = run_of(*TINY, *SMALL["vae"], "outputs=source")
    words = [*TINY, *SMALL["vae"], f"init={source}", "seed=3"]
    whole = run_of(*words, "outputs=whole")
    cut_short(0, *words, "outputs=cut")
    (cut,) = Path("cut").glob("*/*")
    shutil.rmtree("source")
    assert not find(cut / "checkpoints")
    assert equal(weights(run_of(f"resume={cut}")), weights(whole))


def test_steps_of_the_stable_part_have_the_whole_rate():
    rate = LearningRate("wsd", warmup=0, decay_fraction=0.2)
    factors = [rate(i, 100) for i in range(100)]
    assert factors[:81] == [1.0] * 81 and [rate.is_stable(i, 100) for i in (0, 80, 81)] == [True, True, False]
    assert factors[85] == pytest.approx(1 - 0.25**0.5) and factors[95] == pytest.approx(1 - 0.75**0.5)
    assert rate(100, 100) == pytest.approx(0, abs=1e-12) and sorted(factors, reverse=True) == factors
    for wrong in ({"decay": "wds"}, {"decay_fraction": 0.0}, {"decay_fraction": 1.0}):
        with pytest.raises(ValueError, match="decay"):
            LearningRate(**wrong)
