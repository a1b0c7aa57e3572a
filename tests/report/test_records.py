"""Run directories are found wherever they lie, and a broken one hides no other."""

from __future__ import annotations

import subprocess
import sys

import pytest

from genzoo.report import records
from genzoo.runs import RunError
from tests.report import run, scored


def test_runs_are_found_at_and_below_what_is_named_each_once(tmp_path):
    paths = [run(tmp_path / "a", seed=i).path for i in range(3)] + [run(tmp_path / "b" / "c", model="gan").path]
    assert sorted(records.find([tmp_path, tmp_path / "a", paths[0]])) == sorted(paths)
    assert records.find([paths[1]]) == [paths[1]]


def test_what_holds_no_run_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=f"runs={folder}: "):
            records.find([folder])


@pytest.mark.parametrize("file", ["config.yaml", "status.json", "result"])
@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe", b""])
def test_a_broken_run_is_said_and_the_others_are_read(tmp_path, file, content):
    bad, good = run(tmp_path, metrics=scored(1.0)), run(tmp_path, seed=1, metrics=scored(2.0, 1))
    path = next((bad.path / "results").iterdir()) if file == "result" else bad.path / file
    path.write_bytes(content)
    found, broken = records.read(records.find([tmp_path]))
    assert [record.path for record in found] == [good.path]
    assert len(broken) == 1 and str(path) in broken[0] and "\n" not in broken[0]


@pytest.mark.parametrize("line", [b"{\n", b"\xff\n", b"[1, 2]\n", b"7\n"])
def test_damaged_curves_take_no_score_away(tmp_path, line):
    made = run(tmp_path, metrics=scored(1.0))
    with open(made.path / "metrics.jsonl", "ab") as file:
        file.write(line)
    (record,), broken = records.read([made.path])
    assert record.results and len(record.events) == 6
    assert len(broken) == 1 and "metrics.jsonl: line 7: " in broken[0]


def test_names_are_as_short_as_tells_runs_apart(tmp_path):
    first, second = run(tmp_path / "deep" / "runs"), run(tmp_path / "deep" / "runs", model="gan")
    found, _ = records.read([first.path, second.path])
    assert [record.name for record in found] == [f"vae-digits/{first.path.name}", f"gan-digits/{second.path.name}"]


def test_an_old_run_is_named_by_its_directory(tmp_path):
    made = run(tmp_path, model="wgan_gp")
    made.update_status(model=None)
    (record,), _ = records.read([made.path])
    assert record.model == "wgan_gp"


def test_reading_needs_no_torch(tmp_path):
    run(tmp_path, metrics=scored(1.0))
    program = (
        "import sys; from pathlib import Path; from genzoo.report.comparison import write_comparison;"
        f"write_comparison([{str(tmp_path)!r}], Path({str(tmp_path / 'out')!r}));"
        "print([name for name in ('torch', 'pytorch_lightning', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
