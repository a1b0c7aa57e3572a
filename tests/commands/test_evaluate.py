"""Scores by the command, against the same numbers computed here from their definitions."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import genzoo as genzoo_package
from genzoo import load, runs
from genzoo.config.instantiate import build
from genzoo.data import Moons, digits, with_validation
from genzoo.data.dataset import Split
from genzoo.data.pictures import read_samples
from genzoo.distributions.discretization import to_bytes
from genzoo.evaluation import cost
from genzoo.evaluation.density import split_sha256
from genzoo.evaluation.samples import stored, subset
from genzoo.evaluation.scores import evaluate_run
from genzoo.evaluation.settings import EvalData, EvalSettings
from genzoo.metrics.features import Embedded
from genzoo.metrics.frechet import frechet_distance, moments
from genzoo.model import LogProb, Samples
from genzoo.nn.layers import ResBlock
from genzoo.numerics.random import SampleStreams
from genzoo.runs import Run, storing
from tests.children import Child
from tests.commands import SMALL, described, genzoo, trained, untrained
from tests.conftest import composed
from tests.report.test_leaderboard import tables_of


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


FAST = ["metrics.throughput=4", "metrics.num_samples=4", "metrics.n=0"]


def scores(run: Path, *words: str) -> dict:
    with pytest.MonkeyPatch.context() as patch:  # of the one line that depends on how busy the machine is
        patch.setattr("genzoo.evaluation.scores.announce", lambda *_: None)
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
        "dequantization": "uniform, one draw", "train_sha256": split_sha256(with_validation(digits(), 0.1).train.x),
    }  # fmt: skip
    budget = {"images": 256, "seconds": 60, "flops": None, "samples": 1000}
    assert card["setting"] == {
        "weights": "ema", "step": 4, "images_seen": 256, "budget": budget, "train_seed": 0, "seed": 0,
    }  # fmt: skip
    assert metrics["model/parameters"]["value"] == sum(p.numel() for p in load(run).parameters())
    assert metrics["sampling/nfe"]["value"] == 1
    assert metrics["training/images"]["value"] == 256 and metrics["training/seconds"]["value"] == 0.5


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
    for part in ("protocol", "setting"):  # more draws make a higher bound
        assert vae["test/bpd_upper"]["card"][part]["num_samples"] == 4
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
    model, subject = load(run.path), EvalData(digits(), "digits", flip=False)
    settings = EvalSettings(n=0, events=8, num_samples=4, batch_size=8, throughput=2)
    torch.nn.init.normal_(model.network.head[-1].weight)  # which begins as zero, and would hide the dropout
    for block in (module for module in model.modules() if isinstance(module, ResBlock)):
        torch.nn.init.normal_(block.conv2.weight)
    expected = evaluate_run(model, subject, run, settings, None, seed=0, ema=True)["metrics"]["test/bpd_upper"]["value"]
    measured = evaluate_run(model.train(), subject, run, settings, None, seed=0, ema=True)["metrics"]["test/bpd_upper"][
        "value"
    ]
    assert measured == expected


def test_another_sampler_is_what_is_measured(here):
    run = untrained(here, *SMALL["ddpm"])[0]
    assert scores(run, "metrics.events=2")["sampling/nfe"]["value"] == 20
    assert scores(run, "metrics.events=2", "sampler=ddim", "sampler.steps=5")["sampling/nfe"]["value"] == 5


def test_a_score_that_is_not_finite_is_null_in_the_files_and_named_on_the_terminal(here, monkeypatch):
    run, model, _ = untrained(here, *SMALL["realnvp"])
    monkeypatch.setattr(type(model), "log_prob", lambda _, x, *__, **___: LogProb(torch.full((len(x),), torch.nan)))
    code, out, _ = genzoo("evaluate", f"run={run}", *FAST, "metrics.events=1")
    assert code == 0 and "nan" in out
    measured = json.loads((run / "result.json").read_text())["metrics"]["test/bpd"]
    assert (measured["value"], measured["stderr"]) == (None, None)


def test_a_subset_is_the_same_for_everybody_and_in_the_order_of_the_data():
    chosen = subset(100, 10)
    assert torch.equal(chosen, subset(100, 10)) and len(set(chosen.tolist())) == 10
    assert torch.equal(chosen, chosen.sort().values) and not torch.equal(chosen, torch.arange(10))
    assert torch.equal(subset(100, None), torch.arange(100)) and torch.equal(subset(100, 200), torch.arange(100))


# Samples


def drawn(path: Path, x: torch.Tensor) -> Path:
    """Store bytes, (N, C, H, W), as an array of pictures."""
    np.savez(path, samples=x.permute(0, 2, 3, 1).numpy())
    return path


def scored(path: Path, *words: str) -> dict:
    code, _, err = genzoo("evaluate", f"samples={path}", *words)
    read = f"genzoo: samples={path}: {len(list(path.iterdir()))} images, no file skipped\n" if path.is_dir() else ""
    assert (code, err) == (0, read)
    return json.loads(path.with_suffix(".scores.json").read_text())


def test_every_quality_is_measured_against_both_splits_with_its_protocol(here):
    run = untrained(here, *SMALL["vae"])[0]
    metrics = scores(run, "metrics.events=8", "metrics.n=100")
    per_split = ["fd", "kd", "precision", "recall", "density", "coverage"]
    train = with_validation(digits(), 0.1).train
    for split, n in {"train": len(train.x), "test": 360}.items():
        for name in per_split:
            card = metrics[f"{split}/{name}_digits"]["card"]
            assert card["protocol"]["reference"] == f"digits/{split}"
            assert card["protocol"]["n_real"] == (n if name in ("fd", "kd") else 100)
            assert card["protocol"]["n_fake"] == 100 and card["setting"]["nfe"] == 1
            assert len(card["protocol"]["features_sha256"]) == 64
    assert {"reconstruction/mse", "reconstruction/psnr", "memorisation/copied"} <= set(metrics)
    assert not any("fid" in name or "kid" in name.split("/")[-1] for name in metrics)

    fake = load(run).sample(100, rng=SampleStreams(0, range(100))).x
    features = Embedded("digits").extract(to_bytes(fake, 17)).features
    real = Embedded("digits").extract(stored(train.x, 17)).features
    expected = frechet_distance(moments(features), moments(real))
    assert metrics["train/fd_digits"]["value"] == pytest.approx(expected, rel=1e-6)


def test_samples_of_another_program_get_the_scores_that_a_run_would(here):
    run = untrained(here, *SMALL["vae"])[0]
    metrics = scores(run, "metrics.events=8", "metrics.n=100")
    for out in ("made.npz", "made"):
        assert genzoo("sample", f"run={run}", "n=100", f"out={here / out}").code == 0
        made = scored(here / out, "data=digits")["metrics"]
        for name in made:
            assert made[name]["value"] == pytest.approx(metrics[name]["value"], rel=1e-9, abs=1e-12)
            assert made[name]["card"]["protocol"] == metrics[name]["card"]["protocol"]


def test_copies_of_the_training_split_are_called_so_and_the_test_split_is_not(here):
    data = with_validation(digits(), 0.1)
    copies = drawn(here / "copies.npz", stored(data.train.x[:200], 17))
    code, out, _ = genzoo("evaluate", f"samples={copies}", "data=digits")
    assert code == 0 and "warning: memorised: 100.0% of the samples" in out
    fresh = scored(drawn(here / "fresh.npz", stored(data.test.x, 17)), "data=digits")
    assert fresh["warnings"] == [] and fresh["metrics"]["memorisation/copied"]["value"] < 0.01


def test_noise_is_farther_from_the_data_than_the_test_split(here):
    noise = torch.randint(0, 256, (360, 1, 8, 8), dtype=torch.uint8)
    near = scored(drawn(here / "near.npz", stored(digits().test.x, 17)), "data=digits")["metrics"]
    far = scored(drawn(here / "far.npz", noise), "data=digits")["metrics"]
    for name, sign in {"fd": 1, "kd": 1, "precision": -1, "coverage": -1, "density": -1}.items():
        assert sign * (far[f"train/{name}_digits"]["value"] - near[f"train/{name}_digits"]["value"]) > 0


def test_points_are_compared_by_transport_and_kernel(here):
    law, words = Moons(), ["data=moons", "+data.source.n_train=10_000", "+data.source.n_test=5_000"]
    np.savez(here / "near.npz", law.sample(1000, torch.Generator().manual_seed(1)).numpy())
    np.savez(here / "far.npz", law.sample(1000, torch.Generator().manual_seed(1)).numpy() + 0.5)
    near, far = (scored(here / f"{name}.npz", *words)["metrics"] for name in ("near", "far"))
    for name in ("sliced_wasserstein", "mmd", "fd_identity"):
        assert near[f"test/{name}"]["value"] < 0.3 * far[f"test/{name}"]["value"]
    # A shift by v is a transport of |v|/sqrt(2) in the mean square over directions.
    assert far["test/sliced_wasserstein"]["value"] == pytest.approx(0.5, abs=0.05)


def test_too_few_samples_are_scored_by_force_alone_and_marked_then(here):
    few = drawn(here / "few.npz", stored(digits().test.x[:50], 17))
    code, _, err = genzoo("evaluate", f"samples={few}", "data=digits")
    assert code == 2 and "metrics.n=50" in err and "metrics.force=true" in err
    forced = scored(few, "data=digits", "metrics.force=true")["metrics"]["train/fd_digits"]
    assert forced["card"]["protocol"]["forced"] == "50 samples of 64 features"


@pytest.mark.parametrize(
    ("array", "because"),
    [
        (np.zeros((4, 8, 8, 3), np.uint8), "uint8 (4, 8, 8, 3), not uint8 (N, 8, 8, 1)"),
        (np.zeros((4, 8, 8, 1), np.float32), "float32 (4, 8, 8, 1), not uint8"),
        (np.zeros((4, 9, 8, 1), np.uint8), "(4, 9, 8, 1)"),
        (np.array([{}]), "plain arrays"),
        (np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 8, 8), "convert values -1..1 to uint8 0..255"),
    ],
)
def test_samples_that_are_not_like_the_data_are_refused(here, array, because):
    np.savez(here / "odd.npz", array)
    code, _, err = genzoo("evaluate", f"samples={here / 'odd.npz'}", "data=digits")
    assert code == 2 and because in err and err.count("\n") == 1


def test_a_chain_of_many_evaluations_is_scored_by_a_shorter_one_unless_it_is_asked_for(here):
    run = untrained(here, *SMALL["ddpm"], "sampler=euler", "sampler.steps=60")[0]
    metrics = scores(run, "metrics.events=2", "metrics.n=64")
    assert metrics["train/fd_digits"]["card"]["setting"]["sampler"]["name"] == "Heun"
    assert metrics["sampling/nfe"]["value"] <= 50
    asked = scores(run, "metrics.events=2", "metrics.n=64", "sampler=euler", "sampler.steps=60")
    assert asked["train/fd_digits"]["card"]["setting"]["sampler"]["name"] == "Euler"
    assert asked["sampling/nfe"]["value"] == 60


def test_classes_are_scored_one_by_one_where_they_were_asked_for(here):
    run = untrained(here, *SMALL["vae"], "data.conditional=true")[0]
    metrics = scores(run, "metrics.events=8", "metrics.n=1000")
    accuracy = metrics["train/class_accuracy_digits"]
    assert set(accuracy["detail"]["per_class"]) == set("0123456789")
    each = metrics["train/fd_per_class_digits"]
    assert each["value"] == pytest.approx(np.mean(list(each["detail"]["per_class"].values())))
    x = load(run).sample(1000, rng=SampleStreams(0, range(1000))).x
    y = load(run).conditioner.draw(1000, None, SampleStreams(0, range(1000)))
    said = Embedded("digits").extract(to_bytes(x, 17)).logits.argmax(1)
    assert accuracy["value"] == pytest.approx(float((said == y).double().mean()))


def test_samples_that_are_not_finite_are_counted_and_compared_with_nothing(here, monkeypatch):
    run, model, _ = untrained(here, "model=realnvp", "data=moons", "model.couplings=2")
    monkeypatch.setattr(type(model), "sample", lambda _, n, *__, **___: Samples(torch.full((n, 2), torch.nan), nfe=1))
    code, out, _ = genzoo("evaluate", f"run={run}", "metrics.events=8", "metrics.n=50")
    assert code == 0 and "warning: 50 of 50 samples are not finite" in out
    assert not any("fd" in name for name in Run(run).result["metrics"])


def test_many_score_one_run_at_once(here):
    run = untrained(here, *SMALL["vae"])[0]
    words = ["evaluate", f"run={run}", "metrics.events=8", "metrics.throughput=2"]
    alone = {seed: scores(run, "metrics.events=8", "metrics.n=64", f"seed={seed}") for seed in (0, 1, 2)}
    for path in (run / "results").iterdir():
        path.unlink()
    environment = {**os.environ, "PYTHONPATH": str(Path(genzoo_package.__file__).parent.parent)}
    jobs = [
        Child(
            [sys.executable, "-m", "genzoo", *words, "metrics.n=64", f"seed={seed}", "metrics.num_samples=4"],
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        for seed in (0, 1, 2)
    ]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    found = [json.loads(path.read_text())["metrics"] for path in (run / "results").iterdir()]
    assert len(found) == 3
    for metrics in found:
        seed = metrics["train/fd_digits"]["card"]["setting"]["seed"]
        assert metrics["train/fd_digits"]["value"] == pytest.approx(alone[seed]["train/fd_digits"]["value"], rel=1e-6)
    assert all(line.endswith("}") for line in (run / "metrics.jsonl").read_text().splitlines())


def test_what_is_not_said_is_as_at_the_end_of_training(here):
    run = untrained(here, *SMALL["vae"], "metrics.n=64", "metrics.num_samples=7")[0]
    code, _, err = genzoo("evaluate", f"run={run}", "metrics.throughput=4", "metrics.events=8")
    assert (code, err) == (0, "")
    metrics = Run(run).result["metrics"]
    assert metrics["train/fd_digits"]["card"]["protocol"]["n_fake"] == 64
    assert metrics["test/bpd_upper"]["card"]["setting"]["num_samples"] == 7


def pictures(root: Path, x: torch.Tensor) -> Path:
    """Store grey bytes as a folder of pictures."""
    root.mkdir(parents=True)
    for i, image in enumerate(x):
        Image.fromarray(image[0].numpy()).save(root / f"{i}.png")
    return root


FOLDER = ["data=folder", "data.size=8", "data.channels=1", "metrics.features=digits"]


def test_a_split_of_two_pictures_is_compared_by_what_two_can_say(here):
    pictures(here / "few", stored(digits().train.x, 17)[:40])
    path = drawn(here / "made.npz", stored(digits().test.x[:70], 17))
    words = [f"samples={path}", *FOLDER, f"data.root={here / 'few'}", "data.test_fraction=0.06", "data.validation=0"]
    code, out, err = genzoo("evaluate", *words)
    assert (code, out) == (2, "") and "train (3" in err and "test (" in err and "dimension 64" in err
    code, _, err = genzoo("evaluate", *words, "metrics.force=true")
    assert code == 0, err
    found = json.loads((here / "made.scores.json").read_text())["metrics"]
    assert found["train/fd_digits"]["value"] > 0 and found["test/fd_digits"]["value"] > 0
    n = found["test/fd_digits"]["card"]["protocol"]["n_real"]
    assert ("test/precision_digits" in found) == (n > 5) and "train/precision_digits" in found
    for split, size in (("train", 40 - n), ("test", n)):
        assert found[f"{split}/fd_digits"]["card"]["protocol"]["forced"] == f"{size} real of 64 features"
        assert f"{split}/fd_digits_infinity" not in found


def test_two_folders_have_a_plain_distance(here):
    """The Frechet distance of all pictures of one from all of the other, as other programs give it."""
    a = pictures(here / "a", (of_a := stored(digits().train.x[:300], 17)))
    b = pictures(here / "b", (of_b := stored(digits().train.x[300:500], 17)))
    (b / "notes.txt").touch()
    code, _, err = genzoo("evaluate", f"samples={a}", *FOLDER, f"data.root={b}", f"out={here / 'x.json'}")
    assert code == 0 and "200 images, no classes; no test split; 1 file skipped: 1 .txt" in err
    assert f"samples={a}: 300 images, no file skipped" in err
    found = json.loads((here / "x.json").read_text())["metrics"]
    fake, real = (Embedded("digits").extract(x).features for x in (of_a, of_b))
    assert found["all/fd_digits"]["value"] == pytest.approx(frechet_distance(moments(fake), moments(real)), rel=1e-6)
    protocol = found["all/fd_digits"]["card"]["protocol"]
    assert (protocol["reference"], protocol["n_fake"], protocol["n_real"]) == ("folder/all", 300, 200)
    assert {name.partition("/")[0] for name in found} == {"all"}
    # With a fraction for a test split there is one, and where folders are splits they are compared with one by one.
    words = [f"samples={a}", *FOLDER, f"data.root={b}", "metrics.force=true", f"out={here / 'x.json'}"]
    assert genzoo("evaluate", *words, "data.test_fraction=0.5", "data.validation=0").code == 0
    found = json.loads((here / "x.json").read_text())["metrics"]
    sizes = [found[f"{split}/fd_digits"]["card"]["protocol"]["n_real"] for split in ("train", "test")]
    assert sum(sizes) == 200 and min(sizes) > 70 and "memorisation/copied" in found


def test_a_small_split_beside_a_large_one_is_left_out_by_name(here):
    pictures(here / "b" / "train", stored(digits().train.x[:100], 17))
    pictures(here / "b" / "test", stored(digits().test.x[:63], 17))
    path = drawn(here / "made.npz", stored(digits().test.x[:70], 17))
    code, out, _ = genzoo("evaluate", f"samples={path}", *FOLDER, f"data.root={here / 'b'}")
    found = json.loads((here / "made.scores.json").read_text())
    assert code == 0 and "test (63 real images)" in found["warnings"][0] and "warning: data: test (63" in out
    assert "train/fd_digits" in found["metrics"] and "test/fd_digits" not in found["metrics"]
    assert "test/kd_digits" in found["metrics"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda k: k, "0..16, those of the data in 0..255: bytes of 0..255 are expected, the 17 levels"),
        (lambda k: k // 9, "0..1, those of the data in 0..255"),
        (lambda k: 0 * k + 9, "all their values are 9"),
        (lambda k: (k > 12) + 254 * (k < 4), "no values but 0, 1, 254"),
    ],
    ids=["levels", "floats of [0, 1]", "one value", "floats of [-1, 1]"],
)
def test_a_range_that_cannot_be_right_is_refused_and_marked_by_force(here, made, said):
    path = drawn(here / "odd.npz", made(digits().test.x[:70].int()).to(torch.uint8))
    code, out, err = genzoo("evaluate", f"samples={path}", "data=digits")
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err and "metrics.force=true" in err
    code, out, err = genzoo("evaluate", f"samples={path}", "data=digits", "metrics.force=true")
    found = json.loads((here / "odd.scores.json").read_text())
    assert code == 0 and said in err and said in out.replace("\n", " ") and said in found["warnings"][0]
    assert all(said in m["card"]["setting"]["range"] for m in found["metrics"].values())


def test_an_npy_file_is_read_like_an_npz_file(here):
    law, x = Moons().sample(70, torch.Generator().manual_seed(1)).numpy(), stored(digits().test.x[:70], 17)
    for array, shape, levels in (
        (law, (2,), None),
        (x.permute(0, 2, 3, 1).numpy(), (1, 8, 8), 17),
        (x[:, 0].numpy(), (1, 8, 8), 17),
    ):
        np.save(here / "a.npy", array)
        np.savez(here / "b.npz", samples=array)
        made, same = (read_samples(here / name, shape, levels) for name in ("a.npy", "b.npz"))
        assert torch.equal(made, same) and made.shape == (70, *shape)
    for content in ((here / "a.npy").read_bytes()[:-1], b"\x93NUMPY", b"", b"text"):
        (here / "odd.npy").write_bytes(content)
        code, out, err = genzoo("evaluate", f"samples={here / 'odd.npy'}", "data=digits")
        assert (code, out, err.count("\n")) == (2, "", 1) and "odd.npy: not an .npz or .npy file of plain arrays" in err
        assert "context" not in err


def test_data_that_have_changed_since_the_training_are_said(here):
    for side, x in (("train", digits().train.x[:80]), ("test", digits().test.x[:9])):
        pictures(here / "b" / side, stored(x, 17))
    words = [*FOLDER[:3], f"data.root={here / 'b'}", "data.validation=0"]
    run = untrained(here, *SMALL["vae"], *words)[0]
    Run(run).update_status(data_sha256=build(composed(*words)["data"]["source"], "data").sha256)
    code, _, err = genzoo("evaluate", f"run={run}", *FAST)
    assert code == 0 and "80 training and 9 test images" in err and "have changed" not in err
    (here / "b/test/8.png").rename(here / "b/train/80.png")
    code, _, err = genzoo("evaluate", f"run={run}", *FAST)
    assert code == 0 and "warning" in err and "have changed" in err


@pytest.mark.parametrize("features", ["identity", "null"])
def test_samples_without_neighbours_are_refused_before_anything_is_drawn(here, features):
    run = untrained(here, "model=realnvp", "data=moons", "model.couplings=2")[0]
    code, _, err = genzoo("evaluate", f"run={run}", "metrics.n=5", f"metrics.features={features}", "metrics.force=true")
    assert code == 2 and err == "genzoo: metrics.n=5: at least 6 samples are needed (0 skips sample metrics)\n"


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("batch, said", [(1.5, True), (0.0, False)])
def test_a_scoring_that_takes_longer_than_training_is_announced_with_what_shortens_it(
    batch, said, held_out, monkeypatch, capsys
):
    """A batch of n samples takes ``batch`` seconds times 1 + n/10, by a set clock: 36 batches of 16 and 564 samples.

    Held-out captions are 500 samples more.
    """
    model, now = build(described(*SMALL["ddpm"])["model"], "model").eval(), [0.0]
    draw = model.sample

    def sample(n, *arguments, **keywords):
        now[0] += batch * (1 + n / 10)
        return draw(2, None)

    monkeypatch.setattr(model, "sample", sample)
    monkeypatch.setattr(model, "log_prob", lambda *_, **__: None)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    data = types.SimpleNamespace(scored=("test", Split(torch.zeros(40, 1, 8, 8, dtype=torch.uint8), None)))
    monkeypatch.setattr(cost, "scores_held_out", lambda *_: held_out)
    settings = EvalSettings(n=500, throughput=64, events=20, num_samples=1, batch_size=16)
    expected = cost.estimate(model, data, settings)
    drawn, batches = (1064, 67) if held_out else (564, 36)
    assert (expected.samples, expected.density) == pytest.approx((batch * (batches + drawn / 10), 0.0))
    cost.announce(expected, 15.0)
    err, seconds = capsys.readouterr().err, 260 if held_out else 139
    assert (
        f"scoring will take about {seconds} s ({drawn:,} samples {seconds} s), after 15 s of training" in err
    ) == said
    assert all((word in err) == said for word in ("metrics.n=", "metrics.events=", "sampler.steps="))


@pytest.mark.parametrize("cause", ["Read-only file system", "No space left on device"])
def test_scores_that_cannot_be_kept_are_shown_first(here, monkeypatch, cause):
    path, *_ = untrained(here, *SMALL["vae"])
    number = {"Read-only file system": errno.EROFS, "No space left on device": errno.ENOSPC}[cause]

    def write(run, result):
        with storing(run.path / "results"):
            raise OSError(number, cause, str(run.path / "results"))

    monkeypatch.setattr(Run, "write_result", write)
    code, out, err = genzoo("evaluate", f"run={path}", "metrics.n=0", "metrics.events=16")
    assert code == 4 and "test/bpd_upper" in out and "run: " not in out
    assert err.splitlines()[-1].startswith("genzoo: ") and "the scores were not saved" in err and cause in err


def test_a_place_for_scores_is_tried_before_anything_is_scored(here, monkeypatch):
    samples = drawn(here / "samples.npz", torch.zeros(8, 1, 8, 8, dtype=torch.uint8))
    (here / "file").write_text("no folder")
    for out, said in (("file/x.json", "there is no directory file"), (".", "is a folder")):
        code, _, err = genzoo("evaluate", f"samples={samples}", "data=digits", f"out={out}")
        assert code == 2 and said in err
    monkeypatch.setattr(runs.files.tempfile, "TemporaryFile", mock.Mock(side_effect=OSError(errno.EROFS, "Read-only")))
    for words in (["evaluate", f"samples={samples}", "data=digits"], ["compare", "runs=nowhere", "out=there"]):
        code, out, err = genzoo(*words)
        assert (code, out) == (2, "") and err.startswith("genzoo: out=") and "cannot be written to: Read-only" in err


SCORES = ["metrics.n=0", "metrics.events=16", "metrics.num_samples=4", "metrics.throughput=2"]


def test_rows_that_were_trained_or_scored_on_other_splits_are_in_other_tables(here):
    with_it = trained(*SMALL["realnvp"])
    without = trained(*SMALL["realnvp"], "data.validation=0")
    assert genzoo("evaluate", f"run={with_it}", "metrics.split=validation", *SCORES).code == 0
    code, _, err = genzoo("evaluate", f"run={without}", "metrics.split=validation", *SCORES)
    assert code == 2 and "train with data.validation=0.1" in err
    found = tables_of(here / "outputs")
    runs = {frozenset(record.path.name for row in table.rows for record, _ in row.runs) for table in found}
    assert runs == {frozenset([with_it.name]), frozenset([without.name])}
    for table in found:
        for name in ("test/bpd", "validation/bpd"):
            assert sum(name in row.cells for row in table.rows) <= 1
