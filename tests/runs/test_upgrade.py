"""What the release of schema 1 wrote is read in the words of this one: configurations, weights and the order of parameters.

``tests/fixtures/models-of-schema-1.json`` has a model of every family of that release, on images and on points, with and
without classes: its configuration, and the name and shape of every weight in the order of its state. It was written by that
release and is never written again.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from genzoo.conditions import ClassLabels
from genzoo.config.check import check
from genzoo.config.instantiate import build
from genzoo.event import EventSpec
from genzoo.model import GenerativeModel
from genzoo.runs import Run
from genzoo.runs.upgrade import upgraded, upgraded_names
from genzoo.training.ema import ema_decay
from genzoo.training.state_checks import check_weights, upgraded_weights

MODELS = json.loads((Path(__file__).parents[1] / "fixtures" / "models-of-schema-1.json").read_text())
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RUNS = sorted(path.parent for path in EXPERIMENTS.glob("*/runs/**/config.yaml"))
GONE = ("initialized", "known")  # flags that a first batch was seen, which follow from the number of the step


@pytest.fixture(params=MODELS, ids=lambda old: f"{old['words']} {old['classes']}")
def old(request) -> dict:
    return copy.deepcopy(request.param)


def test_every_weight_of_an_old_run_has_its_place(old):
    before = copy.deepcopy(old["model"])
    config = upgraded({"model": old["model"], "data": {}})
    model = build(config["model"], "model", trusted=False)
    assert old["model"] == before, "what was read is not changed"
    assert config["data"] == ({"conditional": True} if old["classes"] else {})
    image = "data=digits" in old["words"]
    assert model.event == (EventSpec((1, 8, 8), 17) if image else EventSpec((2,)))
    assert model.condition == (ClassLabels(old["classes"]) if old["classes"] else None)

    own = model.state_dict()
    names = upgraded_names(old["weights"], own)
    kept = {new: old["weights"][name] for name, new in names.items() if new is not None}
    shapes = {name: list(tensor.shape) for name, tensor in own.items()}
    # Causal networks had no embedding of the null value.
    lacking = {name for name, shape in shapes.items() if name.endswith("embed_y.weight") and kept[name] != shape}
    assert not lacking or any(
        kind in str(old["words"]) for kind in ("autoregressive", "vqvae", "pixelcnn", "transformer")
    )
    assert {**kept, **{name: [kept[name][0] + 1, *kept[name][1:]] for name in lacking}} == shapes
    assert all(name.rpartition(".")[2] in GONE for name, new in names.items() if new is None)
    found = {name: torch.rand(shape).to(own[new].dtype) if (new := names[name]) else torch.tensor(True)
             for name, shape in old["weights"].items()}  # fmt: skip
    weights = upgraded_weights(found, own)
    for name, new in names.items():
        if new in lacking:
            assert torch.equal(weights[new][:-1], found[name]) and not weights[new][-1].any()
        else:
            assert new is None or weights[new] is found[name]
    assert len(weights) == len(own)


def test_optimisers_meet_the_parameters_in_the_order_of_the_old_run(old):
    """The state of an optimiser has no names: it belongs to the parameters by their order."""
    model = build(upgraded({"model": old["model"]})["model"], "model", trusted=False)
    names = upgraded_names(old["weights"], model.state_dict())
    parameters = [name for name, _ in model.named_parameters()]
    assert [new for new in names.values() if new in set(parameters)] == parameters


def test_what_is_of_this_release_stays_as_it_is(old):
    new = upgraded({"model": old["model"], "data": {}})
    assert upgraded(new) == new
    own = build(new["model"], "model", trusted=False).state_dict()
    assert upgraded_names(own, own) == {name: name for name in own}
    check_weights(upgraded_weights(own, own), own)


@pytest.mark.skipif(not EXPERIMENTS.is_dir(), reason="a source distribution has no experiments")
def test_runs_that_were_published_are_read():
    assert len(RUNS) > 50
    for path in RUNS:
        config = check("train", Run(path).config)
        assert isinstance(build(config["model"], "model", trusted=False), GenerativeModel), path


@pytest.mark.parametrize("decay, half_life", [(0.9999, 887_184.03), (0.0, None), (0.5, 128.0)])
def test_a_decay_of_averages_is_read_as_the_half_life_in_images_that_has_it(decay, half_life):
    trainer = upgraded({"trainer": {"batch_size": 128, "ema": decay, "clip": 1.0}})["trainer"]
    assert trainer.pop("ema_half_life") == (half_life and pytest.approx(half_life, rel=1e-6))
    assert trainer == {"batch_size": 128, "clip": 1.0}
    assert ema_decay(half_life, 128) == pytest.approx(decay, rel=1e-8)
