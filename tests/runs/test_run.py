"""Run directories: names that nobody else has, files that are whole, and broken ones called by their names."""

from __future__ import annotations

import datetime
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from genzoo.runs import Run, RunError, write_atomically
from genzoo.runs import run as run_module


@pytest.fixture
def run(tmp_path) -> Run:
    return Run.create(tmp_path, "vae-digits", {"seed": 3})


def test_two_hundred_runs_of_one_moment_have_two_hundred_names(tmp_path, monkeypatch):
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=datetime.UTC)

    class Frozen(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    monkeypatch.setattr(run_module.datetime, "datetime", Frozen)
    monkeypatch.setattr(run_module, "provenance", dict)
    # Two numbers by chance: most names are taken by somebody when they are drawn.
    numbers = iter(f"{i // 2:06x}" for i in range(1000))
    monkeypatch.setattr(run_module.secrets, "token_hex", lambda n: next(numbers))
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: Run.create(tmp_path, "name", {}).path, range(200)))
    assert len(set(paths)) == 200
    assert all(path.name.startswith("20260102-030405-000006-") for path in paths)


def test_a_new_run_says_what_made_it(run, monkeypatch):
    assert run.path.parent.name == "vae-digits"
    assert run.config == {"seed": 3}
    status = run.status
    assert (status["state"], status["schema"], status["pid"]) == ("running", 1, os.getpid())
    assert status["versions"]["torch"] and status["machine"]["cores"] == os.cpu_count()
    assert {path.name for path in run.path.iterdir() if path.is_dir()} == {"checkpoints", "samples", "results"}
    assert (run.path / "config.yaml").stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr(sys, "argv", ["genzoo", "train", "data.root=my pictures"])
    assert run_module.provenance()["command"] == "python -m genzoo train 'data.root=my pictures'"


def test_a_place_that_holds_no_runs_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"outputs=.*/file: .*: Not a directory"):
        Run.create(tmp_path / "file", "name", {})


# Files are whole


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "status.json"
    write_atomically(path, b"old")

    def crash(*_):
        raise OSError("disk full")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, crash)
            with pytest.raises(OSError, match="disk full"):
                write_atomically(path, b"new")
        assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_readers_see_a_whole_file_at_every_moment(tmp_path):
    """A writer replaces two long files by each other until it is killed; no reader ever sees a part."""
    path = tmp_path / "file"
    versions = {b"a" * 200_000, b"b" * 200_000}
    write_atomically(path, b"a" * 200_000)
    program = (
        "import sys; from pathlib import Path; from genzoo.runs import write_atomically\n"
        "while True:\n    for letter in (b'a', b'b'): write_atomically(Path(sys.argv[1]), letter * 200_000)"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        seen = set()
        while len(seen) < 2 and writer.poll() is None:
            seen.add(path.read_bytes())
            assert seen <= versions
        for _ in range(200):
            assert path.read_bytes() in versions
    finally:
        writer.kill()
        writer.wait()
    assert seen == versions and path.read_bytes() in versions


# Status, events and results


def test_a_status_keeps_what_is_not_changed(run):
    before = run.status
    run.update_status(state="failed", why="because")
    assert run.status == {**before, "state": "failed", "why": "because"}


def test_events_come_back_in_their_order_without_a_last_line_that_was_cut(run):
    assert list(run.events()) == []
    run.log(event="train", step=1, values={"loss": 0.5})
    run.log(event="train", step=2, values={"loss": math.nan, "max": [math.inf]})
    expected = [
        {"event": "train", "step": 1, "values": {"loss": 0.5}},
        {"event": "train", "step": 2, "values": {"loss": None, "max": [None]}},  # JSON knows no NaN
    ]
    assert list(run.events()) == expected
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write('{"event":"train","note":"ü'.encode()[:-1])  # in the middle of a letter
    assert list(run.events()) == expected


def test_a_broken_line_in_the_middle_is_named(run):
    (run.path / "metrics.jsonl").write_text('{"event":1}\n{"event"\n{"event":3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2: broken JSON"):
        list(run.events())


def result(value: float, **setting: object) -> dict:
    return {"metrics": {"test/bpd": {"value": value, "card": {"protocol": {"n": 10}, "setting": setting}}}}


def test_a_score_replaces_only_that_of_the_same_card(run):
    first = run.write_result(result(3.0, seed=0))
    assert run.write_result(result(2.0, seed=1)) != first
    assert run.write_result(result(2.5, seed=0)) == first
    assert len(list((run.path / "results").iterdir())) == 2
    assert json.loads(first.read_text()) == run.result == result(2.5, seed=0)


# Broken files


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[1]"], ids=repr)
@pytest.mark.parametrize("name", ["status.json", "result.json"])
def test_broken_json_is_named_in_one_line(run, name, content):
    (run.path / name).write_bytes(content)
    with pytest.raises(RunError) as info:
        run.status if name == "status.json" else run.result  # noqa: B018
    assert str(run.path / name) in str(info.value) and "\n" not in str(info.value)


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"- 1", b"!!python/object/apply:os.mkdir [made]"], ids=repr)
def test_broken_yaml_is_named_in_one_line_and_never_executed(run, content, monkeypatch):
    monkeypatch.chdir(run.path)
    (run.path / "config.yaml").write_bytes(content)
    with pytest.raises(RunError) as info:
        run.config  # noqa: B018
    assert str(run.path / "config.yaml") in str(info.value) and "\n" not in str(info.value)
    assert not (run.path / "made").exists()


def test_what_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(RunError, match=r"run=.*/nowhere: no such directory"):
        Run(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"not a run directory, it has no config\.yaml"):
        Run(tmp_path)
    assert Run(run.path).config == yaml.safe_load((run.path / "config.yaml").read_text())


def test_hundreds_of_runs_are_read_without_torch():
    program = "import sys, genzoo.runs; assert not {'torch', 'hydra', 'numpy'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True
    )


def test_a_copy_is_completed_and_old_leftovers_are_swept(run):
    (run.path / "samples").rmdir()
    left, fresh = run.path / ".status.json-abcdefgh", run.path / "results" / ".x.json-abcdefgh"
    for path in (left, fresh):
        path.write_bytes(b"{")
    os.utime(left, (0, 0))
    run.complete()
    assert (run.path / "samples").is_dir() and fresh.exists() and not left.exists()
    assert (run.path / "config.yaml").is_file()
