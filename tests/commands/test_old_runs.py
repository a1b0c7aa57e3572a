"""Runs of every schema that was ever released are read, sampled, gone on with and scored by this release.

``tests/fixtures/run-of-schema-<n>`` was trained by the first release with that schema, killed after step 13 of 16, and is never
written again; ``expected.json`` has what that release itself went on to. Its noise came from torch's generators, seeded with
32 bits: the tests draw it as it was, so that all else must be what it was.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from genzoo import load
from genzoo.numerics import random
from genzoo.numerics.random import SampleStreams, seed_of
from genzoo.runs import SCHEMA, Run
from genzoo.training import loop
from tests.commands import genzoo

FIXTURES = Path(__file__).parents[1] / "fixtures"
SCHEMAS = range(1, SCHEMA + 1)


def reseed(rng: torch.Generator, *name: int | str) -> None:
    """Seed as the first release did, which also named the rank of a training process."""
    rng.manual_seed(seed_of(*name, *[0] * (name[0] in ("noise", "layers"))))


def numbers(self: SampleStreams, kind: str, count: int) -> torch.Tensor:
    """Draw 1,024 numbers of every sample, from a generator for each."""
    assert kind not in self._made and count <= 1024, "the first release threw away what was left"
    self._made[kind] = 1024
    fill = torch.randn if kind == "normal" else torch.rand
    seeds = [seed_of(kind, self._seed, i) for i in self.indices]
    return torch.stack([fill(1024, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.fixture
def old_noise(monkeypatch):
    monkeypatch.setattr(random, "reseed", reseed)
    monkeypatch.setattr(loop, "reseed", reseed)
    monkeypatch.setattr(SampleStreams, "_compute", numbers)


@pytest.fixture(params=SCHEMAS)
def old(request, tmp_path, monkeypatch) -> tuple[Path, dict]:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / f"run-of-schema-{request.param}", run)
    return run, json.loads((run / "expected.json").read_text())


def test_its_samples_are_what_they_were(old, old_noise):
    run, expected = old
    x = load(run, device="cpu").sample(4, rng=SampleStreams(0, range(4))).x
    assert torch.allclose(x, torch.tensor(expected["samples"]), atol=1e-4)


def test_it_is_gone_on_with_and_scored_as_it_would_have_been(old, old_noise):
    run, expected = old
    code, _, err = genzoo(f"resume={run}")
    assert code == 0 and "resuming from step 12 of 16" in err
    trained = [event["values"] for event in Run(run).events() if event["event"] == "train"]
    assert len(trained) == 16 and trained[-1] == pytest.approx(expected["train"], rel=1e-3)
    assert Run(run).result["metrics"]["test/nll_upper"]["value"] == pytest.approx(expected["test/nll_upper"], rel=1e-3)


def test_it_can_be_compared(old):
    run, _ = old
    assert genzoo(f"resume={run}")[0] == 0
    code, _, err = genzoo("compare", f"runs={run}", "out=comparison")
    assert code == 0, err
    assert "vae" in Path("comparison/leaderboard.md").read_text()
