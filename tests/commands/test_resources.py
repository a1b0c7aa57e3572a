"""A disk, a memory or a helping process that gives out is named, with exit code 4, and what was saved stays whole."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import stat
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from genzoo.jobs.resources import resources
from genzoo.runs import ResourceError, Run, storing
from genzoo.training import checkpoints
from genzoo.training.module import GenerativeModule
from tests import children
from tests.children import Child
from tests.commands import SMALL, TINY, genzoo
from tests.survival import COMMON, FAMILIES, REPOSITORY, only_run, start, trains, wait_for


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("point", range(0, 30, 3))
def test_a_disk_that_is_full_is_named_and_the_checkpoints_before_stay_whole(here, monkeypatch, point):
    """The disk is full from the ``point``-th file on that is forced onto it."""
    original, count = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            count[0] += 1
            if count[0] > point:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, err = genzoo(*TINY, *SMALL["vae"])
    monkeypatch.undo()
    last = err.splitlines()[-1]
    assert code == 4, err
    assert re.fullmatch(
        r"genzoo: outputs/\S+: No space left on device: ([\d,]+ bytes to write, )?[\d,]+ free; free some space and resume",
        last,
    )
    for checkpoint in Path("outputs").glob("*/*/checkpoints/step-*"):
        checkpoints.load(checkpoint)
    monkeypatch.chdir(here)
    for run in Path("outputs").glob("*/*/status.json"):  # there is room again
        assert genzoo(f"resume={run.parent}")[0] == 0
        assert Run(run.parent).status["state"] == "done"


def test_a_line_that_a_full_disk_has_cut_is_taken_back(tmp_path):
    run = Run.create(tmp_path, "vae-digits", {})
    run.log(event="train", step=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((run.path / "metrics.jsonl").stat().st_size + 10, hard))
    try:
        with pytest.raises(ResourceError, match=r"metrics\.jsonl: .*: [\d,]+ bytes to write, [\d,]+ free"):
            run.log(event="train", step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    run.log(event="train", step=3)
    assert [event["step"] for event in run.events()] == [1, 3]


def test_other_failures_of_a_disk_are_no_matter_of_room(tmp_path):
    with pytest.raises(PermissionError), storing(tmp_path / "file"):
        raise PermissionError(errno.EACCES, "no", "file")


# Memory


def test_memory_that_gives_out_names_the_batch_and_what_to_try(here):
    def step(module: GenerativeModule) -> None:
        torch.empty(2**45)  # more than any machine has

    with mock.patch.object(GenerativeModule, "step", step):
        code, _, err = genzoo(*TINY, *SMALL["vae"])
    assert code == 4
    assert err.splitlines()[-1].startswith(
        "genzoo: out of memory with trainer.batch_size=64: try trainer.batch_size=32: "
    ), err
    (run,) = Path("outputs").glob("*/*")
    assert "out of memory" in Run(run).status["why"]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_every_kind_of_lack_of_memory_is_one(tmp_path, error):
    with pytest.raises(ResourceError, match=r"try trainer\.batch_size=1"), resources(tmp_path, 1):
        raise error


def test_a_bug_is_no_lack_of_anything(tmp_path):
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"), resources(tmp_path, 1):
        raise RuntimeError("shapes do not fit")


def test_a_process_with_little_memory_leaves_with_its_code(tmp_path):
    """The limit is the operating system's, on what the process may map."""
    program = (
        "import resource, sys, torch, pytorch_lightning, torchmetrics, sklearn.datasets\n"
        "from genzoo.__main__ import main\n"
        "from genzoo.training.module import GenerativeModule as M\n"
        "step = M.step\n"
        "def limited(self):\n"
        "    used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "    step(self)\n"
        "M.step = limited\n"
        "sys.argv = ['genzoo', *sys.argv[1:]]\n"
        "main()\n"
    )
    words = [*COMMON, "model=vae", "trainer.batch_size=65536", "budget.images=655360", "metrics.n=0"]
    done = children.run(
        [sys.executable, "-c", program, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "out of memory with trainer.batch_size=65536: try trainer.batch_size=32768" in done.stderr.splitlines()[-1]


# Helpers


def test_a_dead_helper_is_named_soon(tmp_path):
    words = [*COMMON, *FAMILIES["vae"], "trainer.workers=2", "budget.images=6400000"]
    with start(words, tmp_path, process=Child) as process:
        wait_for(lambda: trains(process.pid, tmp_path), process)
        wait_for(lambda: (only_run(tmp_path) / "metrics.jsonl").is_file(), process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        killed = time.monotonic()
        out, _ = process.communicate(timeout=90)
    assert time.monotonic() - killed < 60
    assert process.returncode == 4, out
    assert re.match(rf"genzoo: a data loader worker died: .*{children[0]}.*trainer.workers=0", out.splitlines()[-1])
    assert json.loads((only_run(tmp_path) / "status.json").read_text())["state"] == "failed"
