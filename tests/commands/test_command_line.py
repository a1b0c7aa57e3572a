"""The command line itself: verbs, help, what a sweep does, and which end has which exit code.

The work of a command is replaced by a record of what it was asked to do; the work itself is tested beside this file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import genzoo as package
import genzoo.__main__ as command_line
from genzoo.config.compose import preflight
from genzoo.config.help import INTERNAL_GROUPS
from genzoo.config.overrides import expand_shorthands, join_runs
from genzoo.config.paths import CONF, VERBS
from genzoo.errors import UsageError
from genzoo.jobs import sweep
from genzoo.runs import Run, job_id
from genzoo.training.precision import NonFiniteError
from tests.commands import genzoo
from tests.conftest import composed

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[tuple[str, dict]]:
    """Replace the work by a list of what was asked for."""
    monkeypatch.chdir(tmp_path)
    calls: list[tuple[str, dict]] = []
    monkeypatch.setattr(command_line, "run", lambda verb, config, choices: calls.append((verb, config)))
    return calls


# Limits of the budget


def limits(words: str, *options: str) -> dict[str, float]:
    """Return the limits that are in force, the same where a job is checked as where Hydra shows it."""
    code, out, err = genzoo(*options, "model=vae", *words.split(), "--cfg", "job")
    assert code == 0, err
    job = preflight("train", ["model=vae", *words.split()], *options[1:])
    assert job is not None and job.config["budget"] == yaml.safe_load(out)["budget"]
    return {name: value for name, value in job.config["budget"].items() if value is not None and name != "samples"}


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", {"seconds": 60}),
        ("budget=smoke", {"images": 2000}),
        ("budget.samples=200", {"seconds": 60}),
        ("budget.images=9", {"images": 9}),
        ("++budget.images=9", {"images": 9}),
        ("budget.flops=1e9 data=moons", {"flops": 1e9}),
        ("budget=two_minutes budget.images=9", {"images": 9}),
        ("budget=smoke budget.seconds=7", {"seconds": 7}),
        ("budget.images=9 budget.seconds=7", {"images": 9, "seconds": 7}),
        ("budget.images=9 budget.seconds=7 budget.flops=1e9", {"images": 9, "seconds": 7, "flops": 1e9}),
        ("budget.images=null", {"seconds": 60}),
        ("budget.images=null budget.flops=1e9", {"flops": 1e9}),
        ("budget.images=9 budget.seconds=null", {"images": 9}),
        ("budget.images=9 budget.images=null", {"seconds": 60}),
    ],
)
def test_naming_limits_clears_those_of_the_preset(words, expected):
    assert limits(words) == expected


@pytest.mark.parametrize(
    "words, expected",
    [
        ("experiment=counted", {"images": 20000}),
        ("experiment=sampled", {"seconds": 60}),
        ("experiment=counted budget.seconds=7", {"seconds": 7}),
        ("experiment=counted budget.images=null", {"seconds": 60}),
        ("experiment=both", {"images": 20000, "seconds": 60}),
        ("budget=longer", {"flops": 1e15}),
        ("budget=longer experiment=counted", {"images": 20000}),
    ],
)
def test_limits_that_a_file_names_clear_those_of_the_preset(words, expected, tmp_path):
    files = {
        "experiment/counted.yaml": "# @package _global_\nbudget: {images: 20000}\n",
        "experiment/sampled.yaml": "# @package _global_\nbudget: {samples: 200}\n",
        "experiment/both.yaml": "# @package _global_\nbudget: {images: 20000, seconds: 60}\n",
        "budget/longer.yaml": "defaults: [minute, _self_]\nflops: 1e15\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert limits(words, "--config-dir", str(tmp_path)) == expected


def test_every_job_of_a_sweep_has_the_limits_that_it_names_and_is_found_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done: list[tuple[list[str], dict]] = []

    def do(sweep_name, verb, options, words, config, choices, **_):
        done.append((words, config))
        return sweep.JobResult("", 0, "", None)

    monkeypatch.setattr(sweep, "run_job", do)
    code, _, err = genzoo("-m", "model=vae", "budget.images=9,null,10")
    assert code == 0, err
    assert [config["budget"]["images"] for _, config in done] == [9, None, 10]
    assert [config["budget"]["seconds"] for _, config in done] == [None, 60, None]
    for words, config in done:  # as the process of the job understands them
        job = preflight("train", words)
        assert job is not None and job_id(job.config) == job_id(config)


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_has_one_limit(path):
    budget = composed(f"experiment={path.stem}", "data.source.root=data")["budget"]
    assert [name for name in ("images", "seconds", "flops") if budget[name] is not None] == ["images"]


# Help


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job"]], ids=" ".join)
def test_looking_around_takes_less_than_a_second_and_imports_no_torch(words):
    program = """
import atexit, sys, time
from genzoo.__main__ import main
atexit.register(lambda: print(time.process_time(), *sys.modules, file=sys.stderr))
main()
"""
    command = [sys.executable, "-c", program, *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    times = []
    for _ in range(3):  # the best of three is the command's own; the rest is the machine's
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=True)
        seconds, *modules = done.stderr.split()
        times.append(float(seconds))
    assert "trainer:\n" in done.stdout
    assert "hydra" in modules
    assert not {"torch", "pytorch_lightning", "sklearn", "numpy", "pandas", "plotly", "wandb"} & set(modules)
    assert min(times) < 1


@pytest.mark.parametrize("words", [["--version"], ["sample", "--version"]], ids=" ".join)
def test_the_version_is_that_of_genzoo(words):
    assert genzoo(*words) == (0, f"genzoo {package.__version__}\n", "")


def test_help_names_every_group_with_every_choice():
    lines = genzoo("--help").out.splitlines()
    for group in (path for path in CONF.iterdir() if path.is_dir() and path.name not in INTERNAL_GROUPS):
        choices = sorted(path.stem for path in group.glob("*.yaml"))
        assert f"{group.name}: {', '.join(choices)}" in lines


def test_help_says_what_genzoo_is_and_how_each_verb_is_called():
    code, out, err = genzoo("sample", "--help")
    assert (code, err) == (0, "")
    assert out.startswith("genzoo: families of generative models")
    for verb in VERBS:
        assert re.search(rf"python -m genzoo \[?{verb}\b", out)
    assert "== Configuration groups ==" in out
    assert "out: samples.png" in out  # the keys of this verb, not those of training


def examples() -> Iterator[list[str]]:
    """Yield the words of every command line that the help and the pages for readers show in full."""
    pages = [REPOSITORY / name for name in ("README.md", "GUIDE.md", "CONTRIBUTING.md")]
    for page in (genzoo("--help").out, *(path.read_text() for path in pages)):
        for line in re.findall(r"python -m genzoo ((?:-m |[a-z]+ )*(?:[\w.]+=[\w.,-]+ ?)+)", page):
            yield line.split()


def test_every_example_of_the_help_and_of_the_pages_composes():
    lines = list(examples())
    assert len(lines) > 25
    for words in lines:
        several, words = "-m" in words, [word for word in words if word not in ("-m", "explain")]
        verb = words.pop(0) if words[0] in VERBS else "train"
        words = expand_shorthands(verb, words)
        preflight(verb, words if several else join_runs(verb, words), sweep=several)


def test_cfg_shows_the_configuration_that_would_run():
    shown = genzoo("--cfg", "job", "--resolve", "model=ddpm", "data=moons").out
    assert yaml.safe_load(shown) == yaml.safe_load(yaml.safe_dump(composed("model=ddpm", "data=moons")))
    assert yaml.safe_load(genzoo("sample", "--cfg", "job").out)["run"] == "???"  # also of what is not complete yet


# Verbs


@pytest.mark.parametrize("words", [["seed=3"], ["train", "seed=3"]], ids=" ".join)
def test_no_verb_means_train(asked, words):
    assert genzoo(*words) == (0, "", "")
    assert asked == [("train", composed("seed=3"))]


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_a_verb_does_what_it_says(asked, verb):
    assert genzoo(verb, "run=here", "seed=3") == (0, "", "")
    assert asked == [(verb, composed("run=here", "seed=3", verb=verb))]


def test_a_misspelt_verb_is_answered_with_the_right_one(asked):
    assert genzoo("evalute", "run=here") == (2, "", "genzoo: unknown command 'evalute': did you mean 'evaluate'?\n")
    assert not asked


# Sweeps


@pytest.fixture
def jobs(monkeypatch, tmp_path) -> list[str]:
    """The words of every process that a sweep would start."""
    monkeypatch.chdir(tmp_path)
    started: list[str] = []

    def run_process(words, seconds, **environment):
        started.append(" ".join(words))
        return sweep.Outcome(0, "")

    monkeypatch.setattr(sweep, "run_process", run_process)
    return started


@pytest.mark.parametrize("line", ["-m model=vae,ddpm seed=0,1", "train model=vae,ddpm -m seed=0,1"])
def test_a_sweep_runs_every_combination_and_leaves_nothing_of_its_own(jobs, line, tmp_path):
    assert genzoo(*line.split()).code == 0
    assert jobs == [f"train model={model} seed={seed}" for model in ("vae", "ddpm") for seed in (0, 1)]
    assert not list(tmp_path.iterdir())


def test_jobs_that_fail_do_not_stop_the_others_and_are_listed_with_their_causes_at_the_end(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ends = {0: (0, ""), 1: (2, "the data are gone"), 2: (-9, "killed by SIGKILL"), 3: (0, "")}
    started = []

    def run_process(words, seconds, **environment):
        started.append(int(words[-1].partition("=")[2]))
        return sweep.Outcome(*ends[started[-1]])

    monkeypatch.setattr(sweep, "run_process", run_process)
    code, _, err = genzoo("-m", "seed=0,1,2,3")
    assert started == [0, 1, 2, 3]
    assert err == "genzoo: job seed=1: the data are gone\ngenzoo: job seed=2: killed by SIGKILL\n"
    assert code == 2


def test_a_sweep_that_is_started_again_runs_what_is_missing(jobs, tmp_path):
    for seed, state in enumerate(["done", "failed", "running"]):
        config = composed("model=vae", f"seed={seed}")
        run = Run.create(tmp_path / "outputs", "vae-digits", config, job_id(config))
        run.update_status(state=state)
    code, out, _ = genzoo("-m", "model=vae", "seed=0,1,2,3")
    assert code == 0 and out.startswith("already done: outputs/vae-digits/")
    assert jobs == [f"train model=vae seed={seed}" for seed in (1, 2, 3)]
    jobs.clear()
    assert genzoo("-m", "model=vae", "seed=0,3", "trainer.clip=0.5").code == 0
    assert len(jobs) == 2  # another job


def test_a_job_is_the_same_wherever_it_is_written_down():
    base = job_id(composed("model=vae"))
    assert job_id(composed("model=vae", "outputs=elsewhere", "~logger", "timeout=60")) == base
    for words in (["seed=1"], ["model=ddpm"], ["trainer.clip=0.5"], ["data=moons"]):
        assert job_id(composed("model=vae", *words)) != base


@pytest.mark.parametrize(
    ("program", "seconds", "code", "cause"),
    [
        ("print('genzoo: the data are gone', file=sys.stderr); sys.exit(2)", None, 2, "the data are gone"),
        ("raise KeyError('ours')", None, 1, "KeyError: 'ours'"),
        ("os.kill(os.getpid(), 9)", None, -9, "killed by SIGKILL"),
        ("time.sleep(60)", 0.5, 4, "stopped after timeout=0.5 seconds"),
        ("pass", 60, 0, ""),
    ],
)
def test_how_a_process_ended_is_told_by_its_code_and_its_last_line(
    monkeypatch, tmp_path, program, seconds, code, cause
):
    script = tmp_path / "program"
    script.write_text(f"#!{sys.executable}\nimport os, sys, time\n{program}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert sweep.run_process(["train"], seconds) == (code, cause)


def test_several_values_without_a_sweep_are_refused(asked):
    code, _, err = genzoo("seed=0,1")
    assert (code, err) == (2, "genzoo: seed=0,1: several values need -m, which runs each in turn\n")
    assert not asked


# Ends


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("two\nlines"), 2, "genzoo: two lines\n"),
        (NonFiniteError("at step 3"), 3, "genzoo: at step 3\n"),
        (KeyboardInterrupt(), 130, "genzoo: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_each_end_has_its_exit_code_and_one_line(monkeypatch, error, code, line):
    def run(*_):
        raise error

    monkeypatch.setattr(command_line, "run", run)
    assert genzoo() == (code, "", line)


@pytest.mark.parametrize("error", [KeyError("model"), ValueError("of ours"), RuntimeError("of torch")], ids=repr)
def test_a_bug_of_ours_is_not_dressed_up_as_bad_input(monkeypatch, error):
    def run(*_):
        raise error

    monkeypatch.setattr(command_line, "run", run)
    with pytest.raises(type(error)) as raised:  # which Python answers with a traceback and exit code 1
        genzoo()
    assert raised.value is error


def test_explain_has_help():
    outcome = genzoo("explain", "--help")
    assert outcome.code == 0 and "python -m genzoo explain [command]" in outcome.out
