"""The averages of the weights against their recursion, unrolled by hand in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from genzoo.training.ema import EMA, ema_decay


def unrolled(weights: list[float], decay: float) -> float:
    """The average after all updates as one weighted sum of the weights: (1 - d_n) prod of the later d."""
    decays = [0.0] + [min(decay, (1 + n) / (10 + n)) for n in range(1, len(weights))]
    total, later = 0.0, 1.0
    for w, d in zip(reversed(weights), reversed(decays), strict=True):
        total, later = total + (1 - d) * later * w, later * d
    return total


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_the_average_is_its_recursion_with_warm_up(decay):
    model = nn.Linear(1, 1).double()
    ema = EMA(model, decay)
    ema.watch("model", model)
    seen = []
    for value in torch.randn(40, dtype=torch.float64).tolist():
        seen.append(value)
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update("model")
        assert float(ema.model.weight) == pytest.approx(unrolled(seen, decay), abs=1e-12)
    assert ema.updates == {"model": 40}


def test_without_decay_the_average_is_the_model():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.0)
    ema.watch("model", model)
    for _ in range(3):
        nn.init.normal_(model.weight)
        ema.update("model")
        assert torch.equal(ema.model.weight, model.weight)


def test_buffers_are_copied_and_not_averaged():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, 0.999)
    ema.watch("model", model)
    for _ in range(5):
        model(torch.randn(8, 2) + 3)
        ema.update("model")
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert int(ema.model[1].num_batches_tracked) == 5


def test_each_part_counts_its_own_updates():
    model = nn.ModuleDict({"critic": nn.Linear(1, 1, bias=False), "generator": nn.Linear(1, 1, bias=False)})
    ema = EMA(model, 0.9999)
    for name, part in model.items():
        ema.watch(name, part)
    history: dict[str, list[float]] = {"critic": [], "generator": []}
    for step in range(24):
        name = "generator" if step % 6 == 5 else "critic"
        nn.init.normal_(model[name].weight)
        history[name].append(model[name].weight.item())
        ema.update(name)
    assert ema.updates == {"critic": 20, "generator": 4}
    for name, weights in history.items():
        assert ema.model[name].weight.item() == pytest.approx(unrolled(weights, 0.9999), abs=1e-6)


def test_an_update_of_one_part_leaves_the_others_and_the_model_alone():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    ema = EMA(model, 0.5)
    ema.watch("a", model["a"])
    ema.watch("b", model["b"])
    before = copy.deepcopy(ema.model.state_dict())
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    ema.update("a")
    assert torch.equal(ema.model["b"].weight, before["b.weight"])
    assert not torch.equal(ema.model["a"].weight, before["a.weight"])
    assert all(bool((p == 1).all()) for p in model.parameters())


def test_frozen_weights_stay_and_the_average_needs_no_gradient():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).train()
    model[0].requires_grad_(False)
    ema = EMA(model, 0.5)
    ema.watch("model", model)
    ema.update("model")
    assert torch.equal(ema.model[0].weight, model[0].weight)
    assert not ema.model.training and model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_outside_zero_to_one_is_refused(decay):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), not"):
        EMA(nn.Linear(1, 1), decay)


@pytest.mark.parametrize("batch_size", [1, 16, 128])
def test_after_one_half_life_in_images_a_weight_counts_half_whatever_the_batch(batch_size):
    half_life = 1280
    model = nn.Linear(1, 1, bias=False).double()
    ema = EMA(model, ema_decay(half_life, batch_size))
    ema.watch("model", model)
    ema.updates["model"] = 10**6  # long after the warm-up
    with torch.no_grad():
        ema.model.weight.fill_(1.0)
        model.weight.zero_()
    for _ in range(half_life // batch_size):
        ema.update("model")
    assert float(ema.model.weight) == pytest.approx(0.5, rel=1e-9)


def test_no_half_life_is_no_average_and_one_that_is_not_positive_is_refused():
    assert ema_decay(None, 64) == 0.0
    for half_life in (0, -1.0):
        with pytest.raises(ValueError, match="half-life of an average must be positive"):
            ema_decay(half_life, 64)
