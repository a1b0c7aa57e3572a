"""A NaN or an infinity, wherever it comes from and whichever family is trained, ends the run in the step that met it."""

from __future__ import annotations

import random
import re
from pathlib import Path
from unittest import mock

import pytest
import torch

from genzoo.config.paths import CONF
from genzoo.model import GenerativeModel, Loss
from genzoo.runs import Run
from genzoo.training import checkpoints
from genzoo.training.loop import TrainingLoop
from tests.commands import TINY, genzoo
from tests.conftest import suitable
from tests.survival import FAMILIES

ALL = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
MORE = {
    "latent": ["model=latent", "codec=vae", "prior=flow_matching"],
    "glow": ["model=glow", "model.steps=1"],
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", ALL)
def test_a_number_that_is_not_finite_ends_the_run_in_that_step(tmp_path, monkeypatch, family, seed):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(f"{family}-{seed}")
    at, value = rng.randrange(2, 8), rng.choice([float("nan"), float("inf"), -float("inf")])
    original = TrainingLoop._backward

    def broken(self: TrainingLoop, module: GenerativeModel, turn: str | None) -> tuple[Loss, torch.Generator]:
        loss, noise = original(self, module, turn)
        counted = all(module is not stage.module for stage in self.stages)  # a copy, of which operations are counted
        if self.steps != at or counted:
            return loss, noise
        if seed:
            term = rng.choice(sorted(loss.terms))
            said.append(f"loss term '{term}'")
            return Loss(loss.total * value, {**loss.terms, term: torch.tensor(value)}, loss.aux), noise
        gradient = rng.choice([p.grad for p in module.parameters() if p.grad is not None])
        gradient.view(-1)[rng.randrange(gradient.numel())] = value
        said.append("gradient")
        return loss, noise

    said: list[str] = []
    small = {**FAMILIES, **MORE}.get(family) or suitable(family, "digits")
    small += ["data.size=16", "data.n=64", "data.n_test=16"] if "data=shapes" in small else []
    with mock.patch.object(TrainingLoop, "_backward", broken):
        code, _, err = genzoo(*TINY, *small, "trainer.batch_size=16", "budget.images=128", "trainer.saves=4")
    assert code == 3, err
    last = err.splitlines()[-1]
    assert re.fullmatch(rf"genzoo: {re.escape(said[-1])} is not finite at step {at}: try a lower .*", last), last
    (run,) = Path("outputs").glob("*/*")
    assert Run(run).status["why"] == f"NonFiniteError: {last.removeprefix('genzoo: ')}"
    kept = checkpoints.find(run / "checkpoints")[-1]
    assert kept.name == f"step-{at // 2 * 2}"  # every second step is saved
    for tensors in checkpoints.load(kept)[:2]:
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    assert "nan" not in (run / "metrics.jsonl").read_text().lower()
