"""Loggers hold what ``metrics.jsonl`` holds, each read back by its own tool; wandb neither asks nor connects."""

from __future__ import annotations

import csv
import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from genzoo.training import loggers
from tests.commands import SMALL, TINY, genzoo, trained

VAE = [*SMALL["vae"], "trainer.grids=0", "trainer.saves=1"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return tmp_path


def recorded(run: Path) -> tuple[list[dict[str, float]], dict[str, float]]:
    """What ``metrics.jsonl`` says of each step, and the scores."""
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [e["values"] | {"images": e["images"]} for e in events if e["event"] == "train"], events[-1]["values"]


def close(row: dict[str, float], **expected: float) -> None:
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, rel=1e-5), name


def test_csv_holds_every_step_and_the_scores():
    run = trained(*VAE, "logger=csv")
    with open(run / "csv" / "metrics.csv") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    steps, scores = recorded(run)
    assert len(rows) == len(steps) + 1
    for row, step in zip(rows, steps, strict=False):
        close(row, **step, step=step["images"])
    close(rows[-1], **scores, step=256)


def test_tensorboard_holds_every_step_and_the_scores():
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trained(*VAE, "logger=tensorboard")
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    steps, scores = recorded(run)
    for name in ("train/distortion", "train/rate", "train/lr"):
        points = events.Scalars(name)
        assert [point.step for point in points] == [64, 128, 192, 256]
        assert [point.value for point in points] == pytest.approx([step[name] for step in steps], rel=1e-5)
    for name, value in scores.items():
        assert events.Scalars(name)[-1].value == pytest.approx(value, rel=1e-5)


def test_tensorboard_that_is_not_installed_is_said_before_there_is_a_run(monkeypatch, here):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = genzoo(*TINY, *VAE, "logger=tensorboard")
    assert (code, err) == (2, "genzoo: logger: TensorBoard is not installed: pip install 'genzoo[tensorboard]'\n")
    assert not list(here.iterdir())


def inspected(run: Path) -> list[dict]:
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def history(records: list[dict]) -> list[dict[str, float]]:
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [row for row in rows if "images" in row]


def test_wandb_keeps_each_run_of_a_sweep_apart_without_a_login_or_the_network(monkeypatch, here):
    def connect(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"), address
        return real(self, address)

    real = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked for something"))
    for seed in (0, 1):
        code, _, err = genzoo(*TINY, *VAE, "logger=wandb", f"seed={seed}")
        assert code == 0
        assert all(line.startswith("step ") for line in err.splitlines())

    runs = sorted(Path("outputs/vae-digits").iterdir())
    assert len(runs) == 2
    for seed, run in enumerate(runs):
        records = inspected(run)
        (opened,) = (record["run"] for record in records if record["type"] == "run")
        config = opened["config"]["update"]
        assert (config["seed"], config["model"]["latent_dim"]) == (seed, 4)
        assert opened["display_name"] == f"vae-digits/{run.name}"
        assert set(opened["tags"]) == {"VAE", "digits"}
        steps, scores = recorded(run)
        rows = history(records)
        assert len(rows) == len(steps) + 1
        for row, step in zip(rows, steps, strict=False):
            close(row, **step)
        close(rows[-1], **scores, images=256)
        # Lightning says first that its own count is the axis of every curve; what is said last holds.
        axes = [record["metric"] for record in records if record["type"] == "metric"]
        assert (axes[-1]["glob_name"], axes[-1]["step_metric"]) == ("*", "images")
        assert [record["type"] for record in records].count("exit") == 1


def test_wandb_is_online_only_where_a_key_is_found(monkeypatch, tmp_path):
    assert not loggers.has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert loggers.has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")  # the key is another host's
    assert not loggers.has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert loggers.has_wandb_key()
    assert loggers.WandB(mode="online").mode == "online"
