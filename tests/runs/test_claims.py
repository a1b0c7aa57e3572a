"""A job has one process that works on it, and what a dead process has left behind is free for the next."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genzoo.jobs import sweep
from genzoo.jobs.processes import claimed
from genzoo.runs import Run, RunError, claims, job_id, mark_dead_runs
from genzoo.runs.claims import remove_abandoned, scratch, try_lock
from tests.commands import genzoo
from tests.conftest import composed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GENZOO_CLAIM", raising=False)
    return tmp_path


def holding(path: Path, then: str) -> subprocess.Popen[str]:
    """Start a process that holds a claim and then does something."""
    program = (
        f"import os, signal, subprocess, sys, time\nfrom pathlib import Path\nfrom genzoo.runs.claims import try_lock\n"
        f"claim = try_lock(Path({str(path)!r}))\n{then}"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout
    process.stdout.readline()
    return process


def test_one_holds_a_claim_and_gives_it_up_without_a_trace(here):
    path = claims.path_of("outputs", "job")
    with try_lock(path) as claim:
        assert claim.path == path and try_lock(path) is None
        assert f"process {os.getpid()} on " in claims.owner(path)
    assert not list(here.iterdir())
    with try_lock(path), try_lock(claims.path_of("outputs", "other")):
        pass
    assert not list(here.iterdir())


def test_a_claim_is_free_when_its_holder_and_those_that_inherited_it_have_been_killed(here):
    path = claims.path_of("outputs", "job")
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], pass_fds=[claim.descriptor])"
    with holding(path, f"print({child}.pid, flush=True); time.sleep(60)") as process:
        pass_on = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
        assert try_lock(path) is None  # the child goes on with the job
        os.kill(int(pass_on[0]), 9)
    deadline = time.monotonic() + 20
    while (claim := try_lock(path)) is None:
        assert time.monotonic() < deadline, "a dead process holds it"
        time.sleep(0.05)
    claim.release()


def test_where_there_are_no_locks_it_is_said_and_nothing_is_claimed(here, monkeypatch, capsys):
    def flock(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claims.fcntl, "flock", flock)
    claims._without_locks.cache_clear()
    path = claims.path_of("outputs", "job")
    assert try_lock(path).path is None and try_lock(path).path is None
    assert capsys.readouterr().err.count("concurrent sweeps may train the same job twice") == 1


# Sweeps


def one(words: list[str], started: list[str], monkeypatch, **how: bool) -> sweep.JobResult | None:
    config = composed("model=vae", *words)

    def run_process(words, seconds, **environment):
        started.append(" ".join(words))
        run = Run.create(config["outputs"], "vae-digits", config, job_id(config))
        run.update_status(state="done")
        return sweep.Outcome(0, "")

    monkeypatch.setattr(sweep, "run_process", run_process)
    return sweep.run_job("sweep", "train", [], words, config, {"model": "vae"}, **how)


def test_a_job_that_another_process_trains_is_left_to_it_and_its_run_is_taken(here, monkeypatch, capsys):
    started: list[str] = []
    config = composed("model=vae", "seed=1")
    with try_lock(claims.path_of("outputs", job_id(config))):
        assert one(["seed=1"], started, monkeypatch, wait=False) is None and not started
        run = Run.create("outputs", "vae-digits", config, job_id(config))

        def finish() -> sweep.JobResult | None:
            ended = one(["seed=1"], started, monkeypatch, wait=False)
            run.update_status(state="done")
            return ended

        monkeypatch.setattr(sweep, "PATIENCE", 0.01)
        ((number, ended),) = sweep.run_jobs([(7, finish)])
    assert (number, ended.run, ended.code, started) == (7, str(run.path), 0, [])
    assert "waiting for 1 job of other processes" in capsys.readouterr().err


def test_the_job_of_a_dead_process_is_taken_over(here, monkeypatch):
    path = claims.path_of("outputs", job_id(composed("model=vae", "seed=1")))
    with holding(path, "print(1, flush=True); os.kill(os.getpid(), signal.SIGKILL)") as process:
        process.wait()
    assert path.is_file()
    started: list[str] = []
    ended = one(["seed=1"], started, monkeypatch, wait=False)
    assert ended is not None and ended.code == 0 and started == ["train seed=1"]
    assert not list(Path("outputs").glob(".claim*"))


def test_a_finished_job_is_done_whatever_its_process_said_at_last(here, monkeypatch):
    def run_process(words, seconds, **environment):
        config = composed("model=vae")
        Run.create("outputs", "vae-digits", config, job_id(config)).update_status(state="done")
        return sweep.Outcome(1, "nobody has read the results")

    monkeypatch.setattr(sweep, "run_process", run_process)
    assert genzoo("-m", "model=vae").code in (0, 2)  # of the comparison, which finds no scores
    ended = sweep.run_job("sweep", "train", [], [], composed("model=vae"), {"model": "vae"})
    assert ended is not None and ended.code == 0


def test_a_second_training_of_a_job_is_refused_where_one_of_it_is_meant(here, monkeypatch):
    path = claims.path_of("outputs", "job")
    with try_lock(path):
        said = rf"^resume=auto: this job is being trained by process {os.getpid()} "
        with pytest.raises(RunError, match=said), claimed("outputs", "job", 1, needed=True):
            raise AssertionError("two train it")
        with claimed("outputs", "job", 1, needed=False):  # a run that was asked for once more
            pass
        monkeypatch.setenv("GENZOO_CLAIM", "job")  # by the sweep above this process
        with claimed("outputs", "job", 1, needed=True):
            pass


# What is left behind


def test_folders_of_sweeps_that_were_killed_are_removed_and_no_others(here):
    for name in (".sweep-dead", ".sweep-new", ".sweep-slurm", ".sweep-live"):
        (here / name / "hydra").mkdir(parents=True)
        (here / name / ".lock").write_text("" if name == ".sweep-new" else "process 1 on here\n")
    (here / ".sweep-slurm" / "hydra" / ".submitit").mkdir()
    (here / "elsewhere").mkdir()
    (here / ".sweep-link").symlink_to("elsewhere")
    with try_lock(here / ".sweep-live" / ".lock"), scratch(here) as own:
        remove_abandoned(here)
        assert {path.name for path in here.glob(".sweep-*")} == {
            *(".sweep-new", ".sweep-slurm", ".sweep-live", ".sweep-link", own.name)
        }
    assert not own.exists() and (here / "elsewhere").is_dir()


@pytest.mark.parametrize("verb", [["-m"], []], ids=["sweep", "training"])
def test_what_killed_processes_have_left_is_cleared_by_the_next(here, monkeypatch, verb):
    monkeypatch.setattr(sweep, "run_process", lambda *_, **__: sweep.Outcome(0, ""))
    monkeypatch.setattr("genzoo.__main__.run", lambda *_: None)
    run = Run.create("outputs", "vae-digits", composed(), "job")
    with holding(claims.path_of("outputs", "job"), "print(1, flush=True); time.sleep(60)") as process:
        run.update_status(pid=process.pid)
        process.kill()
    (here / ".sweep-dead").mkdir()
    (here / ".sweep-dead" / ".lock").write_text("process 1 on here\n")
    assert genzoo(*verb, "model=gan").code == 0
    assert not list(here.glob(".sweep-*")) and not list(Path("outputs").glob(".claim*"))
    assert run.status["state"] == "failed" and f"process {process.pid} ended" in run.status["why"]


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_run_is_marked_as_dead_by_its_lock_and_on_its_own_machine_alone(here, monkeypatch):
    def made(name: str, **status: object) -> Run:
        run = Run.create("outputs", name, {})
        run.update_status(**status)
        return run

    dead, gone = made("a", pid=dead_pid()), made("b", pid=os.getpid())
    (gone.path / ".lock").write_text("process 1 on here\n")  # held once, and free: the number is another process's now
    new = made("c", pid=os.getpid())  # about to be locked
    other = made("d", pid=dead_pid(), host="elsewhere")
    done = made("e", pid=dead_pid(), state="done")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    mark_dead_runs(Path("outputs").glob("*/*"))
    assert dead.status["state"] == "running"  # another user's
    monkeypatch.undo()
    monkeypatch.chdir(here)
    mark_dead_runs([*Path("outputs").glob("*/*"), Path("nowhere")])
    states = [run.status["state"] for run in (dead, gone, new, other, done)]
    assert states == ["failed", "failed", "running", "running", "done"]
    hold = (
        "import time; from genzoo.runs import Run\n"
        f"with Run({str(dead.path)!r}).training(): print(1, flush=True), time.sleep(60)"
    )
    dead.update_status(state="running")
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as live:
        assert live.stdout and live.stdout.readline()
        mark_dead_runs([dead.path])
        assert json.loads((dead.path / "status.json").read_text())["state"] == "running"
        live.kill()


@pytest.mark.parametrize("place", ["/proc/no folder", "file/below", "dangling/below"])
def test_a_folder_that_cannot_be_made_ends_the_attempts_to_lock(here, place):
    Path("file").write_text("")
    Path("dangling").symlink_to("/proc/nothing")

    def too_long(*_: object) -> None:
        raise TimeoutError("still trying to lock")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        claim = try_lock(Path(place, ".claim"))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert claim is not None and claim.descriptor is None
