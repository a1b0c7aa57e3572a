"""Guided samples by the command: their scales, costs, cards and curves, and what cannot be guided."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import genzoo as package
from genzoo import load
from genzoo.diffusion.guidance import AutoGuidance, ClassifierFreeGuidance, GuidedModel, guide
from genzoo.evaluation.samplers import guidance_card
from genzoo.numerics.random import SampleStreams
from genzoo.report.leaderboard import rows, tables
from genzoo.report.records import find, read
from genzoo.runs import Run
from genzoo.training import checkpoints
from tests.commands import SMALL, genzoo, trained, untrained

CONDITIONAL = "data.conditional=true"
SCORED = ["metrics.n=12", "metrics.force=true", "metrics.events=2", "metrics.throughput=2", "metrics.num_samples=4"]
AUTOREGRESSIVE = ["model=autoregressive", "model.network.width=8", "model.network.layers=2"]
CODES = ["model=latent", "codec=vqvae", "prior=transformer", "prior.network.width=16", "prior.network.layers=1"]
LATENTS = ["model=latent", "codec=vae", "prior=ddpm", "prior.network.width=16", "sampler.steps=5"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ddpm(here) -> Path:
    return untrained(here, *SMALL["ddpm"], CONDITIONAL, "sampler=ddim", "sampler.steps=5")[0]


@pytest.fixture
def autoregressive(here) -> Path:
    return untrained(here, *AUTOREGRESSIVE, CONDITIONAL)[0]


def drawn(run: Path, *words: str) -> tuple[np.ndarray, str]:
    code, out, err = genzoo("sample", f"run={run}", "n=4", "label=3", "out=x.npz", *words)
    assert (code, err) == (0, "")
    return np.load("x.npz")["samples"], out


def test_a_number_is_the_scale_of_classifier_free_guidance(ddpm):
    plain, out = drawn(ddpm)
    assert "5 evaluations" in out
    once, out = drawn(ddpm, "guidance=1")
    assert "5 evaluations" in out
    np.testing.assert_array_equal(once, plain)
    guided, out = drawn(ddpm, "guidance=2.5")
    assert "10 evaluations" in out and (guided != plain).any()
    same, _ = drawn(ddpm, "guidance=classifier_free", "guidance.scale=2.5")
    np.testing.assert_array_equal(guided, same)
    partial, out = drawn(ddpm, "guidance=2.5", "guidance.interval=[0.5,2]")
    assert 5 < int(out.split("samples, ")[1].split()[0]) < 10 and (partial != guided).any()


def test_the_library_draws_guided_samples_as_the_command_does(ddpm):
    model = guide(load(ddpm), functools.partial(ClassifierFreeGuidance, scale=2.5))
    x = package.sample(model, 4, label=3)
    torch.testing.assert_close(x, package.sample(ddpm, 4, label=3, guidance=2.5), rtol=0, atol=0)
    assert not torch.equal(x, package.sample(ddpm, 4, label=3))
    found, _ = drawn(ddpm, "guidance=2.5")
    k = np.clip(np.floor(17 * (x.numpy() + 1) / 2), 0, 16)
    np.testing.assert_array_equal(found, np.rint(255 * k / 16).astype(np.uint8).transpose(0, 2, 3, 1))


def test_every_sampler_takes_every_guidance(ddpm, here):
    classifier = untrained(here, "model=noisy_classifier", "data=digits", "model.network.channels=8")[0]
    worse = untrained(here, *SMALL["ddpm"], CONDITIONAL, "seed=1")[0]
    for sampler in ("ancestral", "ddim", "dpm_solver", "heun"):
        plain, _ = drawn(ddpm, f"sampler={sampler}", "sampler.steps=3")
        for guidance in (["guidance=3"], ["guidance=auto", f"guidance.run={worse}", "guidance.scale=3"],
                         ["guidance=classifier", f"guidance.run={classifier}", "guidance.scale=30"]):  # fmt: skip
            guided, out = drawn(ddpm, f"sampler={sampler}", "sampler.steps=3", *guidance)
            assert f"{2 * (5 if sampler == 'heun' else 3)} evaluations" in out and (guided != plain).any(), guidance


def test_a_classifier_gives_classes_to_an_unconditional_model(here):
    run = untrained(here, *SMALL["ddpm"], "sampler=ddim", "sampler.steps=5")[0]
    classifier = untrained(here, "model=noisy_classifier", "data=digits", "model.network.channels=8")[0]
    code, _, err = genzoo("sample", f"run={run}", "label=3", "out=x.npz")
    assert code == 2 and "no classes" in err
    words = ["guidance=classifier", f"guidance.run={classifier}", "guidance.scale=40"]
    three, out = drawn(run, *words)
    assert "10 evaluations" in out
    code, _, err = genzoo("sample", f"run={run}", "n=4", "label=5", "out=x.npz", *words)
    assert code == 0 and (np.load("x.npz")["samples"] != three).any(), err
    code, _, err = genzoo("sample", f"run={run}", "n=40", "out=x.npz", *words)  # the classes of the training data
    assert code == 0 and len(set(np.load("x.npz")["y"].tolist())) > 3, err


def test_classes_that_a_classifier_never_saw_are_not_drawn(here):
    run = untrained(here, *SMALL["ddpm"], "sampler=ddim", "sampler.steps=2")[0]
    classifier, model, ema = untrained(here, "model=noisy_classifier", "data=digits", "model.network.channels=8")
    for each in (model, ema):
        each.conditioner.probs.copy_(torch.tensor([0.0, 0.5, 0.5, *[0.0] * 7]))
    checkpoints.save(classifier / "checkpoints", 5, model, ema, {})
    words = ["guidance=classifier", f"guidance.run={classifier}", "out=x.npz"]
    assert genzoo("sample", f"run={run}", "n=30", *words).code == 0
    assert set(np.load("x.npz")["y"].tolist()) == {1, 2}
    code, _, err = genzoo("sample", f"run={run}", "label=3", *words)
    assert code == 2 and "no training image has this class" in err


def test_logits_and_codes_are_guided_by_the_same_word(autoregressive, here):
    codes = untrained(here, *CODES, CONDITIONAL)[0]
    for run in (autoregressive, codes):
        plain, before = drawn(run)
        guided, after = drawn(run, "guidance=4")
        count = [int(out.split("samples, ")[1].split()[0]) for out in (before, after)]
        extra = 1 if run == codes else 0  # the codec decodes once
        assert count[1] - extra == 2 * (count[0] - extra) and (guided != plain).any()


def test_the_prior_of_a_latent_model_is_guided(here):
    run = untrained(here, *LATENTS, CONDITIONAL)[0]
    plain, before = drawn(run)
    guided, after = drawn(run, "guidance=4")
    count = [int(out.split("samples, ")[1].split()[0]) for out in (before, after)]
    assert count[1] - 1 == 2 * (count[0] - 1) and (guided != plain).any()
    other = untrained(here, *LATENTS, CONDITIONAL, "seed=1")[0]
    code, _, err = genzoo("sample", f"run={run}", "guidance=auto", f"guidance.run={other}")
    assert (code, err.count("\n")) == (2, 1) and "another codec" in err
    assert drawn(run, "guidance=auto", f"guidance.run={run}", "guidance.scale=3")[1] == after


def test_guided_scores_have_cards_of_their_own_and_no_density(ddpm):
    for guidance in ([], ["guidance=1"], ["guidance=3"], ["guidance=3", "guidance.interval=[0.1,10]"]):
        code, _, err = genzoo("evaluate", f"run={ddpm}", *SCORED, "metrics.max_nfe=5", *guidance)
        assert code == 0 and "in place of" not in err, err
        result = Run(ddpm).result["metrics"]
        setting = result["train/fd_digits"]["card"]["setting"]
        if guidance in ([], ["guidance=1"]):
            assert "guidance" not in setting and any(name.startswith("test/bpd") for name in result)
            continue
        assert setting["guidance"]["scale"] == 3 and setting["guidance"]["name"] == "ClassifierFreeGuidance"
        assert not any(name.startswith("test/bpd") for name in result)
        assert setting["sampler"]["name"] == "DDIM" and setting["nfe"] > 5
    assert len(list((ddpm / "results").iterdir())) == 3  # a scale of one is the model itself
    (table,) = tables(rows(read(find([ddpm]))[0]))
    found = {json.dumps(row.setting.get("guidance"), sort_keys=True) for row in table.rows}
    assert len(table.rows) == len(found) == 3 and "null" in found


def test_a_sampler_that_takes_too_long_is_replaced_and_still_guided(ddpm):
    code, _, err = genzoo("evaluate", f"run={ddpm}", *SCORED, "metrics.max_nfe=4", "guidance=3")
    assert code == 0, err
    card = Run(ddpm).result["metrics"]["train/fd_digits"]["card"]["setting"]
    assert card["sampler"]["name"] == "Heun" and card["guidance"]["scale"] == 3 and card["nfe"] == 98
    assert card["sampler"]["instead_of"]["name"] == "DDIM"


def test_weights_of_the_other_model_are_part_of_the_card(ddpm, here):
    cards = []
    for seed in (1, 2):
        worse = untrained(here, *SMALL["ddpm"], CONDITIONAL, f"seed={seed}")[0]
        code, _, err = genzoo("evaluate", f"run={ddpm}", *SCORED, "guidance=auto", f"guidance.run={worse}")
        assert code == 0, err
        cards.append(Run(ddpm).result["metrics"]["train/fd_digits"]["card"]["setting"]["guidance"])
    assert cards[0]["name"] == "AutoGuidance" and cards[0]["worse"]["sha256"] != cards[1]["worse"]["sha256"]


def test_several_scales_are_a_sweep(ddpm, monkeypatch):
    ran: list[list[str]] = []

    def run_process(words, *_, **__):
        ran.append(list(words))
        return package.jobs.sweep.Outcome(0, "")

    monkeypatch.setattr("genzoo.jobs.sweep.run_process", run_process)
    code, _, err = genzoo("-m", "evaluate", f"run={ddpm}", "guidance=1,1.5,3")
    assert code == 0, err
    assert [[word for word in words if "guidance" in word] for words in ran] == [
        ["guidance=classifier_free", f"guidance.scale={scale}"] for scale in ("1", "1.5", "3")
    ]
    assert genzoo("evaluate", f"run={ddpm}", "guidance=1,2").code == 2  # without -m


BAD = """
    ddpm guidance=-1|scale must be at least 0
    ddpm guidance=nan|guidance
    ddpm guidance=2x|guidance.scale
    ddpm guidance=strong|classifier_free
    ddpm guidance=2 guidance.interval=[2,1]|interval must be two noise levels
    ddpm guidance=2 guidance.interval=[1]|guidance
    ddpm guidance=2 guidance.scales=3|guidance.scale
    ddpm guidance=auto|guidance.run
    ddpm guidance=auto guidance.run=/nowhere|/nowhere
    ddpm guidance=classifier guidance.run={ddpm}|no classifier
    ddpm guidance=auto guidance.run={vae}|no denoiser
    vae guidance=2|VAE samples in one pass
    plain guidance=2|unconditional
    undropped guidance=2|condition_dropout=0
    autoregressive guidance=2 guidance.interval=[0.1,1]|no noise levels
    autoregressive guidance=auto guidance.run={autoregressive}|unconditional logits
    classifier guidance=2|classifies and has no samples
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    made = {
        "ddpm": [*SMALL["ddpm"], CONDITIONAL],
        "plain": SMALL["ddpm"],
        "undropped": [*SMALL["ddpm"], CONDITIONAL, "model.condition_dropout=0"],
        "vae": [*SMALL["vae"], CONDITIONAL],
        "autoregressive": [*AUTOREGRESSIVE, CONDITIONAL],
        "classifier": ["model=noisy_classifier", "data=digits", "model.network.channels=8"],
    }
    return {name: untrained(root, *words)[0] for name, words in made.items()}


@pytest.mark.parametrize("line", BAD.strip().splitlines(), ids=str.strip)
def test_what_cannot_be_guided_is_refused_in_one_line(runs, here, line):
    words, _, problem = line.strip().partition("|")
    run, *words = words.format(**runs).split()
    code, out, err = genzoo("sample", f"run={runs[run]}", "out=x.npz", *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert problem in err and not list(here.iterdir())


def test_a_classifier_is_trained_scored_and_evaluated_as_any_model(here):
    run = trained("model=noisy_classifier", "data=digits", "model.network.channels=8", "metrics.events=50")
    names = {"classifier/accuracy", "classifier/accuracy_noisy", "classifier/cross_entropy_noisy"}
    first = Run(run).result["metrics"]
    assert names <= first.keys() and not any(name.startswith(("sampling/", "train/", "test/")) for name in first)
    assert not (run / "samples.png").exists()
    code, _, err = genzoo("evaluate", f"run={run}", "metrics.events=50")
    assert code == 0, err
    again = Run(run).result["metrics"]
    assert all(again[name]["value"] == pytest.approx(first[name]["value"], abs=1e-6) for name in names)
    code, _, err = genzoo("compare", f"runs={run}", "out=page")
    assert code == 0 and "accuracy" in Path("page/leaderboard.md").read_text(), err
    code, _, err = genzoo("model=noisy_classifier", "data=moons", "data.conditional=false")
    assert code == 2 and err.count("\n") == 1 and "data.conditional=true" in err


def test_guided_models_share_weights_and_leave_the_model_unchanged(ddpm):
    model = load(ddpm)
    guided = guide(model, functools.partial(ClassifierFreeGuidance, scale=3.0))
    assert isinstance(guided, GuidedModel)
    assert {p.data_ptr() for p in guided.parameters()} == {p.data_ptr() for p in model.parameters()}
    y = torch.full((3,), 3)
    before = model.sample(3, y, rng=SampleStreams(0, range(3)))
    assert guided.sample(3, y, rng=SampleStreams(0, range(3))).nfe == 2 * before.nfe
    assert torch.equal(model.sample(3, y, rng=SampleStreams(0, range(3))).x, before.x)
    assert guide(model, functools.partial(AutoGuidance, worse=model, scale=1.0)) is model


def test_guidance_crosses_precision_weights_and_paired_flows(here):
    words = ["model=flow_matching", "model.pairing=optimal_transport", "model.network.channels=8",
             "model.network.multipliers=[1]", CONDITIONAL, "sampler=euler", "sampler.steps=4"]  # fmt: skip
    run = untrained(here, *words)[0]
    whole, out = drawn(run, "guidance=3")
    assert "8 evaluations" in out and (whole != drawn(run)[0]).any()
    half, _ = drawn(run, "guidance=3", "precision=bf16-mixed")
    assert np.abs(whole.astype(int) - half.astype(int)).mean() < 0.03 * 255
    assert (drawn(run, "guidance=3", "ema=false")[0] != whole).any()
    assert "8 evaluations" in drawn(run, "guidance=auto", f"guidance.run={run}", "guidance.scale=2")[1]
    classifier = untrained(here, "model=noisy_classifier", "data=digits", "model.network.channels=8")[0]
    code, _, err = genzoo("sample", f"run={run}", "guidance=classifier", f"guidance.run={classifier}", "out=y.npz")
    assert code == 2 and "coupled noise and data" in err
    code, _, err = genzoo("sample", f"run={run}", "guidance=3", "sampler=euler_maruyama", "out=y.npz")
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize("model", ["ddpm", "score_sde"])
def test_guidance_crosses_points_of_the_plane(here, model):
    words = [
        f"model={model}",
        "data=gaussian_mixture",
        CONDITIONAL,
        "model.network.width=16",
        "sampler=heun",
        "sampler.steps=4",
    ]
    run = untrained(here, *words)[0]
    worse = untrained(here, *words, "seed=1")[0]
    classifier = untrained(here, "model=noisy_classifier", "data=gaussian_mixture", "model.network.width=16")[0]
    plain = drawn(run)[0]
    for words in (["guidance=3"], ["guidance=auto", f"guidance.run={worse}"],
                  ["guidance=classifier", f"guidance.run={classifier}", "guidance.scale=5"]):  # fmt: skip
        guided, out = drawn(run, *words)
        assert "14 evaluations" in out and np.isfinite(guided).all() and (guided != plain).any()


def test_the_states_of_guided_samples_end_with_the_samples(ddpm):
    samples, _ = drawn(ddpm, "guidance=3")
    code, _, err = genzoo("trajectory", f"run={ddpm}", "guidance=3", "label=3", "n=4", "out=path.npz", "show=estimate")
    assert code == 0, err
    with np.load("path.npz") as file:
        x = file["samples"][:, -1]
    assert x.dtype == np.float32 and x.shape == (4, 1, 8, 8)
    k = np.clip(np.floor(17 * (x + 1) / 2), 0, 16)
    np.testing.assert_array_equal(samples, np.rint(255 * k / 16).astype(np.uint8).transpose(0, 2, 3, 1))


def test_guidance_of_any_callable_is_described(ddpm):
    guided = guide(load(ddpm), lambda denoiser: ClassifierFreeGuidance(denoiser, 3.0))
    other = guide(load(ddpm), lambda denoiser: ClassifierFreeGuidance(denoiser, 4.0))
    cards = [guidance_card(model) for model in (guided, other)]
    assert cards[0] != cards[1] and json.dumps(cards[0])


def test_several_jobs_do_not_write_one_file(ddpm, monkeypatch):
    monkeypatch.setattr("genzoo.jobs.sweep.run_process", lambda *_, **__: package.jobs.sweep.Outcome(0, ""))
    code, _, err = genzoo("-m", "sample", f"run={ddpm}", "guidance=1,2", "out=x.png")
    assert code == 2 and "several jobs write it" in err
    code, out, err = genzoo("-m", "sample", f"run={ddpm}", "guidance=1,2", "out='${guidance.scale}.png'")
    assert (code, out) == (0, ""), err  # and no comparison, since nothing was scored


def test_the_evaluations_are_those_of_the_largest_batch(ddpm):
    words = ["label=3", "sampler=ode", "sampler.rtol=0.3", "sampler.atol=0.3", "out=x.npz", "batch_size=1"]
    each = [int(genzoo("sample", f"run={ddpm}", f"n={n}", *words).out.split()[2]) for n in (1, 2, 3, 4)]
    assert each == sorted(each)  # the largest of the samples so far


def test_a_classifier_is_evaluated_by_the_library_too(runs):
    scores = package.evaluate(runs["classifier"], events=20)
    assert 0 <= scores["classifier/accuracy"]["value"] <= 1 and "sampling/nfe" not in scores
