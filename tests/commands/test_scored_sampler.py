"""A sampler that was named scores its run; one that was not may be exchanged, which is said; cards tell all samplers apart."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from genzoo.config.compose import preflight
from genzoo.config.paths import CONF
from genzoo.diffusion.samplers import Ancestral, Euler, Heun, Sampler
from genzoo.diffusion.schedules import CosineSchedule, LinearSchedule
from genzoo.evaluation import scores as score
from genzoo.evaluation.describe import describe
from genzoo.evaluation.samplers import within_evaluations
from genzoo.report.leaderboard import rows, tables
from genzoo.report.records import find, read
from genzoo.runs import Run
from tests.commands import SMALL, TINY, genzoo, untrained
from tests.commands.test_resume import cut_short
from tests.report import entry, run, scored

DDPM = [*TINY, *SMALL["ddpm"][:-1], "metrics.n=6", "metrics.force=true", "metrics.events=2", "metrics.throughput=2",
        "trainer.grids=0", "trainer.saves=2"]  # fmt: skip
LONG = ["sampler=euler", "sampler.steps=60"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only() -> Run:
    (path,) = Path("outputs").glob("*/*")
    return Run(path)


def card(done: Run) -> dict:
    return done.result["metrics"]["train/fd_digits"]["card"]["setting"]


def test_a_sampler_that_was_typed_scores_its_training_on_the_way_at_the_end_after_a_resume_and_in_evaluate():
    seen = []
    original = score.quality

    def quality(model, *arguments):
        seen.append((type(model.sampler).__name__, model.sampler.steps))
        return original(model, *arguments)

    with mock.patch.object(score, "quality", quality):
        cut_short(3, *DDPM, *LONG, "trainer.scores=1", "trainer.score_samples=6")
        code, _, err = genzoo(f"resume={only().path}")
        assert code == 0 and "in place of" not in err
        assert (card(only())["nfe"], card(only())["sampler"]["steps"]) == (60, 60)
        assert genzoo("evaluate", f"run={only().path}", "metrics.throughput=2", "metrics.force=true").code == 0
    assert seen == [("Euler", 60)] * 3
    assert only().result["warnings"] == []


def test_another_sampler_than_the_run_s_is_said_on_the_terminal_and_in_the_card():
    code, out, err = genzoo(*DDPM, *LONG, "metrics.max_nfe=55")
    said = "samples are scored with Heun in 25 steps in place of Euler in 60 steps, which takes more than metrics."
    assert code == 0 and err.count(f"genzoo: {said}") == 1 and f"warning: {said}" in " ".join(out.split())
    sampler = card(only())["sampler"]
    assert (sampler["name"], sampler["steps"], card(only())["nfe"]) == ("Heun", 25, 49)
    assert sampler["instead_of"] == describe(Euler(60))
    assert only().result["warnings"][0].startswith(said)


def test_the_limit_counts_evaluations_and_not_steps(here):
    model = untrained(here, *SMALL["ddpm"])[1]
    for sampler, limit, exchanged in [
        *((Euler(50), 50, False), (Euler(51), 50, True), (Heun(25), 49, False), (Heun(26), 50, True)),
        *((Euler(51), None, False), (Ancestral(), 19, True), (Ancestral(), 20, False)),
    ]:
        model.sampler = sampler
        with within_evaluations(model, limit) as replaced:
            assert (model.sampler is not sampler) == (replaced is not None) == exchanged, (sampler, limit)
        assert model.sampler is sampler


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        (["model=ddpm"], 50),
        (["model=ddpm", "model.network.channels=8"], 50),
        (["model=vae"], 50),
        (["model=ddpm", "sampler=ancestral"], None),
        (["model=ddpm", "sampler=ddim"], None),
        (["model=ddpm", "sampler.steps=100"], None),
        (["model=ddpm", "+sampler.trajectory=false"], None),
        (["model=latent", "sampler.steps=60"], None),
        (["model=ddpm", "sampler.steps=100", "metrics.max_nfe=70"], 70),
        (["experiment=mine"], None),
        (["experiment=of_mine"], None),
        (["experiment=none_of_it"], 50),
    ],
)
def test_what_names_a_sampler(here, words, limit):
    folder = here / "conf" / "experiment"
    folder.mkdir(parents=True)
    heads = {
        "mine": "defaults: [{override /model: ddpm}, {override /sampler: ancestral}]",
        "of_mine": "defaults: [mine, {override /data: digits}]",
        "none_of_it": "defaults: [{override /model: ddpm}]\noptimizer: {lr: 1e-4}",
    }
    for name, text in heads.items():
        (folder / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    assert preflight("train", words, str(folder.parent)).config["metrics"]["max_nfe"] == limit


def test_every_paper_s_recipe_is_scored_with_its_own_sampler():
    """Those whose family has one all name it, and with it the number of evaluations of the number that they quote."""
    named = []
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        config = preflight("train", [f"experiment={path.stem}"]).config
        assert (config["metrics"]["max_nfe"] is None) == (config.get("sampler") is not None), path.stem
        named += [path.stem] if config.get("sampler") else []
    assert {"ddpm_cifar10", "iddpm_cifar10", "edm_cifar10", "score_sde_cifar10", "flow_matching_cifar10"} <= set(named)


# Cards


class Wrapped(Sampler):
    """A sampler made of parts, as somebody's package may have it."""

    stochastic = False

    def __init__(self, inner, schedule=None, corrector=None, table=(), weight=None):
        super().__init__(4)
        self.inner, self._schedule, self.table, self.weight = inner, schedule, table, weight
        self.options = {"correctors": [corrector], "scale": functools.partial(max, 1)}

    def iterate(self, denoiser, noise, y, rng):
        yield from self.inner.iterate(denoiser, noise, y, rng)


SAMPLERS = [
    Euler(4),
    Heun(4),
    Wrapped(Euler(4)),
    Wrapped(Euler(5)),
    Wrapped(Heun(5)),
    Wrapped(Heun(5), LinearSchedule()),
    Wrapped(Heun(5), LinearSchedule(num_steps=500)),
    Wrapped(Heun(5), CosineSchedule()),
    Wrapped(Heun(5), corrector=Euler(2)),
    Wrapped(Heun(5), corrector=Wrapped(Euler(2))),
    Wrapped(Heun(5), corrector=Wrapped(Euler(3))),
    Wrapped(Heun(5), table=(1.0, 0.5)),
    Wrapped(Heun(5), table=(1.0, float("inf"))),
    Wrapped(Heun(5), table=torch.tensor([1.0, 0.5])),
    Wrapped(Heun(5), table=torch.tensor([1.0, 0.25])),
    Wrapped(Heun(5), weight=nn.Linear(1, 1, bias=False)),
    Wrapped(Heun(5), weight=nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())),
    Wrapped(Heun(5), weight=nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh())),
]


def test_samplers_that_differ_anywhere_have_unlike_cards_and_equal_ones_the_same():
    cards = [json.dumps(describe(sampler), sort_keys=True, allow_nan=False) for sampler in SAMPLERS]
    assert len(set(cards)) == len(cards)
    assert cards == [json.dumps(describe(copy.deepcopy(s)), sort_keys=True) for s in SAMPLERS]
    assert describe(Heun(5))["name"] == "Heun" and describe(Heun(5))["steps"] == 5
    assert describe(SAMPLERS[5])["_schedule"] == describe(LinearSchedule())


def test_a_sampler_that_contains_itself_has_a_card():
    sampler = Wrapped(Euler(2))
    sampler.inner = sampler
    assert describe(sampler)["inner"] == "itself"


def test_a_report_tells_runs_apart_by_the_parts_of_their_samplers(here):
    for i in (9, 10):
        setting = {"sampler": describe(SAMPLERS[i])}
        run(here, metrics=scored(10.0) | {"test/fd_digits": entry(1.0 + i, 0.1, setting=setting)})
    found = rows(read(find([here]))[0])
    assert [len(row.runs) for row in found] == [1, 1] and len(tables(found)[0].rows) == 2
    assert len({row.label for row in found}) == 2
