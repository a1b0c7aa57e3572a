"""A run that was interrupted, however and wherever, ends as one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load as load_safetensors

from genzoo import load
from genzoo.families.flow_matching import ReflowPairs
from genzoo.numerics.random import SampleStreams
from genzoo.runs import Run
from genzoo.training import callbacks, checkpoints, stopping
from genzoo.training.module import GenerativeModule
from genzoo.training.stopping import Signals, Stopped
from tests import survival
from tests.children import Child
from tests.commands import SMALL, TINY, genzoo, trained, untrained
from tests.survival import differences

# Sixteen steps, of which 4, 8, 12 and 16 are saved, 5, 11 and 16 drawn, and 5 and 11 scored.
LONGER = [
    "budget.images=1024",
    *("trainer.saves=4", "trainer.grids=3", "trainer.scores=2", "trainer.score_samples=8"),
    *("metrics.n=8", "metrics.force=true"),
]
# One of each kind of training; test_crossings.py interrupts the training of every family, without the command around it.
FAMILIES = {
    **{name: words for name, words in SMALL.items() if name not in ("realnvp", "wgan_gp")},
    "vqvae": ["model=vqvae", "codec.encoder.width=4", "codec.decoder.width=4"],
    "gan": ["model=gan", "model.generator.width=4", "model.critic.width=4"],
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(callbacks, "RECORDS", 5)  # every third step, so that checkpoints fall between records
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Interrupted(BaseException):
    """What ends a training in these tests, as suddenly as the end of a process."""


def interrupted(step: int, *words: str) -> Path:
    """Train until a step has been done, and no further; return the run."""
    cut_short(step, *TINY, *LONGER, *words)
    return max(Path("outputs").glob("*/*"), key=lambda path: path.name)


def cut_short(step: int, *words: str) -> None:
    """Type a command that trains, and end it as soon as a step has been done."""
    original = GenerativeModule.step

    def until(module: GenerativeModule) -> None:
        if module.steps == step:
            raise Interrupted
        original(module)

    with mock.patch.object(GenerativeModule, "step", until), pytest.raises(Interrupted):
        genzoo(*words)


def gone_on(run: Path, *words: str) -> str:
    """Go on with a run to its end; return what was said on the way."""
    code, _, err = genzoo(f"resume={run}", *words)
    assert code == 0, err
    assert Run(run).status["state"] == "done"
    return err


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_goes_on_ends_in_the_same_bits(here, family):
    words = [*LONGER, *FAMILIES[family], "data=digits"]
    whole = trained(*words)
    rng = random.Random(family)
    for step in (rng.randrange(4), rng.randrange(5, 16)):
        run = interrupted(step, *FAMILIES[family], "data=digits")
        said = gone_on(run)
        assert f"resuming from step {step // 4 * 4}" in said
        assert differences(whole, run) == []


def test_helpers_that_gather_batches_ahead_change_no_bit(here):
    words = [*LONGER, *SMALL["vae"], "data=digits"]
    whole = trained(*words)
    run = interrupted(10, *SMALL["vae"], "trainer.workers=2")
    gone_on(run, "trainer.workers=1")
    assert differences(whole, run) == []


def test_a_run_is_gone_on_with_twice_from_where_a_signal_stopped_it(here):
    whole = trained(*LONGER, *SMALL["vae"])

    def stopped_at(step: int, number: int, *words: str) -> int:
        original = GenerativeModule.step

        def step_and_signal(module: GenerativeModule) -> None:
            original(module)
            if module.steps == step:
                os.kill(os.getpid(), number)

        with mock.patch.object(GenerativeModule, "step", step_and_signal):
            return genzoo(*words).code

    assert stopped_at(3, signal.SIGTERM, *TINY, *LONGER, *SMALL["vae"], "outputs=again") == 143
    (run,) = Path("again").glob("*/*")
    assert [path.name for path in checkpoints.find(run / "checkpoints")] == ["step-3"]
    assert Run(run).status["why"] == "Stopped: stopped by SIGTERM"
    # Where a picture and scores are due, which come before the stop or after it.
    assert stopped_at(11, signal.SIGINT, f"resume={run}") == 130
    assert [path.name for path in checkpoints.find(run / "checkpoints")][-1] == "step-11"
    gone_on(run)
    assert differences(whole, run) == []
    assert [entry["step"] for entry in Run(run).status["resumed"]] == [3, 11]


@pytest.mark.parametrize("event", ["draw_grid", "interim"])
def test_a_signal_while_samples_are_drawn_is_heard_at_once_and_they_are_drawn_later(here, event):
    whole = trained(*LONGER, *SMALL["vae"])
    module = {"draw_grid": "genzoo.jobs.train.draw_grid", "interim": "genzoo.evaluation.scores.interim"}[event]

    def slow(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("nothing is done after the signal")

    with mock.patch(module, slow):
        assert genzoo(*TINY, *LONGER, *SMALL["vae"], "outputs=again").code == 143
    (run,) = Path("again").glob("*/*")
    assert "resuming from step 5" in gone_on(run)
    assert differences(whole, run) == []


def test_a_run_that_ended_before_its_scores_is_scored(here):
    whole = trained(*LONGER, *SMALL["vae"])
    with mock.patch("genzoo.evaluation.scores.evaluate_run", side_effect=Interrupted), pytest.raises(Interrupted):
        genzoo(*TINY, *LONGER, *SMALL["vae"], "outputs=again")
    (run,) = Path("again").glob("*/*")
    assert "resuming from step 16" in gone_on(run)
    assert differences(whole, run) == []


def test_the_lines_of_a_csv_are_those_of_the_whole_run(here):
    whole = trained(*LONGER, *SMALL["vae"], "logger=csv")
    run = interrupted(10, *SMALL["vae"], "logger=csv")
    gone_on(run)

    def columns(path: Path) -> list[list[str]]:
        rows = [line.split(",") for line in (path / "csv" / "metrics.csv").read_text().splitlines()]
        kept = [i for i, name in enumerate(rows[0]) if "second" not in name]
        return [[row[i] for i in kept] for row in rows]

    assert columns(run) == columns(whole)


# What a run needs of another


REFLOW = ["model=flow_matching", "data=moons", "model.network.width=8", "model.network.depth=1", "sampler=euler",
          "sampler.steps=3", "model.tolerance=0.1", "metrics.events=2", "metrics.n=0", "trainer.scores=0",
          "trainer.grids=1"]  # fmt: skip
LATENT = ["model=latent", "prior.network.width=8", "prior.network.depth=1", "prior.schedule.num_steps=20",
          "sampler.steps=5", "metrics.n=0", "trainer.scores=0", "trainer.grids=1"]  # fmt: skip


def with_parent(kind: str, folder: Path) -> list[str]:
    """Say how to train over a finished model, whose averaged weights are not those that it began with."""
    if kind == "codec":
        return [*LATENT, "codec=run", f"codec.run={untrained(folder, *SMALL['vae'])[0]}"]
    classes = ["data.conditional=true"] if kind == "conditional teacher" else []
    parent = untrained(folder, *REFLOW, *classes)[0]
    return [*REFLOW, *classes, "teacher=run", f"teacher.run={parent}", "model.pool=48"]


@pytest.mark.parametrize("kind", ["conditional teacher", "codec"])
def test_a_run_that_goes_on_without_the_run_it_builds_on_ends_in_the_same_bits(here, kind):
    words = with_parent(kind, here / "parents")
    whole = trained(*LONGER, *words)
    stopped = [interrupted(step, *words) for step in (2, 9)]  # before there is a checkpoint, and after
    shutil.rmtree(here / "parents")
    for run, step in zip(stopped, (0, 8), strict=True):
        assert f"resuming from step {step}" in gone_on(run)
        assert differences(whole, run) == []
    if kind != "codec":
        assert "precompute_seconds" in Run(whole).result["metrics"]["training/seconds"]["card"]["protocol"]


def test_a_finished_reflow_needs_neither_its_teacher_nor_its_pairs(here):
    run = trained(*with_parent("teacher", here / "parents"))
    before = load(run).sample(4, rng=SampleStreams(0, range(4))).x
    for folder in (here / "parents", run / "parents", run / "precomputed"):
        shutil.rmtree(folder)
    assert torch.equal(load(run).sample(4, rng=SampleStreams(0, range(4))).x, before)
    for command in (["sample", f"run={run}", "n=4", "out=x.npz"], ["evaluate", f"run={run}", "metrics.throughput=4"]):
        code, _, err = genzoo(*command)
        assert code == 0, err


def test_a_teacher_s_pairs_are_simulated_once_in_a_run_and_are_no_part_of_its_steps(here):
    words = with_parent("teacher", here / "parents")
    calls = []
    original = ReflowPairs.simulate

    def simulate(self, model, *chunk):
        calls.append(1)
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None, "while operations are counted"
        pairs = original(self, model, *chunk)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("nothing is done after the signal")
        time.sleep(2)
        return pairs

    with mock.patch.object(ReflowPairs, "simulate", simulate):
        assert genzoo(*TINY, *LONGER, *words).code == 143
        (run,) = Path("outputs").glob("*/*")
        cut_short(9, f"resume={run}")
        gone_on(run)
    assert len(calls) == 2, "once, after it was interrupted"
    status = Run(run).status
    assert status["precompute_seconds"] > 2 > status["train_seconds"]
    plain = trained(*LONGER, *REFLOW)
    assert Run(run).status["train_flops"] == Run(plain).status["train_flops"]
    weights = [
        sum(t.nbytes for t in checkpoints.load(p / "checkpoints/step-16").weights.values()) for p in (run, plain)
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("kind", "harm"),
    [("teacher", harm) for harm in ("flipped", "cut", "missing", "manifest")] + [("codec", "flipped")],
)
def test_damaged_weights_of_a_parent_are_refused_by_name(here, kind, harm):
    run = interrupted(0, *with_parent(kind, here / "parents"))
    (path,) = (run / "parents").glob("*.safetensors")
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "manifest":
        path = path.with_name("manifest.json")
        path.unlink()
    else:
        path.write_bytes(content[:-1] if harm == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    refused(run, f"genzoo: {path}: ")


def refused(run: Path, message: str) -> None:
    code, out, err = genzoo(f"resume={run}")
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err


def test_a_run_that_never_kept_its_teacher_is_refused_and_one_whose_checkpoints_hold_its_codec_is_not(here):
    for kind in ("teacher", "codec"):
        run = interrupted(9, *with_parent(kind, here / kind))
        shutil.rmtree(run / "parents")
        if kind == "teacher":
            refused(run, f"{run}/parents: is missing: cannot resume without the weights of model.teacher")
        else:
            gone_on(run)


def test_damaged_pairs_are_refused_and_missing_ones_are_simulated_again(here):
    words = with_parent("teacher", here / "parents")
    whole, run = trained(*LONGER, *words), interrupted(9, *words)
    path = run / "precomputed" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(run, f"genzoo: {path}: its SHA-256 is not the manifest's")
    pairs = load_safetensors(content)
    checkpoints.keep_tensors(run / "precomputed-", {"model": {**pairs, "x": pairs["x"][1:]}})
    shutil.rmtree(path.parent)
    (run / "precomputed-").rename(path.parent)
    refused(run, f"{path}: does not fit the model of config.yaml")
    shutil.rmtree(path.parent)
    gone_on(run)
    assert differences(whole, run) == []


# What is gone on with


def test_auto_goes_on_with_the_very_same_job_or_begins_it(here):
    words = [*TINY, *LONGER, *SMALL["vae"]]
    other = interrupted(6, *SMALL["vae"], "seed=1")
    run = interrupted(6, *SMALL["vae"])
    code, out, err = genzoo(*words, "resume=auto")
    assert code == 0 and "resuming from step 4" in err and out.splitlines()[-1] == f"run: {run}"
    assert Run(other).status["state"] == "failed"
    code, out, err = genzoo(*words, "resume=auto")
    assert (code, out) == (0, f"already done: {run}\n")
    code, out, _ = genzoo(*words, "resume=auto", "seed=2")
    assert code == 0 and len(list(Path("outputs").glob("*/*"))) == 3


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(here):
    whole = trained(*LONGER, *SMALL["vae"])
    run = interrupted(10, *SMALL["vae"])
    newest = checkpoints.find(run / "checkpoints")[-1]
    path = newest / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (run / "checkpoints" / ".step-left").mkdir()
    said = gone_on(run)
    assert f"genzoo: {path}: " in said and "resuming from step 4" in said
    assert differences(whole, run) == [] and not list((run / "checkpoints").glob(".*"))


def test_a_run_of_which_every_checkpoint_is_damaged_is_refused(here):
    run = interrupted(10, *SMALL["vae"])
    for checkpoint in checkpoints.find(run / "checkpoints"):
        (checkpoint / "state.pt").unlink()
    code, _, err = genzoo(f"resume={run}")
    assert code == 2 and err.splitlines()[-1] == f"genzoo: {run}/checkpoints: no checkpoint in it is whole"


def test_the_checkpoint_of_another_model_is_refused(here):
    run, other = interrupted(6, *SMALL["vae"]), interrupted(6, *SMALL["vae"], "model.latent_dim=5")
    (run / "config.yaml").write_bytes((other / "config.yaml").read_bytes())
    code, _, err = genzoo(f"resume={run}")
    assert code == 2 and "step-4: does not fit the model of config.yaml" in err


def test_other_data_are_refused(here):
    run = interrupted(6, *SMALL["vae"])
    Run(run).update_status(data_sha256="0" * 64)
    code, _, err = genzoo(f"resume={run}")
    assert code == 2 and "the data have changed since it started" in err


def test_another_version_is_said(here):
    run = interrupted(6, *SMALL["vae"])
    status = Run(run).status
    Run(run).update_status(versions={**status["versions"], "torch": "1.0"})
    assert f"started with torch 1.0, resuming with {torch.__version__.split('+')[0]}" in gone_on(run)


def test_the_threads_of_a_run_are_taken_over(here):
    run = interrupted(6, *SMALL["vae"])
    Run(run).update_status(threads=2)
    before = torch.get_num_threads()
    try:
        gone_on(run)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resume=nowhere"], "resume=nowhere: not a run directory, it has no config.yaml"),
        (["resume=RUN", "seed=1"], "seed=1: resume=RUN keeps the run's configuration; omit it"),
        (["resume=RUN", "model=gan"], "model=gan: resume=RUN keeps the run's configuration; omit it"),
        (["-m", "resume=RUN"], "resume=RUN: resumes one run; in a sweep set resume=auto"),
        (["-m", "resume=RUN,RUN"], "resume=RUN,RUN: resumes one run; in a sweep set resume=auto"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(here, words, message):
    code, out, err = genzoo(*words)
    assert (code, out, err) == (2, "", f"genzoo: {message}\n")


def test_a_live_run_has_one_writer_and_a_dead_one_none(here):
    run = interrupted(6, *SMALL["vae"])
    hold = f"import time; from genzoo.runs import Run\nwith Run({str(run)!r}).training(): print(1, flush=True), time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(survival.REPOSITORY)}
    arguments = [sys.executable, "-c", hold]
    with Child(arguments, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout and other.stdout.readline()
        code, _, err = genzoo(f"resume={run}")
        assert code == 2 and f"run={run}: is being trained by process {other.pid} on" in err
        other.kill()
    gone_on(run)


def test_processes_killed_at_random_moments_leave_runs_that_end_in_the_same_bits(tmp_path):
    rows = list(survival.kills(tmp_path, 3, ["wgan_gp"], kind=Child))
    assert sum(row["kills"] for row in rows) == 3
    assert [row["differs"] for row in rows] == [[]] * len(rows)


# Signals


def test_a_signal_is_kept_while_it_would_harm_and_a_second_is_not():
    with Signals() as signals:
        with signals.held():
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.heard == signal.SIGTERM
            with pytest.raises(Stopped) as stopped:
                os.kill(os.getpid(), signal.SIGINT)
            assert stopped.value.abrupt and stopped.value.exit_code == 130
            with pytest.raises(Stopped, match="stopped by SIGINT"), signals.free():
                raise AssertionError("what was heard before is heard here")
            signals.heard = None
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert not stopped.value.abrupt and stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_closed_terminal_is_heard_once_however_often_it_is_said(monkeypatch):
    monkeypatch.setattr(stopping, "REPEATED", 0.0)  # however far apart
    with Signals() as signals:
        with pytest.raises(Stopped) as stopped, signals.held():
            for number in (signal.SIGHUP, signal.SIGHUP):  # of the kernel and of the shell
                os.kill(os.getpid(), number)
        assert stopped.value.exit_code == 129 and not stopped.value.abrupt
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.abrupt and stopped.value.exit_code == 143


def test_a_signal_that_comes_twice_at_once_is_one_request(monkeypatch):
    with Signals() as signals:
        with pytest.raises(Stopped) as stopped, signals.held():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
        assert not stopped.value.abrupt
        monkeypatch.setattr(stopping, "REPEATED", 0.0)
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.abrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_a_process_was_told_to_ignore_stays_ignored_and_sigterm_is_heard(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), number)
            assert signals.heard is None and signal.getsignal(number) is signal.SIG_IGN
            with pytest.raises(Stopped, match="stopped by SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_what_was_held_is_heard_at_the_end_of_the_block():
    with Signals() as signals, pytest.raises(Stopped), signals.held():
        os.kill(os.getpid(), signal.SIGTERM)


def test_the_record_of_a_run_that_is_not_done_says_where_it_is(here):
    run = interrupted(6, *SMALL["vae"])
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["why"]) == ("failed", 4, "Interrupted")
