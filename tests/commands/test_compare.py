"""``genzoo compare`` as a user types it, and the comparison at the end of a sweep."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from genzoo.jobs.sweep import JobResult, objective
from genzoo.runs import Run
from tests.commands import SMALL, TINY, genzoo, trained
from tests.report import run, scored

FILES = ["index.html", "leaderboard.csv", "leaderboard.md"]


pytestmark = pytest.mark.usefixtures("without_a_login")


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(folder: str = "comparison") -> dict[str, dict[str, str]]:
    with open(Path(folder, "leaderboard.csv")) as file:
        return {line["row"]: line for line in csv.DictReader(file) if line["metric"] == "test/fd_digits"}


@pytest.mark.parametrize("words", [["runs=a,b"], ["runs=[a,b]"], ["runs=."], ["runs=a/vae-digits,b"]])
def test_several_folders_are_one_comparison(here, words):
    run(here / "a", "vae", metrics=scored(3.0))
    run(here / "b", "gan", metrics=scored(2.0))
    code, out, err = genzoo("compare", *words)
    assert (code, out, err) == (0, f"comparison: {Path('comparison/index.html')}\n", "")
    assert sorted(path.name for path in Path("comparison").iterdir()) == FILES
    assert {label: float(row["mean"]) for label, row in rows().items()} == {"gan": 2.0, "vae": 3.0}


@pytest.mark.parametrize(
    ("words", "because"),
    [
        (["runs=nowhere"], "runs=nowhere: no such directory"),
        (["runs=empty"], "runs=empty: contains no run"),
        ([], "runs is missing"),
        (["run=a"], "unknown key 'run': did you mean 'runs'?"),
        (["runs=a", "out=a/vae-digits/file"], "out=a/vae-digits/file: "),
        (["runs=a", "logger=csv"], "logger: a comparison supports logger=wandb alone"),
        (["runs=a", "logger=wandb", "logger.mode=online"], "logger: mode=online needs a key"),
        (["runs=a", "workspace=nothing"], "workspace=nothing: "),
        (["runs=[]"], "runs=[]: "),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here, words, because):
    run(here / "a", "vae", metrics=scored(3.0))
    (here / "empty").mkdir()
    (here / "a" / "vae-digits" / "file").write_text("")
    code, _, err = genzoo("compare", *words)
    assert code == 2 and err.startswith("genzoo: ") and err.count("\n") == 1 and because in err


def test_runs_without_a_score_are_listed(here):
    run(here / "a", "vae", state="failed", why="OutOfMemoryError: too large")
    run(here / "a", "gan")
    assert genzoo("compare", "runs=a").code == 0
    text = Path("comparison/leaderboard.md").read_text()
    assert "failed: OutOfMemoryError: too large" in text and "finished but not scored" in text


def test_a_comparison_is_a_run_of_wandb_without_a_login(here):
    pytest.importorskip("wandb")
    for model, fd in (("vae", 3.0), ("gan", 2.0)):
        run(here / "a", model, metrics=scored(fd))
    assert genzoo("compare", "runs=a", "logger=wandb", "logger.group=all").code == 0
    (file,) = Path("comparison").glob("wandb/offline-run-*/*.wandb")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in said.splitlines()]
    (opened,) = (record["run"] for record in records if record["type"] == "run")
    assert (opened["display_name"], opened["job_type"], opened["run_group"]) == ("comparison", "comparison", "all")
    (logged,) = (record["history"]["item"] for record in records if record["type"] == "history")

    def table(name: str) -> dict:
        return json.loads((file.parent / "files" / logged[f"{name}.path"]).read_text())

    board = table("digits/leaderboard")
    means = {row[0]: row[board["columns"].index("test/fd_digits mean")] for row in board["data"]}
    assert means == {"gan": 2.0, "vae": 3.0}
    assert (logged["digits/samples.count"], logged["digits/samples.captions"]) == (2, ["gan", "vae"])
    assert len(list(file.parent.glob("files/media/images/digits/samples_*.png"))) == 1  # the same pixel twice
    assert table("digits/test/fd_digits_table")["data"] == [["gan", 2.0], ["vae", 3.0]]
    assert '"n_fake": 1000' in dict(table("digits/protocols")["data"])["test/fd_digits"]


def test_a_workspace_without_a_login_is_a_file(here):
    pytest.importorskip("wandb_workspaces")
    code, out, _ = genzoo("compare", "workspace=me/zoo")
    assert code == 0 and "no login" in out
    view = json.loads(Path("comparison/workspace.json").read_text())
    assert (view["entity"], view["project"]) == ("me", "zoo")
    text = json.dumps(view)
    for words in ("samples", "test/fd_fashion_mnist", "sampling/nfe", "training/flops", '"images"'):
        assert words in text


# Sweeps


def test_a_sweep_ends_with_its_comparison(here, request):
    words = ["-m", *TINY, *SMALL["vae"], "metrics.n=40", "metrics.force=true", "seed=0,1"]
    code, out, _ = genzoo(*words)
    assert code == 0 and out.endswith(f"comparison: {Path('outputs/comparison/index.html')}\n")
    (row,) = rows("outputs/comparison").values()
    assert (row["seeds"], row["n"], row["stderr_of"]) == ("0 1", "2", "seeds")
    run_dir, record = Path("outputs/vae-digits").iterdir()
    shutil.rmtree(record / "checkpoints")  # the small record is enough to know that a job is done
    (record / "result.json").unlink()
    before = {path: path.read_bytes() for path in Path("outputs/vae-digits").rglob("*") if path.is_file()}
    code, out, _ = genzoo(*words)
    assert code == 0 and out.count("already done: ") == 2
    assert {path: path.read_bytes() for path in Path("outputs/vae-digits").rglob("*") if path.is_file()} == before
    assert not list(here.glob(".sweep-*"))

    request.getfixturevalue("forked_jobs")  # the jobs above began as a user's
    code, out, _ = genzoo(
        "-m", "evaluate", f"run={run_dir}", "metrics.n=40,50", "metrics.force=true", "metrics.events=16"
    )
    assert code == 0 and (run_dir / "comparison" / "index.html").is_file()
    text = (run_dir / "comparison" / "leaderboard.md").read_text()
    assert "n_fake is 50" in text or "n_fake is 40" in text


def test_a_sweep_of_scorings_goes_on_where_a_run_is_missing(here, forked_jobs):
    made = trained(*SMALL["vae"], "metrics.n=0")
    code, out, err = genzoo("-m", "evaluate", f"run=nowhere,{made}", "metrics.n=0", "metrics.events=16")
    assert code == 2 and err.count("genzoo: job ") == 1 and "run=nowhere: no such directory" in err
    assert out.endswith(f"comparison: {made.resolve() / 'comparison' / 'index.html'}\n")


def test_a_comparison_that_cannot_be_written_is_said_after_the_failures(here, forked_jobs):
    (here / "outputs").mkdir()
    (here / "outputs" / "comparison").write_text("a file is in the way")
    code, _, err = genzoo("-m", *TINY, *SMALL["vae"], "optimizer.lr=-1,1e-3")
    assert code == 2
    said = [line for line in err.splitlines() if line.startswith("genzoo: ")]
    assert "Invalid learning rate" in said[-2] and said[-1].startswith("genzoo: out=outputs/comparison: ")


def test_a_launcher_runs_jobs_side_by_side(here):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    code, _, err = genzoo(
        *["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *TINY, *SMALL["vae"]],
        "optimizer.lr=1e-3,-1",
    )
    assert code == 2 and err.count("genzoo: job ") == 1 and "Invalid learning rate: -1" in err
    states = [json.loads(path.read_text())["state"] for path in Path("outputs").glob("*/*/status.json")]
    assert states == ["done"] and Path("outputs/comparison/index.html").is_file()


SEARCH = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]


def test_a_search_minimises_its_objective_on_the_validation_split(here, forked_jobs):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = ["objective=validation/bpd_upper", *TINY, *SMALL["vae"], "optimizer.lr=interval(1e-4,1e-2)"]
    assert genzoo(*SEARCH, *words).code == 0
    runs = [Run(path.parent) for path in Path("outputs").glob("*/*/status.json")]
    rates = [made.config["optimizer"]["lr"] for made in runs]
    assert len(set(rates)) == 2 and all(1e-4 <= rate <= 1e-2 for rate in rates)
    for metrics in [made.result["metrics"] for made in runs]:
        assert "validation/bpd_upper" in metrics and not [name for name in metrics if name.startswith("test/")]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("objective=test/bpd_upper", "a search chooses on the validation split: objective=validation/bpd_upper"),
        ("metrics.split=test", "a search chooses on the validation split: omit it"),
    ],
)
def test_a_search_on_the_test_split_is_refused(here, word, said):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    code, _, err = genzoo(*SEARCH, word, *TINY, *SMALL["vae"], "optimizer.lr=interval(1e-4,1e-2)")
    assert code == 2 and said in err and not list(Path("outputs").glob("*/*/status.json"))


def test_the_objective_of_a_job_is_the_score_of_its_run(here):
    made = run(here, metrics=scored(3.0))
    ended = JobResult("", 0, "", str(made.path))
    assert objective(ended, "sampling/nfe") == 50 and objective(ended, None) == 3.0
    assert objective(ended, "sampling/samples_per_second") == -100  # of which more is better
    assert objective(ended, "no/such") == objective(JobResult("", 1, "", str(made.path)), None) == float("inf")
    assert objective(JobResult("", 2, "", None), None) == float("inf")
