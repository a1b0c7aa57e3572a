"""Two processes of the command that share each batch train as one does, and stop, go on and end together."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning_fabric.plugins.environments import LightningEnvironment

from genzoo.jobs.processes import rank_of
from genzoo.runs import ResourceError
from genzoo.training import checkpoints, launcher
from tests.children import Child
from tests.commands import genzoo
from tests.survival import finish, only_run, start, trains, wait_for

# Noise, times, classes that are dropped, and pairs of a whole batch: all that tells one process from two is who draws them.
WORDS = [
    *(
        "model=flow_matching",
        "model.pairing=optimal_transport",
        "data.conditional=true",
        "data=moons",
        "budget=smoke",
        "budget.images=6400",
        "trainer.batch_size=64",
        "trainer.threads=1",
    ),
    *("trainer.precision=64-true", "trainer.grids=1", "trainer.scores=1", "trainer.score_samples=64", "metrics.n=0"),
    *(
        "metrics.events=16",
        "model.tolerance=1e-2",
        "trainer.saves=3",
        "+data.source.n_train=4000",
        "+data.source.n_test=500",
    ),
]
RANKS = functools.partial(Child, nested=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    finish(WORDS, folder, process=Child)
    return only_run(folder)


def assert_alike(run: Path, alone: Path) -> None:
    """Compare weights, averages and records, which differ by rounding alone."""
    one, two = (checkpoints.load(checkpoints.find(path / "checkpoints")[-1]) for path in (run, alone))
    for name in one.weights:
        assert torch.allclose(one.weights[name], two.weights[name], rtol=1e-9, atol=1e-9), name
        assert torch.allclose(one.ema[name], two.ema[name], rtol=1e-9, atol=1e-9), name

    def records(path: Path) -> list[dict]:
        return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]

    assert [event["event"] for event in records(run)] == [event["event"] for event in records(alone)]
    for a, b in zip(records(run), records(alone), strict=True):
        assert (a["step"], a.get("images"), a.get("flops")) == (b["step"], b.get("images"), b.get("flops"))
        if a["event"] == "train":
            assert a["values"] == pytest.approx(b["values"], rel=1e-5)


def test_two_processes_train_as_one(alone, tmp_path):
    finish([*WORDS, "trainer=ddp"], tmp_path)
    run = only_run(tmp_path)
    assert_alike(run, alone)
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_two_processes_stop_together_and_one_goes_on_and_two_again(alone, tmp_path):
    words = [*WORDS, "trainer.devices=2"]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with start(words, tmp_path, process=RANKS) as process:
            wait_for(lambda: trains(process.pid, tmp_path), process)
            before = (only_run(tmp_path) / "metrics.jsonl").stat().st_size if words[0].startswith("resume") else 0
            wait_for(lambda: trained_since(tmp_path, before), process)  # noqa: B023
            process.send_signal(number)
            out, _ = process.communicate(timeout=60)
        assert process.returncode == code, out
        words = [f"resume={only_run(tmp_path)}", f"trainer.devices={1 if number == signal.SIGTERM else 2}"]
    finish(words, tmp_path, process=RANKS)
    assert_alike(only_run(tmp_path), alone)


def trained_since(folder: Path, size: int) -> bool:
    """Whether a run has recorded more than so many bytes."""
    record = only_run(folder) / "metrics.jsonl"
    return record.is_file() and record.stat().st_size > size + 500


def test_processes_that_are_given_seconds_plan_alike_and_end(tmp_path):
    begun = time.monotonic()
    finish([*WORDS, "trainer=ddp", "budget.images=null", "budget.seconds=4"], tmp_path, process=RANKS)
    status = json.loads((only_run(tmp_path) / "status.json").read_text())
    assert status["state"] == "done" and 2 < status["train_seconds"] < 8
    assert time.monotonic() - begun < 120


@pytest.mark.parametrize("told", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_another_number_of_processes_than_were_started_is_refused(tmp_path, monkeypatch, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(told, "4")
    code, _, err = genzoo("trainer.devices=2")
    assert (code, err) == (2, "genzoo: trainer.devices=2, trainer.nodes=1: 4 processes were started in total\n")


@pytest.mark.parametrize(
    ("told", "rank"),
    [
        ({}, 0),
        ({"RANK": "5", "LOCAL_RANK": "1"}, 5),
        ({"LOCAL_RANK": "1", "NODE_RANK": "2"}, 9),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, 3),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, 0),
    ],
)
def test_a_process_knows_its_rank_from_whoever_started_it(monkeypatch, told, rank):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert rank_of(devices=4) == rank


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = genzoo("trainer.devices=3", "trainer.batch_size=64")
    assert (code, out) == (2, "") and not list(tmp_path.iterdir())
    assert err.startswith("genzoo: trainer.batch_size=64: is not divisible by 3 processes")


def test_a_process_that_is_killed_is_named_by_the_one_that_has_started_it(tmp_path):
    with start([*WORDS, "trainer=ddp", "budget.images=640000"], tmp_path, process=Child) as process:
        wait_for(lambda: trains(process.pid, tmp_path), process)
        wait_for(lambda: trained_since(tmp_path, 0), process)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 4, out
    assert [line for line in out.splitlines() if not line.startswith(("step ", "Init", "---", "dist", "All"))][-1:] == [
        "genzoo: process 1 of those that train together was killed by SIGKILL"
    ]
    assert "Traceback" not in out
    status = json.loads((only_run(tmp_path) / "status.json").read_text())
    assert status["state"] == "failed" and "killed by SIGKILL" in status["why"]


class Process:
    """A process that another one has started."""

    def __init__(self, code: int | None):
        self.returncode = code

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.returncode = -9


def launcher_over(*codes: int | None) -> launcher.Launcher:
    made = launcher.Launcher(LightningEnvironment(), num_processes=len(codes) + 1, num_nodes=1)
    made.procs, made.parent = [Process(code) for code in codes], os.getppid()
    return made


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ((None, -9), "process 2 of those that train together was killed by SIGKILL"),
        ((1, None), "process 1 of those that train together ended with exit code 1"),
        ((None, None), "the processes that train together have lost each other: "),
        ((143, 143), "the processes that train together have lost each other: "),
    ],
)
def test_the_cause_of_a_broken_communication_is_found(monkeypatch, codes, said):
    monkeypatch.setattr(launcher, "NOTICE", 0.1)
    error = RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3")
    cause = launcher_over(*codes).explain(error)
    assert isinstance(cause, ResourceError) and str(cause).startswith(said)
    for other in (RuntimeError("shapes do not fit"), KeyError("gloo")):
        assert launcher_over(*codes).explain(other) is other


@pytest.mark.parametrize(
    ("environment", "orphaned", "kind"),
    [
        ({"LOCAL_RANK": "1"}, True, ResourceError),
        ({"LOCAL_RANK": "1"}, False, SystemExit),
        ({"LOCAL_RANK": "2"}, True, SystemExit),
        ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, False, ResourceError),
    ],
)
def test_of_the_processes_that_are_left_one_says_it(monkeypatch, environment, orphaned, kind):
    monkeypatch.setattr(launcher, "NOTICE", 0.1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = launcher_over()
    made.parent += orphaned
    cause = made.explain(RuntimeError("NCCL communicator was aborted"))
    assert type(cause) is kind and getattr(cause, "exit_code", None) in (4, None)
    assert not isinstance(cause, SystemExit) or cause.code == 4


def test_a_communication_that_hangs_ends_all_the_same(monkeypatch, capsys):
    exits: list[int] = []
    monkeypatch.setattr(launcher, "PATIENCE", 0.0)
    monkeypatch.setattr(launcher.os, "_exit", exits.append)
    made, causes = launcher_over(None, -9), []
    made.on_hang = causes.append
    made._watch()
    assert exits == [4] and causes == ["process 2 of those that train together was killed by SIGKILL"]
    assert capsys.readouterr().err == f"genzoo: {causes[0]}\n" and made.procs[0].returncode == -9
