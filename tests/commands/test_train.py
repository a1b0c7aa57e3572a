"""Training by the command: what is in the run directory, what is on the terminal, and what a failure leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from genzoo.runs import Run
from genzoo.training import fit as fitting
from genzoo.training.module import GenerativeModule
from tests.commands import SMALL, TINY, described, genzoo, trained

REPOSITORY = Path(__file__).parents[2]
VAE = [*SMALL["vae"], "trainer.grids=2", "trainer.saves=2"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def events(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_directory_holds_all_that_it_promises(here):
    run = trained(*VAE, "seed=3", "outputs=here")
    assert run.parent == Path("here/vae-digits")

    config = yaml.safe_load((run / "config.yaml").read_text())
    expected = described(*TINY, *VAE, "seed=3", "outputs=here")
    expected["budget"]["seconds"] = None  # of the preset, which naming another limit clears
    assert config.pop("trainer") == {**expected.pop("trainer"), "precision": config_precision(run)}
    assert config == {key: value for key, value in expected.items() if key not in ("resume", "trust")}

    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["why"], status["schema"]) == ("done", None, 1)
    assert (status["step"], status["images"], status["planned_images"]) == (4, 256, 256)
    assert status["train_seconds"] > 0 and status["pid"] == os.getpid()
    assert status["command"].startswith("python -m genzoo budget.images=256")
    assert status["versions"]["python"] == sys.version.split()[0]

    assert (status["model"], status["threads"]) == ("vae", 1)
    assert {name: (d["unit"], d["better"]) for name, d in status["diagnostics"].items()} == {
        "train/distortion": ("nats", "lower"),
        "train/rate": ("nats", None),
        "train/mmd": ("squared MMD", "lower"),
        "train/multiplier": ("weight", None),
    }

    # Every step is recorded; pictures and checkpoints are made in the middle and at the end.
    steps = [event for event in events(run) if event["event"] == "train"]
    assert [event["images"] for event in steps] == [64, 128, 192, 256]
    assert [event["flops"] * 4 for event in steps] == [i * status["train_flops"] for i in (1, 2, 3, 4)] != [0] * 4
    assert {"train/distortion", "train/rate", "train/lr", "train/grad_norm"} == set(steps[0]["values"])
    assert [e["file"] for e in events(run) if e["event"] == "samples"] == ["samples/step-2.png", "samples/step-4.png"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-2.png", "step-4.png"]
    assert (run / "samples.png").read_bytes() == (run / "samples" / "step-4.png").read_bytes()
    with Image.open(run / "samples.png") as picture:
        assert picture.size == (8 * 58 + 2, 8 * 58 + 2)  # 8x8 digits, each enlarged to 56 pixels
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-4"]

    # The table's numbers are the last event's and the result's.
    (scored,) = (path for path in (run / "results").iterdir())
    result = json.loads((run / "result.json").read_text())
    assert json.loads(scored.read_text()) == result
    values = {name: entry["value"] for name, entry in result["metrics"].items()}
    assert events(run)[-1]["values"] == values
    assert set(values) >= {"test/bpd_upper", "sampling/samples_per_second", "sampling/nfe", "model/parameters"}


def config_precision(run: Path) -> str:
    """What "auto" came to is written down; it depends on the processor."""
    precision = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["precision"]
    assert precision in ("32-true", "bf16-mixed")
    return precision


def test_a_terminal_shows_progress_then_the_table_then_the_path(here):
    """A true process, from another directory: not one word of the libraries underneath."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "genzoo", *TINY, *VAE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here)
    assert done.returncode == 0
    progress = done.stderr.splitlines()
    assert progress
    for line in progress:
        assert re.fullmatch(r"step \d/4  distortion [-.\d]+  rate [.\d]+  [,\d]+ images/s  \d+ s left", line)

    *table, last = done.stdout.splitlines()
    run = here / last.removeprefix("run: ")
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    for name, entry in metrics.items():
        (row,) = (line for line in table if f" {name} " in line)
        value = entry["value"]
        assert f" {value:,.4f} " in row if isinstance(value, float) else f" {value:,} " in row
        assert entry["card"]["protocol"]["unit"] in row
    assert sorted(path.name for path in here.iterdir()) == ["outputs"]


@pytest.mark.parametrize(
    "words", [SMALL["ddpm"], SMALL["wgan_gp"], ["model=realnvp", "data=moons"]], ids=lambda w: w[0]
)
def test_every_family_trains_by_the_same_command(words):
    run = trained(*words, "trainer.grids=1", "budget.images=128")
    assert json.loads((run / "status.json").read_text())["images"] == 128


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    def weights(run: Path) -> bytes:
        return (run / "checkpoints" / "step-4" / "weights.safetensors").read_bytes()

    first, again, other = (weights(trained(*VAE, f"seed={seed}", "~logger")) for seed in (0, 0, 1))
    assert first == again != other


def test_a_loss_that_is_not_finite_ends_the_run_with_code_3_and_says_where():
    code, out, err = genzoo(*TINY, *VAE, "optimizer.lr=1e30", "trainer.clip=null")
    assert (code, out) == (3, "")
    last = err.splitlines()[-1]
    assert re.fullmatch(
        r"genzoo: (loss term '\w+'|gradient|loss) is not finite at step \d: try a lower optimizer.lr.*", last
    )
    (status,) = (json.loads(path.read_text()) for path in Path("outputs").rglob("status.json"))
    assert status["state"] == "failed"
    assert status["why"] == f"NonFiniteError: {last.removeprefix('genzoo: ')}"


def failing(error: BaseException):
    def fit(*_, **__):
        raise error

    return fit


def test_a_bug_in_training_is_written_down_and_raised(monkeypatch):
    monkeypatch.setattr(fitting, "fit", failing(KeyError("weights")))
    with pytest.raises(KeyError):
        genzoo(*TINY, *VAE)
    (status,) = (json.loads(path.read_text()) for path in Path("outputs").rglob("status.json"))
    assert (status["state"], status["why"]) == ("failed", "KeyError: 'weights'")


def test_an_interrupt_in_the_middle_of_training_is_an_interrupt(monkeypatch):
    """Lightning would turn it into an exit with code 1, and stay deaf to further ones."""
    original = GenerativeModule.step

    def step(self):
        original(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(GenerativeModule, "step", step)
    code, _, err = genzoo(*TINY, *VAE)
    assert (code, err.splitlines()[-1]) == (130, "genzoo: stopped by SIGINT")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (status,) = (json.loads(path.read_text()) for path in Path("outputs").rglob("status.json"))
    assert (status["state"], status["why"]) == ("failed", "Stopped: stopped by SIGINT")


def test_a_training_is_scored_with_its_averaged_weights():
    run = trained(*SMALL["realnvp"], "optimizer.lr=0.1", "trainer.precision=32-true")
    said = Run(run).result["metrics"]["test/bpd"]["value"]
    scores = {}
    for ema in ("true", "false"):
        assert (
            genzoo(
                "evaluate", f"run={run}", f"ema={ema}", "metrics.n=0", "metrics.events=16", "metrics.throughput=2"
            ).code
            == 0
        )
        scores[ema] = Run(run).result["metrics"]["test/bpd"]["value"]
    assert said == pytest.approx(scores["true"], rel=1e-6)
    assert said != pytest.approx(scores["false"], rel=1e-4)


def test_scores_on_the_way_are_logged_at_their_steps_and_change_nothing(here):
    words = [*SMALL["ddpm"], "budget.images=640", "trainer.grids=0", "metrics.n=70"]
    plain, scored = trained(*words), trained(*words, "trainer.scores=4", "trainer.score_samples=70")
    found = [event for event in events(scored) if event["event"] == "interim"]
    assert [event["step"] for event in found] == [2, 4, 6, 8]  # the tenth and last step is scored for good
    assert all(event["values"]["train/fd_digits"] > 0 and event["images"] == 64 * event["step"] for event in found)
    splits = {name.partition("/")[0] for event in found for name in event["values"]}
    assert splits == {"train", "validation", "memorisation"}  # the test split is read once, at the end
    losses = [[e["values"] for e in events(run) if e["event"] == "train"] for run in (plain, scored)]
    assert losses[0] == losses[1]
    weights = [(run / "checkpoints/step-10/ema.safetensors").read_bytes() for run in (plain, scored)]
    assert weights[0] == weights[1]
