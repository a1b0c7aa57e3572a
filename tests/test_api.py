"""The library's functions: arguments that cannot be right are refused in one line, and none is passed over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import genzoo
from genzoo.api import _budget_overrides
from genzoo.conditions import ClassLabels
from genzoo.families.vae import VAE


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Any:
    """A run on vectors of three classes."""
    x = np.random.default_rng(0).normal(size=(200, 2)).astype("float32")
    quiet = ["metrics.n=0", "trainer.grids=0", "optimizer.lr=1e-3"]
    outputs = tmp_path_factory.mktemp("runs")
    y = np.arange(200) % 3
    return genzoo.train("vae", x, y=y, conditional=True, budget={"images": 64}, outputs=outputs, overrides=quiet)


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$")


def test_a_run_is_not_scored_on_other_data_than_its_own(run):
    for other in ({"data": np.zeros((50, 2))}, {"y": np.zeros(50, int)}):
        with refused("its own data"):
            genzoo.evaluate(run, n=0, **other)


def test_a_conditional_model_is_not_scored_on_data_without_conditions():
    with refused("y: the model has the condition ClassLabels"):
        genzoo.evaluate(VAE((2,), ClassLabels(3)), np.random.default_rng(0).normal(size=(100, 2)), n=0)


def test_a_model_of_images_is_scored_on_a_folder_in_its_own_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    scores = genzoo.evaluate(VAE((1, 8, 8), levels=256), tmp_path, n=0)
    assert scores["test/bpd_upper"]["value"] > 0


def test_every_example_of_an_array_is_scored():
    model = genzoo.RealNVP((2,)).eval()
    x = np.random.default_rng(0).normal(size=(300, 2)).astype("float32")
    found = genzoo.evaluate(model, x, n=20, force=True)
    card = found["test/nll"]["card"]["protocol"]
    assert (card["n"], card["split"]) == (300, "all")
    expected = -model.log_prob(torch.from_numpy(x)).value.double().mean()
    assert found["test/nll"]["value"] == pytest.approx(float(expected), rel=1e-5)
    assert found["all/sliced_wasserstein"]["card"]["protocol"]["n_real"] == 300
    assert not [name for name in found if name.startswith("memorisation")]


def test_no_samples_are_none():
    assert genzoo.sample(VAE((2,)), 0).shape == (0, 2)


def test_conditions_may_be_arrays(run):
    expected = genzoo.sample(run, 3, y=torch.tensor([0, 1, 2]))
    for y in ([0, 1, 2], np.array([0, 1, 2], np.int32)):
        assert torch.equal(genzoo.sample(run, 3, y=y), expected)


def test_a_run_is_loaded_by_itself(run):
    assert genzoo.load(run).event == genzoo.load(run.path).event


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": -1}, "n=-1"),
        ({"n": 2, "batch_size": 0}, "batch_size=0"),
        ({"n": 2, "y": 1}, "no conditions for 2"),
        ({"n": 2, "label": -1}, "label=-1: classes are 0..2"),
        ({"n": 2, "label": True}, "label=True: classes are 0..2"),
        ({"n": 2, "device": "gpu"}, "device=gpu: choose from auto, cpu, cuda"),
        ({"n": 2, "sampler": "heun"}, "sampler=heun: a configuration"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused(run, arguments, message):
    with refused(message):
        genzoo.sample(run, **arguments)


def test_one_run_is_compared_and_none_are_refused(run, tmp_path):
    assert genzoo.compare(run, tmp_path / "one").is_file()
    assert genzoo.compare(run.path.parent, tmp_path / "folder").is_file()
    with refused("there are none"):
        genzoo.compare([], tmp_path / "none")
    with refused("VAE is no run directory"):
        genzoo.compare([VAE((2,))], tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("budget", [300, {"images": "300"}, {"images": None}, {"images": True}])
def test_a_budget_is_a_name_or_numbers(budget):
    with refused("budget"):
        genzoo.train("vae", "digits", budget=budget)


def test_a_limit_is_not_rounded():
    assert _budget_overrides({"seconds": 1234567.5, "flops": 1e15}) == [
        "budget.seconds=1234567.5",
        f"budget.flops={10**15}",
    ]


def test_conditions_that_are_given_condition_the_model_unless_said_otherwise(tmp_path):
    x = np.random.default_rng(0).normal(size=(120, 3)).astype(np.float32)
    y = np.arange(120) % 3
    words = ["trainer.threads=1", "metrics.n=0", "metrics.events=4", "model.couplings=1", "model.network.width=4"]
    for conditional, expected in ((None, ClassLabels(3)), (False, None)):
        run = genzoo.train(
            "realnvp", x, y=y, conditional=conditional, budget={"images": 64}, outputs=tmp_path, overrides=words
        )
        assert genzoo.load(run.path).condition == expected


def test_odd_arguments_are_refused_in_one_line(run):
    model = genzoo.DDPM((1, 8, 8), levels=17)
    for work, problem in (
        (lambda: genzoo.sample(run, 2.5), "n=2.5"),
        (lambda: genzoo.sample(run, True), "n=True"),
        (lambda: genzoo.sample(run, 2, seed=None), "seed=None"),
        (lambda: genzoo.sample(run, 2, label=3.5), "label=3.5"),
        (lambda: genzoo.sample(run, 2, guidance={"scale": 2}), "_target_"),
        (lambda: genzoo.sample(model, 2, guidance="strong"), "guidance='strong'"),
        (lambda: genzoo.sample(model, 2, label=0), "no classes"),
    ):
        with refused(problem):
            work()
    assert torch.equal(genzoo.sample(run, 2, label=np.int64(1)), genzoo.sample(run, 2, label=1))
    assert torch.equal(genzoo.sample(run, 1, label=torch.tensor([1, 2])), genzoo.sample(run, 1, label=[1, 2]))
