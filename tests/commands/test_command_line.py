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

import genzoo.__main__ as command_line
from genzoo.commands.config import CONF, VERBS, UsageError, preflight
from genzoo.training.module import NonFiniteError
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
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=True)
    assert "trainer:\n" in done.stdout
    seconds, *modules = done.stderr.split()
    assert "hydra" in modules
    assert not {"torch", "pytorch_lightning", "sklearn", "numpy"} & set(modules)
    assert float(seconds) < 1


def test_help_names_every_group_with_every_choice():
    lines = genzoo("--help").out.splitlines()
    for group in (path for path in CONF.iterdir() if path.is_dir() and path.name != "hydra"):
        choices = sorted(path.stem for path in group.glob("*.yaml"))
        assert f"{group.name}: {', '.join(choices)}" in lines


def test_help_says_what_genzoo_is_and_how_each_verb_is_called():
    code, out, err = genzoo("sample", "--help")
    assert (code, err) == (0, "")
    assert out.startswith("genzoo: every family of generative model")
    for verb in VERBS:
        assert re.search(rf"python -m genzoo \[?{verb}\b", out)
    assert "== Configuration groups ==" in out
    assert "out: samples.png" in out  # the keys of this verb, not those of training


def examples() -> Iterator[list[str]]:
    """Yield the words of every command line that the help and the README show in full."""
    for page in (genzoo("--help").out, (REPOSITORY / "README.md").read_text()):
        for line in re.findall(r"python -m genzoo ((?:-m |[a-z]+ )*(?:[\w.]+=[\w.,-]+ ?)+)", page):
            yield line.split()


def test_every_example_of_the_help_and_of_the_readme_composes():
    lines = [words for words in examples() if "model=gaussian" not in words]  # the reader's own family
    assert len(lines) > 8
    for words in lines:
        sweep, words = "-m" in words, [word for word in words if word != "-m"]
        verb = words.pop(0) if words[0] in VERBS else "train"
        preflight(verb, words, sweep=sweep)


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


@pytest.mark.parametrize("line", ["-m model=vae,ddpm seed=0,1", "train model=vae,ddpm -m seed=0,1"])
def test_a_sweep_runs_every_combination_and_leaves_nothing_of_its_own(asked, line, tmp_path):
    assert genzoo(*line.split()).code == 0
    asked_for = [(config["model"]["_target_"].rpartition(".")[2], config["seed"]) for _, config in asked]
    assert asked_for == [("VAE", 0), ("VAE", 1), ("DDPM", 0), ("DDPM", 1)]
    assert not list(tmp_path.iterdir())


def test_a_job_that_fails_does_not_stop_the_others_of_its_sweep(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = []

    def run(verb, config, choices):
        if config["seed"] == 1:
            raise UsageError("the data\nare gone")
        if config["seed"] == 2:
            raise NonFiniteError("the loss is not finite")
        done.append(config["seed"])

    monkeypatch.setattr(command_line, "run", run)
    code, _, err = genzoo("-m", "seed=0,1,2,3")
    assert done == [0, 3]
    assert err == "genzoo: job seed=1: the data are gone\ngenzoo: job seed=2: the loss is not finite\n"
    assert code == 3


def test_a_bug_in_one_job_is_raised_once_the_others_are_done(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    done = []

    def run(verb, config, choices):
        done.append(1 // config["seed"])

    monkeypatch.setattr(command_line, "run", run)
    with pytest.raises(ZeroDivisionError):
        genzoo("-m", "seed=0,1")
    assert done == [1]


def test_several_values_without_a_sweep_are_refused(asked):
    code, _, err = genzoo("seed=0,1")
    assert (code, err) == (2, "genzoo: seed=0,1: several values need -m, which trains one run for each\n")
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
