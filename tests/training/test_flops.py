"""Operations, counted by hand."""

from __future__ import annotations

import copy
import functools
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genzoo.config.instantiate import build
from genzoo.data.dataset import Split
from genzoo.data.loader import Batches
from genzoo.event import EventSpec
from genzoo.model import Adversarial, GenerativeModel, Loss
from genzoo.numerics.random import generator
from genzoo.training import flops
from genzoo.training.budget import Budget
from genzoo.training.flops import count, fake_weights
from genzoo.training.module import GenerativeModule
from tests.commands import described
from tests.test_interface import SIZES, cases, shrunk
from tests.toys import Jittered, Toy


@pytest.mark.parametrize("autocast", [False, True])
def test_matrices_and_convolutions_are_counted_by_hand(autocast):
    batch, width, side = 4, 8, 16
    linear, convolution = nn.Linear(width, width), nn.Conv2d(width, width, 3, padding=1)
    x, image = torch.randn(batch, width), torch.randn(batch, width, side, side, requires_grad=True)

    def work():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            linear(x).sum().backward()
            convolution(image).sum().backward()

    by_linear = 2 * 2 * batch * width * width  # forward, and the gradient of the weights alone
    by_convolution = 3 * 2 * batch * width * width * 9 * side * side
    assert count(work) == by_linear + by_convolution


def test_attention_is_counted_as_its_two_products():
    q = torch.randn(2, 3, 16, 8)
    with torch.no_grad():
        found = count(lambda: F.scaled_dot_product_attention(q, q, q))
    assert found == 2 * (2 * 2 * 3 * 16 * 16 * 8)
    q.requires_grad_()
    both = count(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())
    assert both == found + 5 * found // 2  # the products anew, and the gradients of two of them


def test_second_derivatives_are_counted():
    layer = nn.Linear(4, 1, bias=False)
    x = torch.randn(3, 4, requires_grad=True)

    def work():
        (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()

    assert count(work) > 2 * 3 * 4 * 3


# A step that is counted and not computed


def module_of(model: GenerativeModel) -> GenerativeModule:
    x = torch.randn(16, *model.shape, generator=generator("data"))
    if model.levels is not None:
        x = (x.sigmoid() * model.levels).to(torch.uint8)
    y = torch.arange(16) % model.condition.n if model.condition else None
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    module = GenerativeModule(model.train(), adam, Batches(Split(x, y), 8, seed=0), Budget(images=800))
    module.make_plan()
    return module


def by_computing(module: GenerativeModule, stage: str, turn: str | None, monkeypatch) -> int:
    """Count a step that is computed on a copy of the model."""

    def refuse(_: nn.Module) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(flops, "fake_weights", refuse)
        return module._count(stage, turn)


def by_shapes(module: GenerativeModule, stage: str, turn: str | None, monkeypatch) -> int:
    """Count a step whose weights have shapes alone; no weight of a second model is held, and nothing is computed instead."""
    deepcopy = copy.deepcopy

    def copied(*arguments: Any) -> Any:
        made = deepcopy(*arguments)
        if isinstance(made, nn.Module):
            assert all(isinstance(p, flops.FakeTensor) for p in made.parameters())
        return made

    with monkeypatch.context() as patch:
        patch.setattr(copy, "deepcopy", copied)
        return module._count(stage, turn)


def check(model: GenerativeModel, monkeypatch) -> None:
    """Both ways find the same for every turn of every stage, and leave no trace."""
    module = module_of(model)
    before = copy.deepcopy(model.state_dict())
    for stage in module.stages:
        for turn in stage.module.networks() if isinstance(stage.module, Adversarial) else [None]:
            random = torch.get_rng_state()
            found = by_shapes(module, stage.name, turn, monkeypatch)
            assert torch.equal(random, torch.get_rng_state())
            assert found == by_computing(module, stage.name, turn, monkeypatch) > 0, (stage.name, turn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())


# With classes on the plane, without on images.
FAMILIES = {
    name: case
    for name, (case, model) in cases().items()
    if not isinstance(model, ValueError) and case.conditional == (case.kind == "plane")
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_counted_by_shapes_as_by_computing(name, monkeypatch):
    check(FAMILIES[name].model(), monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        "model=ddpm model.objective=vlb model.importance=true data.conditional=true",
        "model=ddpm model.objective=hybrid model.variance=learned",
        "model=flow_matching model.pairing=optimal_transport",
    ],
)
def test_losses_that_look_at_values_are_counted_by_shapes_too(words, monkeypatch):
    with torch.random.fork_rng(devices=[]):
        model = build(shrunk(described("data=digits", *words.split())["model"], SIZES["image"]), "model")
    check(model, monkeypatch)


class Looking(Toy):
    """A loss that decides by a value of its weights, as no shape can."""

    def __init__(self) -> None:
        super().__init__(EventSpec((2,)))
        self.map = nn.Linear(2, 2)

    def _loss(self, x, y, rng) -> Loss:
        h = self.map(x)
        if float(h.detach().square().mean()) >= 0:
            h = self.map(h)
        return Loss(h.square().mean(), {})


def test_a_loss_that_decides_by_its_weights_is_computed_to_be_counted():
    module = module_of(Looking())
    product = 2 * 8 * 2 * 2  # of the layer, twice, with gradients of its weights and between the two
    assert module._count("train", None) == 5 * product


def test_whatever_depends_on_weights_has_a_shape_alone_and_the_rest_is_computed():
    with fake_weights(nn.Linear(3, 4)) as layer:
        x = torch.arange(6.0).reshape(2, 3)
        assert float(x.sum()) == 15 and type(x) is torch.Tensor
        assert isinstance(layer(x), flops.FakeTensor) and layer(x).shape == (2, 4)
        layer(x).sum().backward()
        assert isinstance(layer.weight.grad, flops.FakeTensor)


def test_counting_is_no_part_of_the_seconds(monkeypatch):
    module = module_of(Jittered())
    monkeypatch.setattr(module, "_count", lambda *_: time.sleep(0.5) or 7)
    module.training_step((0, 2), 0)
    assert module.progress.flops == 14 and module.progress.train_seconds < 0.4 and module.clock.seconds < 0.4
