"""One run that is damaged or hostile is named and left out with its cause, and the others are compared as without it."""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from genzoo.report import leaderboard, page, records, texts
from genzoo.report.comparison import write_comparison as write
from tests.report import PNG, entry, run, scored

FD = "test/fd_digits"
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def others(tmp_path) -> list[Path]:
    """Two runs that are whole."""
    return [
        run(tmp_path / "runs", model=m, seed=i, metrics=scored(1.0 + i, i)).path for i, m in enumerate(("vae", "gan"))
    ]


@pytest.fixture
def bad(tmp_path, others) -> Path:
    """A third, which is damaged by each test."""
    return run(tmp_path / "runs", model="ddpm", metrics=scored(5.0)).path


def compared(folder: Path) -> tuple[list[str], list[str]]:
    """Compare all runs below a folder, all of a page but its frame; return the families of the rows, and what is left out."""
    found, broken = records.read(records.find([folder]))
    tables = leaderboard.tables(leaderboard.rows(found))
    content, _ = page.payload(found, tables, broken)
    json.dumps(content, allow_nan=False)
    texts.to_csv(tables), texts.to_markdown(tables, broken)
    return sorted(row.model for table in tables for row in table.rows), broken


def left_out(bad: Path, file: str, *because: str) -> None:
    """Check that the run is named with its cause, and the others are compared."""
    models, broken = compared(bad.parent.parent)
    assert models == ["gan", "vae"]
    (said,) = broken
    assert said.startswith(f"{bad / file}: ") and "\n" not in said and len(said) < 1000
    assert all(word in said for word in because), said


Entry = dict[str, Any]
ENTRIES: dict[str, tuple[Callable[[Entry], Any], str]] = {
    "no value": (lambda e: e.pop("value"), "value"),
    "a text for a value": (lambda e: e.update(value="1.0"), "value"),
    "a list for a value": (lambda e: e.update(value=[1.0]), "value"),
    "a mapping for a value": (lambda e: e.update(value={"a": 1}), "value"),
    "truth for a value": (lambda e: e.update(value=True), "value"),
    "a text for an error": (lambda e: e.update(stderr="0.1"), "stderr"),
    "a negative error": (lambda e: e.update(stderr=-0.1), "stderr"),
    "a list for a direction": (lambda e: e.update(better=["lower"]), "better"),
    "no card": (lambda e: e.pop("card"), "card"),
    "a text for a card": (lambda e: e.update(card="x"), "card"),
    "no protocol": (lambda e: e["card"].pop("protocol"), "card.protocol"),
    "a list for a protocol": (lambda e: e["card"].update(protocol=[]), "card.protocol"),
    "no setting": (lambda e: e["card"].pop("setting"), "card.setting"),
    "a number for a setting": (lambda e: e["card"].update(setting=3), "card.setting"),
    "a mapping for a unit": (lambda e: e["card"]["protocol"].update(unit={}), "card.protocol.unit"),
}


def result_of(bad: Path) -> tuple[Path, dict[str, Any]]:
    (path,) = (bad / "results").iterdir()
    return path, json.loads(path.read_text())


@pytest.mark.parametrize("name", ENTRIES)
def test_a_score_that_is_none_is_named(bad, name):
    change, because = ENTRIES[name]
    path, result = result_of(bad)
    change(result["metrics"][FD])
    path.write_text(json.dumps(result))
    left_out(bad, f"results/{path.name}", f"metrics.{FD}.{because}")


METRICS = [
    *(None, 3, "x", [], [1], {FD: None}, {FD: 3}, {FD: []}, {FD: "x"}, {"": entry(1.0)}, {"x" * 201: entry(1.0)}),
    {f"test/{i}": entry(1.0) for i in range(1001)},
]


@pytest.mark.parametrize("metrics", METRICS, ids=lambda metrics: repr(metrics)[:30])
def test_scores_of_another_kind_are_named(bad, metrics):
    path, result = result_of(bad)
    path.write_text(json.dumps({**result, "metrics": metrics}))
    left_out(bad, f"results/{path.name}", "metrics")


@pytest.mark.parametrize(
    "content", [b"[]", b'{"metrics":{"a":{"value":NaN}}}', b'{"a":1,"a":2}', b"\xff", b'{"scored":[1]}']
)
def test_a_file_of_scores_that_is_none_is_named(bad, content):
    (bad / "results" / "1.json").write_bytes(content)
    left_out(bad, "results/1.json")


def test_more_files_of_scores_than_anybody_has_are_named(bad):
    path, _ = result_of(bad)
    for i in range(records.RESULTS):
        (bad / "results" / f"{i}.json").write_bytes(path.read_bytes())
    left_out(bad, "results", "more than 200 files")


STATUS = {
    "state": [["done"], {}, 3, True],
    "why": [["x"], {"a": 1}, 5],
    "model": [["vae"], {"a": 1}, 3, "x" * 20_000],
    "command": [["a"], 3],
    "git_commit": [3, []],
    "started": [3, {}],
    "machine": [3, [], "x"],
    "diagnostics": [[1], "x", {"train/loss": 3}, {"train/loss": [1]}, {str(i): {} for i in range(1001)}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in STATUS.items() for value in values])
def test_a_status_of_other_types_is_named(bad, key, value):
    status = json.loads((bad / "status.json").read_text())
    (bad / "status.json").write_text(json.dumps({**status, key: value}))
    left_out(bad, "status.json", key)


CONFIG = {
    "data": [3, [], "digits", {"name": 3}, {"name": ["a"]}, {"name": "x" * 101}],
    "seed": ["x", [1], {}, 1.5, True],
    "budget": [3, [1], {"images": "many"}, {"images": [1]}, {"seconds": {}}, {"flops": True}],
    "model": [{f"k{i}": i for i in range(2001)}],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in CONFIG.items() for value in values])
def test_a_configuration_of_other_types_is_named(bad, key, value):
    config = yaml.safe_load((bad / "config.yaml").read_text())
    (bad / "config.yaml").write_text(yaml.safe_dump({**config, key: value}))
    left_out(bad, "config.yaml")


EVENTS = [
    *(b"3", b"[1]", b'"x"', b"null", b"{}", b"{", b'{"event":1}', b'{"event":{"a":1}}', b'{"event":["train"]}'),
    *(b'{"event":"train"}', b'{"event":"train","values":[1]}', b'{"event":"train","values":{"a":"x"}}'),
    *(b'{"event":"train","values":{"a":[1]}}', b'{"event":"train","values":{"a":{"b":1}}}'),
    *(b'{"event":"interim","values":{"a":true}}', b'{"event":"train","values":{},"images":"x"}'),
    *(b'{"event":"train","values":{},"seconds":[1]}', b'{"event":"train","values":{"a":NaN}}'),
    *(b'{"event":"train","values":{"a":1e999}}', b'{"event":"train","step":-1,"values":{}}'),
    b'{"event":"train","values":{"a":1,"a":2}}',
    b'{"event":"train","values":{' + b",".join(b'"%d":1' % i for i in range(1001)) + b"}}",
]


@pytest.mark.parametrize("line", EVENTS, ids=lambda line: line.decode()[:50])
def test_an_event_that_is_none_takes_the_curves_behind_it_away_and_no_score(bad, line):
    path = bad / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], line, b"\n", *lines[3:]]))
    models, broken = compared(bad.parent.parent)
    assert models == ["ddpm", "gan", "vae"]
    (said,) = broken
    assert said.startswith(f"{path}: line 4: ")
    (record,), _ = records.read([bad])
    assert len(record.events) == 3


def test_a_picture_that_is_none_and_files_in_the_place_of_folders_hide_no_run(bad, others):
    for path, content in ((bad / "samples.png", b"no picture"), (others[0] / "samples.png", PNG[:-5])):
        path.write_bytes(content)
    shutil.rmtree(bad / "samples")
    (bad / "samples").write_bytes(b"x")
    assert compared(bad.parent.parent) == (["ddpm", "gan", "vae"], [])
    shutil.rmtree(bad / "results")
    (bad / "results").write_bytes(b"x")
    assert compared(bad.parent.parent)[0] == ["gan", "vae"]


def test_pictures_of_all_runs_together_have_a_limit(tmp_path, monkeypatch):
    for i in range(4):
        made = run(tmp_path, model=f"m{i}", metrics=scored(1.0 + i))
        (made.path / "samples.png").write_bytes(PNG + bytes(1000 + i))
    monkeypatch.setattr(page, "PICTURES", 3000)
    found, _ = records.read(records.find([tmp_path]))
    content, pictures = page.payload(found, leaderboard.tables(leaderboard.rows(found)), [])
    shown = [row["picture"] is not None for table in content["tables"] for row in table["rows"]]
    assert shown == [True, True, False, False] and len(pictures) == 2


def mutated(value: Any, rng: random.Random) -> Any:
    """Put something else into one place of a tree."""
    odd: list[Any] = [None, True, -1, 0, 1e99, "x", "", [], {}, [[]], {"a": {}}, "=cmd()", "<b>", 10**50, [1, "a"]]
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        how = rng.random()
        rest = {k: v for k, v in value.items() if k != key}
        if how < 0.1:
            return rest
        return {
            **rest,
            key if how > 0.2 else rng.choice(["", "value", "x" * 300, "__proto__"]): mutated(value[key], rng),
        }
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(value[place], rng), *value[place + 1 :]]
    return rng.choice(odd)


def test_whatever_stands_in_the_files_of_a_run_the_others_are_compared(bad):
    """Each file of a run is changed somewhere; the run is left out by name or it is compared, and nothing fails."""
    rng, named = random.Random(0), 0
    result, _ = result_of(bad)
    files = [bad / "status.json", result, bad / "config.yaml", bad / "metrics.jsonl"]
    whole = {path: path.read_bytes() for path in files}
    for i in range(200):
        path = files[i % 4]
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in whole[path].splitlines()]
            place = rng.randrange(len(lines))
            lines[place] = mutated(lines[place], rng)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        elif path.suffix == ".yaml":
            path.write_text(yaml.safe_dump(mutated(yaml.safe_load(whole[path]), rng)))
        else:
            path.write_text(json.dumps(mutated(json.loads(whole[path]), rng)))
        models, broken = compared(bad.parent.parent)
        assert models.count("gan") == models.count("vae") == 1
        assert all(said.startswith(f"{bad}/") for said in broken) and len(broken) <= 1
        named += len(broken)
        path.write_bytes(whole[path])
    assert named > 50


# Whole runs, and many


def test_every_run_of_our_own_experiments_is_read(tmp_path):
    folders = [path for path in (ROOT / "experiments").glob("*/runs") if path.is_dir()]
    if not folders:
        pytest.skip("the experiments are not here")
    found, broken = records.read(records.find(folders))
    assert found and broken == [] and all(record.results and record.events for record in found)


def test_a_secret_under_the_name_of_a_score_is_blotted_out(tmp_path):
    made = run(tmp_path, metrics=scored(1.0))
    path, result = result_of(made.path)
    result["metrics"]["api_key"] = entry(1.0, protocol={"unit": "hunter2hunter2"})
    result["metrics"][FD]["card"]["setting"]["password"] = "swordfish-9"
    path.write_text(json.dumps(result))
    (record,), _ = records.read([made.path])
    assert "hunter2" not in str(record.results) and "swordfish" not in str(record.results)
    assert record.results[0]["metrics"][FD]["value"] == 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux tells it")
def test_many_runs_take_little_time_and_memory(tmp_path):
    """Three hundred runs of 200 records each, with configurations of their own; a thousand are measured in experiments/."""
    first = run(tmp_path / "first", events=200, metrics=scored(1.0))
    config = yaml.safe_load((first.path / "config.yaml").read_text())
    for i in range(300):
        path = tmp_path / "runs" / f"m{i % 7}-digits" / str(i)
        shutil.copytree(first.path, path)
        (path / "config.yaml").write_text(yaml.safe_dump({**config, "optimizer": {"lr": i}}))
    program = (
        "import sys; from pathlib import Path; from genzoo.report.comparison import write_comparison\n"
        "write_comparison([sys.argv[1]], Path(sys.argv[2])); print(Path('/proc/self/status').read_text())"
    )
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-c", program, str(tmp_path / "runs"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 12, f"{spent:.1f} s of a processor, {time.monotonic() - begun:.1f} s in all"
    most = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    assert int(most) < 250 * 2**10  # kilobytes
    assert write([str(first.path)], tmp_path / "one").is_file()
