"""Loggers hold what ``metrics.jsonl`` holds, each read back by its own tool; wandb neither asks nor connects."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from genzoo.training import loggers
from tests import children
from tests.commands import SMALL, TINY, genzoo, trained

VAE = [*SMALL["vae"], "trainer.grids=0", "trainer.saves=1"]


pytestmark = pytest.mark.usefixtures("without_a_login")


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
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


def history(records: list[dict], *names: str) -> list[dict[str, float]]:
    """What was logged with any of some names."""
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [row for row in rows if any(name in row for name in names)]


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
        assert set(opened["tags"]) == {"vae", "digits", "images=256"} and opened.get("run_group", "") == ""
        steps, scores = recorded(run)
        grids = [row for row in history(records, "samples.count") if row["samples.count"] == 1]
        assert [row["images"] for row in grids] == [256]
        assert len(list(run.glob("wandb/offline-run-*/files/media/images/samples_*.png"))) == 1
        rows = history(records, "train/lr", "test/bpd_upper")
        assert len(rows) == len(steps) + 1
        for row, step in zip(rows, steps, strict=False):
            close(row, **step)
        close(rows[-1], **scores, images=256)
        # Lightning says first that its own count is the axis of every curve; what is said last holds.
        axes = [record["metric"] for record in records if record["type"] == "metric"]
        assert (axes[-1]["glob_name"], axes[-1]["step_metric"]) == ("*", "images")
        assert [record["type"] for record in records].count("exit") == 1


def test_a_sweep_is_a_group_of_wandb(monkeypatch):
    monkeypatch.setenv("GENZOO_SWEEP", "sweep-0123abcd")
    for group, words in (("sweep-0123abcd", []), ("mine", ["logger.group=mine"])):
        run = trained(*VAE, "logger=wandb", *words)
        (opened,) = (record["run"] for record in inspected(run) if record["type"] == "run")
        assert opened["run_group"] == group


OUTAGE = """
import os, signal, sys
from pathlib import Path
import wandb
from genzoo.__main__ import main

counted, log = [], wandb.Run.log

def broken(self, *arguments, **details):
    counted.append(1)
    if len(counted) == 2 and {trouble!r} == "refuses":
        raise ConnectionError("no route to host")
    if len(counted) == 2:
        for process in Path("/proc").glob("[0-9]*/stat"):
            if process.read_text().split()[3] == str(os.getpid()):  # the service that talks to the network
                os.kill(int(process.parent.name), signal.SIGKILL)
    return log(self, *arguments, **details)

wandb.Run.log = broken
sys.argv = {words!r}
main()
"""


@pytest.mark.parametrize("trouble", ["refuses", "dies"])
def test_an_outage_of_wandb_changes_nothing_in_the_run(here, trouble):
    words = [*TINY, *VAE, "logger=wandb", "outputs=broken"]
    program = OUTAGE.format(trouble=trouble, words=["genzoo", *words])
    environment = {**os.environ, "PYTHONPATH": str(Path(loggers.__file__).parents[2])}
    command = [sys.executable, "-c", program]
    done = children.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("genzoo: wandb fails, and the run goes on without it") == 1
    plain, (run,) = trained(*VAE, "logger=csv", "outputs=plain"), Path("broken/vae-digits").iterdir()
    for name in ("weights.safetensors", "ema.safetensors"):
        assert (run / "checkpoints/step-4" / name).read_bytes() == (plain / "checkpoints/step-4" / name).read_bytes()
    steps = [recorded(path)[0] for path in (plain, run)]
    assert steps[0] == steps[1] and recorded(plain)[1]["test/bpd_upper"] == recorded(run)[1]["test/bpd_upper"]
    assert json.loads((run / "status.json").read_text())["state"] == "done"


def test_wandb_out_of_reach_is_kept_offline(monkeypatch, here):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    code, _, err = genzoo(*TINY, *VAE, "logger=wandb", "logger.mode=online")
    assert code == 0 and "wandb cannot be reached, the run is kept offline" in err
    (run,) = Path("outputs/vae-digits").iterdir()
    assert history(inspected(run), "test/bpd_upper")


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


@pytest.mark.parametrize(
    ("asked", "environment", "key", "expected"),
    [
        ("auto", {}, True, "online"),
        ("auto", {}, False, "offline"),
        ("auto", {"WANDB_MODE": "offline"}, True, "offline"),
        ("auto", {"WANDB_MODE": "dryrun"}, True, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, True, "disabled"),
        ("auto", {"WANDB_MODE": "Disabled"}, True, "disabled"),
        ("auto", {"WANDB_MODE": "online"}, False, "offline"),
        ("auto", {"WANDB_MODE": "run"}, True, "online"),
        ("auto", {"WANDB_MODE": ""}, True, "online"),
        ("auto", {"WANDB_DISABLED": "true"}, True, "disabled"),
        ("auto", {"WANDB_DISABLED": "false"}, True, "online"),
        ("disabled", {}, True, "disabled"),
        ("offline", {"WANDB_MODE": "online"}, True, "offline"),
        ("online", {"WANDB_MODE": "offline"}, True, "online"),
        ("online", {}, False, ValueError),
        ("auto", {"WANDB_MODE": "nowhere"}, True, ValueError),
    ],
)
def test_the_network_is_used_as_wandb_was_told(here, monkeypatch, asked, environment, key, expected):
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(here))
    for name, value in {**environment, **({"WANDB_API_KEY": "0" * 40} if key else {})}.items():
        monkeypatch.setenv(name, value)
    if expected is ValueError:
        with pytest.raises(ValueError, match=r"needs a key|choose from online, offline, disabled"):
            loggers.WandB(mode=asked)
    else:
        assert loggers.wandb_mode(asked) == expected
        assert loggers.WandB(mode=asked).mode == asked


@pytest.mark.parametrize("place", ["wandb", "configured"])
def test_what_wandb_has_written_down_is_followed(here, monkeypatch, place):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(here / "configured"))
    (here / place).mkdir()
    (here / place / "settings").write_text("[default]\nmode = offline\n")  # by `wandb offline`
    assert loggers.wandb_mode("auto") == "offline"
    (here / place / "settings").write_bytes(b"\xff nonsense")
    assert loggers.wandb_mode("auto") == "online"


def test_a_user_without_a_home_has_no_key(monkeypatch):
    monkeypatch.delenv("NETRC")
    monkeypatch.setattr(loggers, "home", lambda: None)
    assert not loggers.has_wandb_key()


@pytest.mark.parametrize("mode", ["offline", "disabled", "dryrun"])
def test_a_mode_without_the_network_contacts_nobody(here, monkeypatch, mode):
    contacts: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):  # until it is closed
                while True:
                    contacts.append(server.accept())

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_MODE", mode)
        names = ["logger.project=mine", "logger.entity=ours", "logger.tags=[one,two]"]
        run = trained(*VAE, "logger=wandb", *names)
        code, _, err = genzoo("compare", f"runs={run}", "logger=wandb", *names)
        assert code == 0, err
    assert not contacts
    if mode == "disabled":
        assert not list(here.rglob("*.wandb"))
    else:
        (opened,) = (record["run"] for record in inspected(run) if record["type"] == "run")
        assert (opened["project"], opened["entity"]) == ("mine", "ours") and {"one", "two", "vae"} <= set(
            opened["tags"]
        )


@pytest.mark.parametrize("words", [["logger.tags=['']"], [f"logger.tags=[{'x' * 65}]"], ["logger.project='a/b'"]])
def test_names_that_wandb_would_not_take_are_refused_before_there_is_a_run(here, words):
    code, _, err = genzoo(*TINY, *VAE, "logger=wandb", *words)
    assert code == 2 and err.startswith("genzoo: logger: ") and err.count("\n") == 1 and not list(here.iterdir())
