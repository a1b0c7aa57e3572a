"""The optimiser Muon: its two parts are torch's, and a run with it resumes to the same bits."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from genzoo.runs import Run
from genzoo.training import checkpoints
from genzoo.training.muon import Muon
from genzoo.training.precision import step_unless
from genzoo.training.state_checks import check_optimizer_state
from tests.commands import TINY, genzoo


def network() -> nn.Module:
    torch.manual_seed(0)
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        depthwise,
        nn.ConvTranspose2d(4, 2, 1),
        nn.Flatten(),
        nn.Linear(8, 6),
        nn.GELU(),
        nn.Linear(6, 3),
    )


def is_matrix(p: torch.Tensor) -> bool:
    return p.ndim == 2 or tuple(p.shape) == (4, 2, 1, 1)


def trained(module: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 4, flat=()) -> list[torch.Tensor]:
    matrices = [p for p in module.parameters() if is_matrix(p)]
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        module(torch.randn(8, 1, 4, 4, generator=rng)).square().mean().backward()
        for p, view in zip(matrices, flat, strict=False):
            view.grad = p.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
        module.zero_grad()
    return list(module.parameters())


def test_matrices_are_those_of_torchs_muon_and_the_rest_those_of_adam():
    ours, theirs = network(), network()
    flat = [nn.Parameter(p.detach().flatten(1)) for p in theirs.parameters() if is_matrix(p)]  # on the same memory
    others = [p for p in theirs.parameters() if not is_matrix(p)]
    assert len(flat) == 3 and len(others) == 7
    separate = [
        torch.optim.Adam(others, lr=3e-3, betas=(0.8, 0.9), fused=True),
        torch.optim.Muon(flat, lr=0.03, momentum=0.9, weight_decay=0.1),
    ]
    one = Muon(ours.parameters(), lr=3e-3, matrix_lr=0.03, momentum=0.9, betas=(0.8, 0.9), weight_decay=0.1)
    assert [group["lr"] for group in one.param_groups] == [3e-3, 0.03]
    for a, b in zip(trained(ours, [one]), trained(theirs, separate, flat=flat), strict=True):
        assert torch.equal(a, b)


def test_a_first_step_has_singular_values_of_about_the_learning_rate():
    """O(g) = U V^T up to the accuracy of five Newton-Schulz steps, which is within 0.65 and 1.25; sqrt(A/B) = 2."""
    weight = nn.Parameter(torch.zeros(32, 8))
    weight.grad = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 8)
    Muon([weight], matrix_lr=0.5).step()
    values = torch.linalg.svdvals(weight.detach())
    assert (values > 0.65).all() and (values < 1.25).all()
    left, _, right = torch.linalg.svd(-weight.grad, full_matrices=False)
    cosine = (weight.detach() * (left @ right)).sum() / (weight.detach().norm() * math.sqrt(8))
    assert cosine > 0.97


@pytest.mark.parametrize("keep", [0, 1])
def test_weights_of_one_kind_alone_are_optimised(keep):
    weights = [p for p in network().parameters() if is_matrix(p) == bool(keep)]
    for p in weights:
        p.grad = torch.ones_like(p)
    before = [p.clone() for p in weights]
    optimizer = Muon(weights)
    optimizer.step()
    assert len(optimizer.param_groups) == 1 and all((a != b).any() for a, b in zip(before, weights, strict=True))


def test_a_state_that_is_loaded_continues_to_the_same_bits():
    straight, resumed = network(), network()
    optimizer, first = Muon(straight.parameters()), Muon(resumed.parameters())
    for _ in range(2):
        trained(straight, [optimizer])
    trained(resumed, [first])
    saved, second = copy.deepcopy(first.state_dict()), Muon(resumed.parameters(), lr=0.5)
    second.load_state_dict(check_optimizer_state(saved, Muon(resumed.parameters()), Muon, "optimizers[0]"))
    assert [group["lr"] for group in second.param_groups] == [1e-3, 0.02]
    trained(resumed, [second])
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [False, True])
def test_a_step_that_is_not_finite_leaves_all_weights(bad):
    module = network()
    optimizer = Muon(module.parameters())
    trained(module, [optimizer], 1)
    before = [p.clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.full_like(p, float("nan") if bad else 1.0)
    step_unless(torch.tensor(bad), optimizer)
    after = list(module.parameters())
    assert all(p.isfinite().all() for p in after)
    assert all(torch.equal(a, b) == bad for a, b in zip(before, after, strict=True))


def test_each_group_has_its_own_learning_rate_along_the_schedule(tmp_path):
    code, out, err = genzoo(
        "model=vae", "data=moons", *TINY, "optimizer=muon", "trainer.grids=0", f"outputs={tmp_path}"
    )
    assert code == 0, err
    run = Path(out.rpartition("run: ")[2].strip())
    groups = checkpoints.load(checkpoints.latest(run)).state["optimizers"][0]["param_groups"]
    lr = Run(run).config["optimizer"]["lr"]
    assert groups[1]["lr"] / groups[0]["lr"] == pytest.approx(0.02 / lr) and groups[0]["lr"] < lr


@pytest.mark.parametrize("words, message", [(["optimizer.matrix_lr=-1"], "-1"), (["optimizer.momentum=-1"], "-1")])
def test_settings_that_are_wrong_are_answered_in_one_line(tmp_path, words, message):
    code, _, err = genzoo("model=vae", "data=moons", *TINY, "optimizer=muon", *words, f"outputs={tmp_path}")
    assert code == 2 and err.count("\n") == 1 and message in err and "optimizer" in err
