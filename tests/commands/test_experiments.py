"""Every paper's recipe under ``conf/experiment/``: it composes, its networks have the paper's size, and it trains in full."""

from __future__ import annotations

import re

import pytest
import torch

from genzoo.config.instantiate import build
from genzoo.config.paths import CONF
from genzoo.distributions.discretization import dequantize
from genzoo.model import Adversarial, GenerativeModel, Staged
from genzoo.numerics.random import generator
from tests.commands import described

EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
UNITS = {"K": 1e3, "M": 1e6}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_paper_s_recipe_has_its_number_of_parameters_and_trains_at_full_width(path):
    stated = re.search(r"^# parameters: ([\d.]+)([KM])$", path.read_text(), re.MULTILINE)
    assert stated, "say how many parameters the paper's networks have: '# parameters: 35.7M'"
    assert "https://" in path.read_text(), "cite the source"
    model = build(described(f"experiment={path.stem}")["model"], "model").train()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == pytest.approx(float(stated[1]) * UNITS[stated[2]], rel=0.01)

    rng = generator("experiment", path.stem)
    x = dequantize(torch.randint(model.levels, (2, *model.shape), generator=rng), model.levels, rng)
    y = torch.arange(2) % model.condition.n if model.condition else None
    parts: list[GenerativeModel] = [s.module for s in model.stages()] if isinstance(model, Staged) else [model]
    for part in parts:
        for turn in part.networks() if isinstance(part, Adversarial) else [None]:
            keywords = {"turn": turn} if turn else {}
            loss = part.loss(x, y, rng=rng, **keywords).total
            loss.backward()
            assert loss.isfinite()
            gradients = [p.grad for p in part.parameters() if p.grad is not None]
            assert gradients and all(bool(g.isfinite().all()) for g in gradients)
