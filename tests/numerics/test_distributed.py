"""Two processes that share a batch are one process with all of it, for every file under ``conf/model/``.

Every example has the noise and the mask of dropout that it has in one process, so that the mean of the ranks' gradients is
the gradient on the whole batch, the mean of the ranks' terms is the term, and what a turn leaves in the model, running
statistics, codebooks and first values that are taken from data, is alike on all ranks and that of the whole batch. All in
float64, where a wrong statistic cannot hide in rounding.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genzoo.families.flow_matching import CHUNK, ReflowPairs
from genzoo.model import GenerativeModel
from genzoo.nn.layers import BatchNorm2d, Dropout
from genzoo.numerics import distributed
from tests.children import Child
from tests.shares import TIMEOUT, examine
from tests.test_interface import DATA, Case, batch, cases
from tests.toys import Steep

RANKS = 2
SHARE = 5  # examples of a rank
TOLERANCE = 1e-10
# What a default configuration leaves out.
OPTIONS = {
    "ebm-joint-conditional": ("ebm", "image", "model.labels=joint"),
    "gan-resnet": ("gan", "image", "network@model.generator=resnet_generator_image",
                   "network@model.critic=resnet_critic_image", "model.loss=hinge"),
    "realnvp-batch_norm": ("realnvp", "image", "network@model.network=coupling_realnvp", "model.network.side=8",
                           "model.batch_norm=true"),
    "realnvp-points-batch_norm": ("realnvp", "plane", "model.batch_norm=true"),
    "vae-free_bits": ("vae", "image", "model.free_bits=0.25", "model.warmup=20"),
    "hvae-free_bits": ("hvae", "image", "model.free_bits=0.55", "model.warmup=20"),
    "flow_matching-transport": ("flow_matching", "image", "model.pairing=optimal_transport"),
    "flow_matching-transport-conditional": ("flow_matching", "plane", "model.pairing=optimal_transport"),
    "flow_matching-logit_normal": ("flow_matching", "plane", "noise_levels@model.noise_levels=logit_normal"),
    "score_sde-edm": ("score_sde", "image", "schedule@model.schedule=edm",
                      "noise_levels@model.noise_levels=log_normal"),
    "ddpm-dropout": ("ddpm", "image"),
    "score_sde-ncsnpp-dropout": ("score_sde", "image", "network@model.network=ncsnpp_image"),
    "autoregressive-dropout": ("autoregressive", "plane"),
    "autoregressive-pixelcnn-dropout": ("autoregressive", "image", "network@model.network=pixelcnn_image"),
    "noisy_classifier-conditional": ("noisy_classifier", "image"),
    "clip-conditional": ("clip", "image"),
    "noisy_clip-conditional": ("noisy_clip", "plane"),
    "ddpm-importance": ("ddpm", "image", "model.variance=learned", "model.objective=hybrid", "model.importance=true"),
}  # fmt: skip


def options() -> dict[str, Case]:
    """Name the configurations with options."""
    return {
        name: Case(family, kind, (*DATA[kind], *words), name == "gan-resnet" or name.endswith("conditional"))
        for name, (family, kind, *words) in OPTIONS.items()
    }


def drop(model: GenerativeModel, p: float = 0.3) -> GenerativeModel:
    """Turn on a network's dropout, which small models do without."""
    layers = [module for module in model.modules() if isinstance(module, Dropout)]
    assert layers, "this network has no dropout"
    for layer in layers:
        layer.p = p
    return model


def subjects() -> dict[str, GenerativeModel]:
    """List models of every family, on either kind of data, with and without classes and with their options."""
    chosen = {name: case for name, (case, model) in cases().items() if isinstance(model, GenerativeModel)}
    chosen |= options()
    models = {name: drop(case.model()) if name.endswith("dropout") else case.model() for name, case in chosen.items()}
    history = models["ddpm-importance"].history
    history.counts.fill_(history.LAST)  # so that losses decide over the times
    history.losses.uniform_(0.5, 2)
    pupil, teacher = (chosen["flow_matching-plane-conditional"].model().double() for _ in range(2))
    pupil.pairs = ReflowPairs(teacher, 2 * CHUNK + 60)  # of which a rank simulates one chunk, and the other two
    models["flow_matching-reflow"] = pupil
    return {name: model.train().double() for name, model in {**models, "penalty": Steep()}.items()}


NAMES = [*(name for name, (_, model) in cases().items() if isinstance(model, GenerativeModel)), *OPTIONS, "penalty"]
NAMES += ["flow_matching-reflow"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[list[dict[str, Any]]]]:
    """What one process finds on the whole batch, and each of several ranks on its share of it, by subject."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    given = {name: (model, *batch(model, RANKS * SHARE)) for name, model in subjects().items()}
    torch.save(given, folder / "models.pt")
    command = [sys.executable, "-m", "tests.shares", str(folder)]
    root = Path(__file__).resolve().parents[2]
    processes = [
        Child([*command, str(rank), str(RANKS)], cwd=root, stderr=subprocess.PIPE, text=True) for rank in range(RANKS)
    ]
    try:
        alone = {name: examine(*one) for name, one in given.items()}
        said = [process.communicate(timeout=2 * TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(said)
    shared = [torch.load(folder / f"rank_{rank}.pt") for rank in range(RANKS)]
    return {name: [alone[name], *(one[name] for one in shared)] for name in given}


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).double().mean(0)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_the_ranks_gradients_is_the_gradient_of_the_whole_batch(found, name):
    for whole, *shares in zip(*found[name], strict=True):
        largest = max(float(g.abs().max()) for g in whole["gradients"].values())
        assert largest > 0
        for key, gradient in whole["gradients"].items():
            together = mean([share["gradients"][key] for share in shares])
            assert float((together - gradient).abs().max()) <= TOLERANCE * largest, key


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_the_ranks_terms_is_the_term_of_the_whole_batch(found, name):
    for whole, *shares in zip(*found[name], strict=True):
        for key, term in whole["terms"].items():
            together = mean([share["terms"][key] for share in shares])
            rtol = TOLERANCE if term.dtype == torch.float64 else 1e-6
            said = f"{key}: {term} of the whole batch, {together} over ranks"
            torch.testing.assert_close(together, term.double(), rtol=rtol, atol=rtol, msg=said)


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_leaves_every_rank_what_it_leaves_one_process(found, name):
    for whole, *shares in zip(*found[name], strict=True):
        for key, value in whole["state"].items():
            assert all(torch.equal(share["state"][key], shares[0]["state"][key]) for share in shares), key
            torch.testing.assert_close(
                shares[0]["state"][key],
                value,
                rtol=TOLERANCE,
                atol=TOLERANCE,
                msg=lambda said, key=key: f"{key}: {said}",
            )


@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"track_running_stats": False}, {"eps": 1e-2}])
def test_in_one_process_batch_norm_is_torch_s(settings):
    theirs = nn.BatchNorm2d(3, **settings)
    ours = BatchNorm2d(3, **settings)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for training in (True, False):
        x = torch.randn(4, 3, 5, 5)
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_in_one_process_nothing_is_exchanged():
    x, low, high = (torch.randn(3) for _ in range(3))
    assert (distributed.world_size(), distributed.rank()) == (1, 0)
    assert distributed.all_reduce_sum(x) is distributed.all_reduce_mean(x) is distributed.broadcast(x) is x
    assert torch.equal(distributed.all_gather(x), x[None])
    assert distributed.pooled_moments(low, high) == (low, high)
    assert distributed.all_reduce_minmax(low, high) == (low, high)


LAYOUTS = {
    "rows": lambda x: x.flatten(1).contiguous(),
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sequence first": lambda x: x.flatten(2).permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 3])
def test_an_example_has_the_mask_of_dropout_that_it_has_in_one_process(monkeypatch, world, layout):
    x = torch.randn(3 * world, 4, 5, 5)
    theirs, ours = nn.Dropout(0.3), Dropout(0.3)

    def masked(layer: nn.Module, part: Tensor) -> Tensor:
        torch.manual_seed(5)
        return torch.cat([layer(LAYOUTS[layout](part)), layer(LAYOUTS[layout](2 * part))], dim=1)

    whole = masked(theirs, x)
    assert 0.2 < float((whole == 0).double().mean()) < 0.4
    assert torch.equal(masked(ours, x), whole)
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(masked(ours, x.chunk(world)[rank]))
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(ours.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
