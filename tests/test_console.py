"""Output that cannot be written ends no work; lost results show in the exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import pytest

from genzoo import console
from genzoo.__main__ import main
from genzoo.console import FaultTolerantStream, fault_tolerant_streams, stderr
from tests.commands import SMALL, TINY

ROOT = Path(__file__).resolve().parents[1]


class Broken(io.StringIO):
    """A stream that a device has left."""

    def __init__(self, number: int = errno.EIO):
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        self.write("")


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF])
def test_a_stream_drops_what_cannot_be_written_and_keeps_the_first_failure(number):
    stream = FaultTolerantStream(Broken(number))
    print("lost", file=stream, flush=True)
    stream.writelines(["lost", "too"])
    assert isinstance(stream.failure, OSError) and stream.failure.errno == number
    closed = open(os.devnull, "w")  # noqa: SIM115
    closed.close()
    print("lost", file=FaultTolerantStream(closed), flush=True)


def test_there_is_always_a_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    print("lost", file=stderr())  # and not on standard output, which print takes for None
    assert capsys.readouterr().out == ""


def test_streams_are_given_back_and_the_failure_of_the_results_is_kept(monkeypatch):
    out, err = Broken(errno.EPIPE), Broken()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with fault_tolerant_streams() as results:
        print("lost")
        print("lost", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == (out, err)
    assert results.failure is not None and console.exit_code(results.failure) == 141
    assert console.exit_code(OSError(errno.ENOSPC, "full")) == console.exit_code(ValueError("closed")) == 4


@pytest.mark.parametrize(("number", "lost"), [(errno.EPIPE, 141), (errno.EIO, 4)])
def test_a_training_whose_output_nobody_takes_is_finished(tmp_path, monkeypatch, number, lost):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["genzoo", *TINY, *SMALL["vae"], "trainer.grids=0"])
    monkeypatch.setattr(sys, "stdout", Broken(number))
    monkeypatch.setattr(sys, "stderr", Broken(number))
    with mock.patch.dict(os.environ), warnings.catch_warnings(), pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == lost
    (status,) = (json.loads(path.read_text()) for path in Path("outputs").rglob("status.json"))
    assert status["state"] == "done"


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("--help | true", "141"),
        ("--help > /dev/full", "4"),
        ("--help >&-", "0"),
        ("--nope 2>&1 | true", "2"),
        ("--nope 2> /dev/full", "2"),
        ("--nope 2>&-", "2"),
    ],
)
def test_pipes_and_disks_of_a_shell(ending, code):
    line = f"sleep 0 ; {sys.executable} -m genzoo {ending}; echo ${{PIPESTATUS[0]}}"
    line = line.replace("| true", "| (exec 0<&-; true)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split()[-1] == code, done
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_locale_without_a_character_does_not_end_the_command(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with fault_tolerant_streams() as results:
        print("± 1")
    stream.flush()
    assert results.failure is None and stream.buffer.getvalue() == b"? 1\n"
