"""Scores by the command, against the same numbers computed here from their definitions."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from genzoo import load
from genzoo.commands.config import build
from genzoo.commands.score import Subject, score
from genzoo.data import digits
from genzoo.metrics.evaluator import subset
from genzoo.nn.layers import ResBlock
from genzoo.prob.random import SampleStreams
from genzoo.runs import Run
from genzoo.training import checkpoints
from tests.commands import SMALL, genzoo, untrained
from tests.conftest import composed


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


FAST = ["metrics.throughput=4", "metrics.num_samples=4", "metrics.n=0"]


def scores(run: Path, *words: str) -> dict:
    code, out, err = genzoo("evaluate", f"run={run}", *FAST, *words)
    assert (code, err) == (0, "") and out.endswith(f"run: {run}\n")
    return Run(run).result["metrics"]


def mean_and_stderr(values: np.ndarray) -> tuple[float, float]:
    return pytest.approx(values.mean(), rel=1e-6), pytest.approx(values.std(ddof=1) / math.sqrt(len(values)), rel=1e-4)


def test_bits_per_dimension_are_those_of_the_dequantised_test_split(here):
    run = untrained(here, *SMALL["realnvp"])[0]
    metrics = scores(run)
    k = digits().test.x.float()
    u = SampleStreams(0, range(360)).draw("uniform", k.shape)
    log_p = load(run).log_prob(2 * (k + u) / 17 - 1).value.double().numpy()
    bpd = -log_p / (64 * math.log(2)) + math.log2(17 / 2)
    measured = metrics["test/bpd"]
    assert (measured["value"], measured["stderr"]) == mean_and_stderr(bpd)

    card = measured["card"]
    sha256 = hashlib.sha256(digits().test.x.numpy().tobytes()).hexdigest()
    assert card["protocol"] == {
        "unit": "bits/dim", "bound": "EXACT", "split": "test", "split_sha256": sha256, "n": 360, "levels": 17,
        "dequantization": "uniform, one draw",
    }  # fmt: skip
    budget = {"images": 256, "seconds": 60, "samples": 1000}
    assert card["setting"] == {
        "weights": "ema", "step": 4, "images_seen": 256, "budget": budget, "train_seed": 0, "seed": 0,
    }  # fmt: skip
    assert metrics["model/parameters"]["value"] == sum(p.numel() for p in load(run).parameters())
    assert metrics["sampling/nfe"]["value"] == 1
    assert metrics["train/images_per_second"]["value"] == 256 / 0.5


def test_points_are_scored_in_nats_beside_the_law_that_made_them(here):
    words = ["model=realnvp", "data=moons", "model.couplings=2"]
    run = untrained(here, *words)[0]
    metrics = scores(run, "metrics.events=500")
    data = build(composed(*words)["data"]["source"], "data")
    x = data.test.x[subset(len(data.test.x), 500)]
    for name, log_p in {"nll": load(run).log_prob(x).value, "nll_truth": data.density.log_prob(x)}.items():
        measured = metrics[f"test/{name}"]
        assert (measured["value"], measured["stderr"]) == mean_and_stderr(-log_p.double().numpy())
        assert (measured["card"]["protocol"]["n"], measured["card"]["protocol"]["unit"]) == (500, "nats")


def test_a_bound_is_called_one_and_what_has_no_density_gets_no_score(here):
    vae = scores(untrained(here, *SMALL["vae"])[0], "metrics.events=8")
    assert [name for name in vae if name.startswith("test/")] == ["test/bpd_upper"]
    assert vae["test/bpd_upper"]["card"]["protocol"]["bound"] == "LOWER"
    assert vae["test/bpd_upper"]["card"]["setting"]["num_samples"] == 4
    gan = scores(untrained(here, *SMALL["wgan_gp"])[0])
    assert [name for name in gan if name.startswith("test/")] == []
    assert gan["sampling/samples_per_second"]["value"] > 0


def test_the_same_question_has_the_same_answer_and_another_one_its_own_file(here):
    run = untrained(here, *SMALL["vae"])[0]
    likelihood = [scores(run, "metrics.events=8")["test/bpd_upper"] for _ in range(2)]
    assert likelihood[0] == likelihood[1]
    assert len(list((run / "results").iterdir())) == 1
    trained = scores(run, "metrics.events=8", "ema=false")["test/bpd_upper"]
    assert trained["value"] != likelihood[0]["value"]
    assert trained["card"]["setting"]["weights"] == "trained"
    assert len(list((run / "results").iterdir())) == 2
    assert scores(run, "metrics.events=8", "seed=1")["test/bpd_upper"]["value"] != likelihood[0]["value"]


def test_a_model_in_training_is_scored_without_its_dropout(here):
    run = Run(untrained(here, *SMALL["ddpm"], "model.network.dropout=0.5")[0])
    model, subject = load(run.path), Subject(digits(), "digits", flip=False)
    settings = {"n": 0, "events": 8, "num_samples": 4, "batch_size": 8, "throughput": 2}
    torch.nn.init.normal_(model.network.head[-1].weight)  # which begins as zero, and would hide the dropout
    for block in (module for module in model.modules() if isinstance(module, ResBlock)):
        torch.nn.init.normal_(block.conv2.weight)
    expected = score(model, subject, run, settings, None, seed=0, ema=True)["metrics"]["test/bpd_upper"]["value"]
    measured = score(model.train(), subject, run, settings, None, seed=0, ema=True)["metrics"]["test/bpd_upper"][
        "value"
    ]
    assert measured == expected


def test_another_sampler_is_what_is_measured(here):
    run = untrained(here, *SMALL["ddpm"])[0]
    assert scores(run, "metrics.events=2")["sampling/nfe"]["value"] == 20
    assert scores(run, "metrics.events=2", "sampler=ddim", "sampler.steps=5")["sampling/nfe"]["value"] == 5


def test_a_score_that_is_not_finite_is_null_in_the_files_and_named_on_the_terminal(here):
    run, model, _ = untrained(here, *SMALL["realnvp"])
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    checkpoints.save(run / "checkpoints", 5, model, model, {})
    code, out, _ = genzoo("evaluate", f"run={run}", *FAST, "metrics.events=1")
    assert code == 0 and "nan" in out
    measured = json.loads((run / "result.json").read_text())["metrics"]["test/bpd"]
    assert (measured["value"], measured["stderr"]) == (None, None)


def test_a_subset_is_the_same_for_everybody_and_in_the_order_of_the_data():
    chosen = subset(100, 10)
    assert torch.equal(chosen, subset(100, 10)) and len(set(chosen.tolist())) == 10
    assert torch.equal(chosen, chosen.sort().values) and not torch.equal(chosen, torch.arange(10))
    assert torch.equal(subset(100, None), torch.arange(100)) and torch.equal(subset(100, 200), torch.arange(100))
