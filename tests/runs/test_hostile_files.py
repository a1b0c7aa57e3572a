"""Runs of strangers: whatever is in their files, nothing of it is executed or imported, and one line says what is wrong.

Canaries tell: a module that writes a file when it is imported, commands that write one when they are called, and the list
of the modules that were loaded before. Every file below is hostile alone: the run around it is whole, and its checksums
fit, as those of anybody would who knows how to compute them.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

import genzoo as package
from genzoo.config import allow_list as trust
from genzoo.config.instantiate import build
from genzoo.config.paths import CONF
from genzoo.errors import UsageError
from genzoo.loading import load
from genzoo.report import records
from genzoo.runs import Run, RunError
from genzoo.training import checkpoints
from tests import children
from tests.commands import SMALL, described, genzoo, untrained
from tests.conftest import composed, suitable
from tests.toys import Mean

VAE = "genzoo.families.vae.VAE"
DONE = "touch done"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that can be sampled, from which all hostile ones are copied."""
    return untrained(tmp_path_factory.mktemp("whole"), *SMALL["vae"])[0]


@pytest.fixture
def run(whole, tmp_path, monkeypatch) -> Path:
    """A copy of the run, beside an empty directory to work in and a module that may not be imported."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'here' / 'imported')!r}, 'w')\nclass Model: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Path(shutil.copytree(whole, tmp_path / "run"))


class Canary:
    """Pickled, it writes a file wherever it is read by an unpickler that lets it."""

    def __reduce__(self):
        return os.system, (DONE,)


def quiet(before: set[str]) -> None:
    """Check that nothing was executed here, and nothing imported."""
    assert list(Path.cwd().iterdir()) == []
    assert not {name for name in set(sys.modules) - before if not name.startswith("genzoo.")}


# Names


SPEAKING = """
    os.system os.popen os.execv os.remove os.mkdir os.putenv posix.system subprocess.run subprocess.call
    subprocess.Popen subprocess.check_output subprocess.getoutput builtins.eval builtins.exec builtins.open
    builtins.compile builtins.__import__ builtins.getattr builtins.print builtins.dict importlib.import_module
    importlib.reload runpy.run_path runpy.run_module pathlib.Path shutil.rmtree shutil.copy pickle.load pickle.loads
    marshal.loads shelve.open code.interact ctypes.CDLL socket.socket urllib.request.urlopen
    urllib.request.urlretrieve webbrowser.open functools.partial functools.reduce operator.attrgetter
    operator.methodcaller types.FunctionType sys.exit sys.setrecursionlimit logging.config.dictConfig timeit.timeit
    cProfile.run pty.spawn multiprocessing.Process threading.Thread antigravity.webbrowser this.s
    torch.load torch.save torch.hub.load torch.hub.download_url_to_file torch.jit.load torch.compile
    torch.classes.load_library torch.ops.load_library torch.utils.cpp_extension.load_inline torch.nn.Linear
    torch.nn.Sequential numpy.load numpy.fromfile numpy.savetxt joblib.load yaml.load yaml.unsafe_load
    hydra.utils.instantiate hydra.utils.call hydra.utils.get_method omegaconf.OmegaConf.load
    evil.Model evil.Model.__init__ evil.sub.Model
    genzoo.nn.mlp.torch.hub.load genzoo.nn.mlp.nn.Sequential genzoo.nn.mlp.math.sqrt genzoo.nn.mlp.nn
    genzoo.families.vae.torch.load genzoo.families.vae.torch.hub.load genzoo.families.vae.nn.Module
    genzoo.families.vae.Density genzoo.families.vae.VAE.__init__ genzoo.families.vae.VAE.__class__
    genzoo.families.ddpm.strata genzoo.families.gan._TwoPlayers genzoo.families.latent.resting genzoo.diffusion.samplers.plan
    genzoo.families.__name__ genzoo.families.evil.Model genzoo.nn.evil.Model genzoo.probe.schedules.CondOT
    genzoo.VAE genzoo.load genzoo.loading.load genzoo.loading.frozen genzoo.jobs.train.train
    genzoo.cli.sample.sample genzoo.config.instantiate.build genzoo.config.instantiate._resolve
    genzoo.config.compose.os.system genzoo.config.allow_list.named_in genzoo.__main__.main genzoo.__main__.run_hydra
    genzoo.model.reconstruct genzoo.model.GenerativeModel genzoo.runs.write_atomically genzoo.runs.Run
    genzoo.runs.Run.create genzoo.runs.os.system genzoo.runs.subprocess.run genzoo.training.checkpoints.save
    genzoo.training.checkpoints.shutil.rmtree genzoo.training.fit.fit genzoo.training.loggers.FaultTolerantWandbLogger
    genzoo.training.loggers.CSVLogger genzoo.training.budget.Budget genzoo.metrics.features.feature_network
    genzoo.metrics.features.urlopen genzoo.data.images._download genzoo.data.images._write
    genzoo.data.images._ArrayUnpickler genzoo.data.images.pickle.loads genzoo.data.images.urlopen
    genzoo.data.pictures.save_png genzoo.data.DataSet
    torch.optim.adam.torch.hub.load torch.optim.adam.Adam torch.optim.lr_scheduler.LambdaLR torch.optim.Adam.step
    torch.optim.swa_utils.AveragedModel torch.optim.os.system torch.optim.sys.exit torch.optim.lr_scheduler
"""


def dangerous() -> Iterator[Any]:
    """Yield what a stranger may write after ``_target_``."""
    yield from SPEAKING.split()
    # Almost right.
    yield from [
        f"{VAE} ",
        f" {VAE}",
        f"{VAE}\n",
        f"\t{VAE}",
        f"{VAE}\x00",
        f"{VAE}\u200b",
        f"{VAE}()",
        f"{VAE}.",
        f".{VAE}",
    ]
    yield from [
        VAE.replace("a", "\u0430"),
        VAE.replace("g", "\uff47"),
        VAE.upper(),
        VAE.lower() + "s",
        VAE.replace(".", "/"),
    ]
    yield from [VAE.replace(".", ".."), VAE.replace(".", "\u3002"), VAE.replace(".VAE", ":VAE"), "..families.vae.VAE"]
    yield from [
        "VAE",
        "genzoo",
        "",
        ".",
        "..",
        "*",
        "genzoo.families.vae.",
        "genzoo.families.vae.*",
        "evil",
        "\x1b[2J.evil",
    ]
    yield from [
        "${oc.env:HOME}",
        "${model.x}",
        "${hydra:runtime.cwd}",
        "__import__('os').system",
        "lambda: 0",
        "os.system; x",
    ]
    yield from ["a" * 100_000, ".".join("a" * 50_000), "evil.Model\ngenzoo.families.vae.VAE"]
    # No text at all.
    yield from [["os.system"], [VAE], [], {}, {"_target_": "os.system"}, {"os.system": None}, 3, 1.5, True, False, None]


TARGETS = list(dangerous())
SECTIONS = ("model", "optimizer", "trainer.learning_rate", "logger", "data.source", "sampler", "codec", "anything")


def test_there_are_enough_of_them():
    assert len({repr(target) for target in TARGETS}) == len(TARGETS) > 150


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: ascii(target)[:60])
def test_a_name_that_is_on_no_list_is_neither_called_nor_imported(run, target):
    build(Run(run).config["model"], "model", trusted=False)  # whatever this needs is loaded now
    for section in SECTIONS:
        trust.allowed(section.partition(".")[0])
    before = set(sys.modules)
    hostile = {"_target_": target, "command": DONE, "_args_": [DONE]}
    places: list[Callable[[Any], Any]] = [
        lambda node: node,
        lambda node: {"_target_": VAE, "shape": [1, 8, 8], "encoder": node},
        lambda node: {"_target_": "genzoo.model.frozen", "model": {"_target_": VAE, "decoder": {"deep": [[node]]}}},
        lambda node: {"_target_": "torch.optim.Adam", "_partial_": True, "lr": node},
    ]
    for section in SECTIONS:
        for place in places:
            with pytest.raises(UsageError, match=r"(full name of a class|not among the classes allowed in a run)"):
                build(place(hostile), section, trusted=False)
    quiet(before)


def test_what_the_sections_may_name_stays_apart():
    """Data may be downloaded and loggers reach the network: a model may name neither."""
    for target, home in [
        ("genzoo.data.images.cifar10", "data"),
        ("genzoo.training.loggers.WandB", "logger"),
        ("torch.optim.Adam", "optimizer"),
        ("genzoo.training.budget.LearningRate", "trainer"),
        (VAE, "model"),
    ]:
        for section in ("data", "logger", "optimizer", "trainer", "model"):
            assert (target in trust.allowed(section)) == (section == home)


@pytest.mark.parametrize("name", ["_args_", "_recursive_", "_convert_", "_mode_", "__class__", "self", "args", ""])
@pytest.mark.parametrize("partial", [False, True])
def test_what_hydra_would_read_into_a_configuration_is_refused(run, name, partial):
    config = {**Run(run).config["model"], name: [DONE], "_partial_": partial}
    with pytest.raises(UsageError, match=f"unknown key 'model.{name}'"):
        build(config, "model", trusted=False)
    for value in ("yes", 1, None, [True], "${x}"):
        with pytest.raises(UsageError, match=r"model\._partial_=.*: must be true or false"):
            build({**Run(run).config["model"], "_partial_": value}, "model", trusted=False)


# What may be named


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from [node["_target_"]] if "_target_" in node else []
    for entry in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(entry)


def test_every_name_of_our_own_configurations_may_be_named_but_for_commands():
    sections = {"codec": "model", "prior": "model", "teacher": "model", "recipe": "model"}
    sections |= dict.fromkeys(("network", "likelihood", "schedule", "sampler", "noise_levels"), "model")
    for path in CONF.rglob("*.yaml"):
        group = path.relative_to(CONF).parts[0]
        for target in targets(yaml.safe_load(path.read_text())):
            may = target in trust.allowed(sections.get(group, group))
            assert may != target.startswith("genzoo.loading."), f"{path}: {target}"


@pytest.mark.parametrize("model", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_whatever_a_run_of_ours_says_can_be_made_again_without_trust(model):
    for data in ("digits", "moons"):
        config = described(*suitable(model, data))
        build(config["model"], "model", trusted=False)
        for section, node in [
            ("optimizer", config["optimizer"]),
            ("trainer.learning_rate", config["trainer"]["learning_rate"]),
            ("data.source", config["data"]["source"]),
        ]:
            build(node, section, trusted=False)
    for logger in ("csv", "wandb"):
        build(composed(f"logger={logger}")["logger"], "logger", trusted=False)


def test_nothing_that_a_model_may_name_touches_files_or_the_network():
    """The parts of models are arithmetic: their modules import nothing that could do more."""
    arithmetic = {"torch", "numpy", "scipy", "math", "genzoo", "typing", "collections", "__future__", "abc"}
    harmless = arithmetic | {
        "functools",
        "itertools",
        "contextlib",
        "dataclasses",
        "enum",
        "hashlib",
        "inspect",
        "copy",
        "warnings",
    }
    for pattern in trust.PARTS:
        for path in Path(package.__file__).parent.glob(pattern):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert {name.partition(".")[0] for name in names} <= harmless, path


def stranger(run: Path, target: str) -> Path:
    config = yaml.safe_load((run / "config.yaml").read_text())
    event = {"_target_": "genzoo.event.EventSpec", "shape": [2]}
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"_target_": target, "event": event}}))
    return run


@pytest.fixture
def mine(tmp_path) -> Path:
    """The reader's own --config-dir."""
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mean.yaml").write_text("model: {_target_: tests.toys.Mean}")
    return tmp_path / "conf"


def test_what_the_reader_s_own_directory_names_may_be_named(run, mine, tmp_path):
    stranger(run, "tests.toys.Mean")
    checkpoints.save(run / "checkpoints", 9, Mean(), Mean(), {})
    for verb in ("sample", "evaluate"):
        code, _, err = genzoo(verb, f"run={run}")
        assert code == 2 and "tests.toys.Mean: not among" in err
    for words in (["--config-dir", str(mine)], ["trust=[tests.toys.Mean]"]):
        code, _, err = genzoo("sample", f"run={run}", *words)
        assert code == 0, err
    assert trust.named_in(mine) == {"tests.toys.Mean"}


def test_what_lies_in_the_reader_s_directory_by_accident_allows_nothing(run, mine, tmp_path):
    (mine / "broken.yaml").write_text("_target_: [")
    (mine / "tagged.yaml").write_text("!!python/object/apply:os.system [touch done]\n_target_: x")
    (mine / "bomb.yaml").write_text("_target_: evil.Bomb\na: &a [1]\n" + "".join(
        f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 9)}]\n" for i in range(30)))  # fmt: skip
    (mine / "load.yaml").write_text("a: {_target_: genzoo.loading.load}\nb: {_target_: genzoo.load}\nc: {_target_: 3}")
    (mine / "asked.yaml").write_text("a: {_target_: '${oc.env:HOME}'}\nb: {_target_: '.evil.Model'}")
    shutil.copytree(stranger(run, "evil.Model"), mine / "outputs" / "run")
    assert trust.named_in(mine) == {"tests.toys.Mean", "evil.Bomb"}
    (mine / "outputs" / "beside.yaml").write_text("_target_: evil.Model")
    assert "evil.Model" in trust.named_in(mine)
    assert "evil.Model" not in trust.named_in(mine, mine / "outputs" / "run")
    before = set(sys.modules)
    code, _, err = genzoo("sample", f"run={mine / 'outputs' / 'run'}", "--config-dir", str(mine))
    assert code == 2 and "evil.Model: not among" in err
    quiet(before)


def test_a_command_is_never_named_by_a_run_even_where_somebody_trusts_it(run):
    for target in ("genzoo.loading.load", "genzoo.load"):
        with pytest.raises(UsageError, match=r"not among the classes allowed in a run$"):
            build({"_target_": target, "run": str(run), "trust": ["os.system"]}, "model", trusted=False, trust=[target])


# Configurations


def bomb() -> str:
    levels = [f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]" for i in range(1, 60)]
    return "\n".join(["b0: &b0 [lol, lol]", *levels])


CONFIGURATIONS: dict[str, str | bytes] = {
    "a call": "model: !!python/object/apply:os.system [touch done]",
    "a call with arguments": "model: !!python/object/apply:subprocess.run {args: [[touch, done]]}",
    "an object": "model: !!python/object/new:evil.Model []",
    "a plain object": "model: !!python/object:evil.Model {}",
    "a function": "model: !!python/name:os.system ''",
    "a module": "model: !!python/module:evil ''",
    "a tuple": "model: !!python/tuple [1, 2]",
    "an own tag": "model: !evil {x: 1}",
    "bytes": "model: !!binary aGVsbG8=",
    "a set": "model: !!set {a, b}",
    "a tag of text": f"model: {{_target_: !!str {VAE}}}",
    "an alias": "a: &a [1]\nmodel: *a",
    "a billion laughs": bomb(),
    "an alias to itself": "model: &m {x: *m}",
    "a merge of aliases": "a: &a {x: 1}\nmodel: {<<: *a}",
    "a key twice": f"model: {{_target_: {VAE}, _target_: os.system}}",
    "a section twice": f"model: {{_target_: {VAE}}}\nmodel: {{_target_: os.system}}",
    "a number for a key": "model: {1: 2}",
    "nothing for a key": "model: {null: 2}",
    "a list for a key": "model: {[a, b]: 2}",
    "a date": f"model: {{_target_: {VAE}, latent_dim: 2026-01-01}}",
    "no date": f"model: {{_target_: {VAE}, latent_dim: 2026-99-99}}",
    "no number": f"model: {{_target_: {VAE}, beta: .nan}}",
    "infinity": f"model: {{_target_: {VAE}, beta: -.inf}}",
    "a number beyond floats": f"model: {{_target_: {VAE}, beta: 1.0e+999}}",
    "a number of many digits": f"model: {{_target_: {VAE}, latent_dim: {'9' * 5000}}}",
    "a number of some digits": f"model: {{_target_: {VAE}, latent_dim: {'9' * 200}}}",
    "deep lists": "model: " + "[" * 900_000,
    "deep mappings": "model: " + "{a: " * 200_000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(1300)),
    "deep dashes": "- " * 400_000,
    "deep and whole": f"model: {'[' * 300}1{']' * 300}",
    "many values": "model: [" + "1," * 400_000 + "1]",
    "many keys": "".join(f"k{i}: 1\n" for i in range(80_000)),
    "a megabyte": "model: '" + "x" * 2**20 + "'",
    "broken": "model: [",
    "a tab": "model:\n\t- 1",
    "two documents": "model: 1\n---\nmodel: 2",
    "another YAML": "%YAML 9.9\n---\nmodel: 1",
    "nothing": "",
    "null": "null",
    "a list": "- model",
    "a text": "model",
    "UTF-16": "model: 1".encode("utf-16"),
    "zeros": b"\0" * 1000,
    "noise": bytes(range(256)) * 10,
    "half a letter": "model: \u00fc".encode()[:-1],
    "no model": "seed: 1",
    "a text for a model": "model: os.system",
    "a list of models": f"model: [{{_target_: {VAE}}}]",
    "null for a model": "model: null",
    "a model without a class": "model: {shape: [2]}",
    "no arguments": f"model: {{_target_: {VAE}}}",
    "a part that is none": f"model: {{_target_: {VAE}, shape: [2], encoder: 3, decoder: {{}}, likelihood: []}}",
    "a shape of a text": f"model: {{_target_: {VAE}, shape: abc, encoder: null, decoder: null, likelihood: null}}",
    "a giant": "model: {_target_: genzoo.nn.mlp.MLP, in_shape: [100000], out_shape: [100000], width: 100000, depth: 9}",
    "an endless one": "model: {_target_: genzoo.nn.mlp.MLP, in_shape: [2], out_shape: [2], width: 1, depth: 1000000000}",
    "no generative model": "model: {_target_: genzoo.nn.mlp.MLP, in_shape: [2], out_shape: [2]}",
    "a factory of models": f"model: {{_target_: {VAE}, _partial_: true}}",
}


def refuses(verb: str, run: Path, *words: str) -> str:
    """Check that a run is refused at once by exit code 2 and one line, that nothing came of it, and return the line."""
    before = set(sys.modules)
    start = time.monotonic()
    code, out, err = genzoo(verb, f"run={run}", *words)
    assert time.monotonic() - start < 10, "on a busy machine; a second or so on a quiet one"
    assert (code, out) == (2, ""), err
    assert err.startswith("genzoo: ") and err.count("\n") == 1 and err.endswith("\n") and err.strip().isprintable()
    assert len(err) < 2100
    quiet(before)
    return err


@pytest.fixture(scope="module", autouse=True)
def warm(whole, tmp_path_factory) -> None:
    """Load what the commands themselves need, so that whatever is loaded later is seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("warm"))
        copy = Path(shutil.copytree(whole, "run"))
        for words in (["sample", "n=2"], ["evaluate", "metrics.events=4", "metrics.n=0", "metrics.throughput=2"]):
            code, _, err = genzoo(*words, f"run={copy}")
            assert code == 0, err


@pytest.mark.parametrize("content", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_hostile_configuration_is_refused(run, content):
    (run / "config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "config.yaml" in refuses("sample", run) or b"model: " in (run / "config.yaml").read_bytes()
    refuses("evaluate", run, "metrics.n=0")


SECTION = {
    "data": [3, [], {"source": 3}, {"source": {"_target_": "os.system", "command": DONE}}, {"name": "digits"}],
    "data.name": [None, 3, ["digits"], "../../x" * 1000],
    "data.shape": ["abc", [], [-1], [1, 8, 8, 8], [10**9] * 3, None],
    "data.levels": [0, -1, "x", 10**12],
    "data.flip": ["x", []],
    "data.source": [{"_target_": "genzoo.data.images.digits", "root": "/"}, {"_target_": VAE}, {}, {"a": 1}, "digits"],
    "metrics.n": [-1, "x", 10**15, [1], 3.5],
    "metrics.num_samples": [0, -1, "x", 10**15],
}


@pytest.mark.parametrize(("key", "value"), [(key, v) for key, values in SECTION.items() for v in values])
def test_a_section_that_does_not_fit_is_refused_by_its_key(run, key, value):
    config = yaml.safe_load((run / "config.yaml").read_text())
    section, _, name = key.partition(".")
    config[section] = {**config[section], name: value} if name else value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert section in refuses("evaluate", run, "metrics.throughput=2")


# Things that are no files


def link(path: Path) -> None:
    target = path.with_name(f"{path.name}-elsewhere")
    path.rename(target)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def hole(path: Path) -> None:
    os.truncate(path, 2**40)


def unreadable(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


OTHER = [link, pipe, device, folder, hole, unreadable]
CHECKPOINT = ("manifest.json", "ema.safetensors")


@pytest.mark.parametrize("change", OTHER)
@pytest.mark.parametrize("name", ["config.yaml", *(f"checkpoints/step-4/{name}" for name in CHECKPOINT)])
def test_what_is_no_regular_file_is_not_opened(run, name, change):
    change(run / name)
    refuses("sample", run)


@pytest.mark.parametrize("change", OTHER)
def test_a_status_that_is_no_regular_file_is_not_opened(run, change):
    change(run / "status.json")
    assert "status.json" in refuses("evaluate", run, "metrics.n=0")


def test_a_link_in_a_run_neither_shows_nor_changes_what_it_leads_to(run, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    for name in ("metrics.jsonl", "samples.png", "results", "checkpoints", "result.json"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(secret)
        assert f"{run / name}: is a link" in refuses("evaluate", run, "metrics.n=0")
        found, broken = records.read([run])
        assert not found and len(broken) == 1
        (run / name).unlink()
    assert secret.read_text() == "mine"
    linked = run / "checkpoints" / "step-4"
    linked.parent.mkdir()
    linked.symlink_to(tmp_path)
    assert "is a link" in refuses("sample", run)


def test_a_pipe_among_the_events_is_not_waited_for(run):
    (run / "metrics.jsonl").unlink(missing_ok=True)
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(RunError, match="not a regular file"):
        list(Run(run).events())
    with pytest.raises(RunError, match="not a regular file"):
        Run(run).log(event="x")


# JSON


DOCUMENTS: dict[str, bytes] = {
    "deep lists": b"[" * 1_000_000,
    "deep mappings": b'{"a":' * 500_000,
    "deep and whole": b'{"a":' + b"[" * 400 + b"]" * 400 + b"}",
    "NaN": b'{"schema": NaN}',
    "infinity": b'{"schema": -Infinity}',
    "beyond floats": b'{"schema": 1e999}',
    "many digits": b'{"schema": ' + b"9" * 5000 + b"}",
    "some digits": b'{"schema": ' + b"9" * 300 + b"}",
    "a key twice": b'{"schema": 1, "schema": 1}',
    "a list": b"[1]",
    "a text": b'"state"',
    "nothing": b"",
    "broken": b'{"schema": ',
    "noise": bytes(range(256)),
    "UTF-16": '{"schema": 1}'.encode("utf-16"),
    "a pickle": pickle.dumps({"schema": Canary}),
    "too large": b'{"a": "' + b"x" * 2**22 + b'"}',
}


@pytest.mark.parametrize("content", DOCUMENTS.values(), ids=DOCUMENTS)
def test_hostile_json_is_refused_by_the_name_of_its_file(run, content):
    before = set(sys.modules)
    whole = (run / "status.json").read_bytes()
    (run / "results" / "0.json").write_bytes(content)
    (run / "result.json").write_bytes(content)
    found, broken = records.read([run])
    assert not found and "results/0.json: " in broken[0]
    (run / "results" / "0.json").unlink()
    with pytest.raises(RunError, match=r"result\.json: "):
        Run(run).result  # noqa: B018
    (run / "status.json").write_bytes(content)
    assert "status.json: " in refuses("evaluate", run, "metrics.n=0")
    (run / "status.json").write_bytes(whole)
    (run / "metrics.jsonl").write_bytes(content + b"\n")
    if content not in (b"[1]", b'"state"'):  # what is no event is passed over
        assert any("metrics.jsonl: line 1: " in said for said in records.read([run])[1])
    (run / "checkpoints" / "step-4" / "manifest.json").write_bytes(content)
    assert "manifest.json: missing or broken" in refuses("sample", run)
    quiet(before)


STATUS = [
    {"step": "x", "images": "many", "train_seconds": [1], "train_flops": {"a": 1}, "threads": "all"},
    {"step": -1, "images": -5, "train_seconds": -1, "train_flops": True},
    {"state": ["done"], "model": {"a": 1}, "machine": 3, "versions": [], "command": {}, "diagnostics": [1]},
    {"images": 10**90, "train_seconds": 1e-300, "train_flops": 1e99},
]


@pytest.mark.parametrize("status", STATUS)
def test_a_status_of_other_types_does_no_harm(run, status):
    (run / "status.json").write_text(json.dumps(status))
    words = ["metrics.n=0", "metrics.events=4", "metrics.throughput=2", "metrics.num_samples=1"]
    code, _, err = genzoo("evaluate", f"run={run}", *words)
    assert code == 0, err
    code, _, err = genzoo("compare", f"runs={run}", "out=page")
    assert code == 0, err


# Checkpoints


def write(run: Path, content: bytes, **said: Any) -> None:
    """Replace the averaged weights, and have the manifest say so."""
    checkpoint = run / "checkpoints" / "step-4"
    (checkpoint / "ema.safetensors").write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **said}
    manifest["files"]["ema.safetensors"] = entry
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def header(said: Any, data: bytes = b"") -> bytes:
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    return struct.pack("<Q", len(text)) + text + data


def torch_pickle(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WEIGHTS: dict[str, bytes] = {
    "nothing": b"",
    "a pickle": pickle.dumps(Canary()),
    "a pickle of torch": torch_pickle({"x": Canary()}),
    "a pickle of tensors": torch_pickle({"x": torch.zeros(2)}),
    "a zip": b"PK\x03\x04" + bytes(100),
    "a length beyond the file": struct.pack("<Q", 2**63) + b"{}",
    "a negative length": b"\xff" * 8 + b"{}",
    "no JSON": header(b"x" * 50),
    "deep JSON": header(b"[" * 20_000),
    "a list": header([F32]),
    "no offsets": header({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "offsets beyond the file": header({"a": {**F32, "data_offsets": [0, 2**60]}}, bytes(8)),
    "offsets backwards": header({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)),
    "offsets that overlap": header({"a": F32, "b": F32}, bytes(8)),
    "a hole": header({"a": {**F32, "data_offsets": [8, 16]}}, bytes(16)),
    "more than it says": header({"a": F32}, bytes(100)),
    "a shape that overflows": header({"a": {**F32, "shape": [2**62, 4]}}, bytes(8)),
    "a negative shape": header({"a": {**F32, "shape": [-2]}}, bytes(8)),
    "a type that is none": header({"a": {**F32, "dtype": "OBJECT"}}, bytes(8)),
    "a type that torch lacks": header({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)),
    "a type of half bytes": header({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, bytes(8)),
    "no tensor": header({}),
    "another tensor": header({"a": F32}, bytes(8)),
    "a megabyte too much": header({"a": {"dtype": "U8", "shape": [2**20], "data_offsets": [0, 2**20]}}, bytes(2**20)),
}


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=WEIGHTS)
def test_hostile_weights_are_refused(run, content):
    write(run, content)
    assert "ema.safetensors: " in refuses("sample", run)


def changed(weights: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    # One that is another one when it is transposed, whatever the order in which they are read.
    name = next(name for name in sorted(weights) if weights[name].ndim > 1 and len(set(weights[name].shape[:2])) == 2)
    tensor = weights[name]
    rest = {key: value for key, value in weights.items() if key != name}
    return {
        "one is missing": rest,
        "one is too many": {**weights, "evil": torch.zeros(1)},
        "one has another name": {**rest, f"{name}.evil": tensor},
        "one has another shape": {**rest, name: tensor.flatten()},
        "one is transposed": {**rest, name: tensor.transpose(0, 1).contiguous()},
        "one is a scalar": {**rest, name: torch.zeros(())},
        "one is empty": {**rest, name: torch.zeros(0)},
        **{f"one is {t}": {**rest, name: tensor.to(t)} for t in (torch.int64, torch.uint8, torch.bool, torch.float16)},
        "one is complex": {**rest, name: tensor.to(torch.complex64)},
        "one is of eight bits": {**rest, name: tensor.to(torch.float8_e5m2)},
    }[how]


HOWS = ["one is missing", "one is too many", "one has another name", "one has another shape", "one is transposed"]
HOWS += ["one is a scalar", "one is empty", "one is complex", "one is of eight bits"]
HOWS += [f"one is torch.{t}" for t in ("int64", "uint8", "bool", "float16")]


@pytest.mark.parametrize("how", HOWS)
def test_weights_of_another_model_are_refused(run, how):
    weights = load_safetensors((run / "checkpoints" / "step-4" / "ema.safetensors").read_bytes())
    write(run, save_safetensors(changed(weights, how)))
    assert "ema.safetensors: does not fit the model of config.yaml" in refuses("sample", run)


def test_weights_in_double_precision_are_read_as_what_the_model_computes_in(run):
    weights = load_safetensors((run / "checkpoints" / "step-4" / "ema.safetensors").read_bytes())
    before = load(run).state_dict()
    write(run, save_safetensors({name: t.double() if t.is_floating_point() else t for name, t in weights.items()}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in load(run).state_dict().items())


@pytest.mark.parametrize(
    "said",
    [{"bytes": n} for n in (-1, 0, 1, 2**50, "9", 1.0, True, None, [1])] + [{"sha256": s} for s in (None, "", 3)],
)
def test_a_manifest_that_does_not_fit_is_refused_before_anything_is_read(run, said, monkeypatch):
    write(run, (run / "checkpoints" / "step-4" / "ema.safetensors").read_bytes(), **said)
    monkeypatch.setattr(checkpoints, "load_safetensors", lambda *_: pytest.fail("the weights were read"))
    refuses("sample", run)


def test_a_file_that_is_mostly_a_hole_is_not_read(run):
    checkpoint = run / "checkpoints" / "step-4"
    os.truncate(checkpoint / "ema.safetensors", 2**42)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["ema.safetensors"]["bytes"] = 2**42
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert "ema.safetensors: does not fit the model" in refuses("sample", run)


# As a user meets them


@pytest.mark.parametrize("what", ["a call", "a billion laughs", "deep lists", "os.system", "weights"])
def test_the_command_line_refuses_them_too(run, what):
    if what == "weights":
        write(run, WEIGHTS["a pickle of torch"])
    elif what == "os.system":
        stranger(run, what)
    else:
        (run / "config.yaml").write_bytes(str(CONFIGURATIONS[what]).encode())
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parents[1])}
    command = [sys.executable, "-m", "genzoo", "sample", f"run={run}"]
    run_command = subprocess.run if what == "a call" else children.run  # one begins as a user's
    done = run_command(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("genzoo: ")
    assert list(Path.cwd().iterdir()) == []


def test_there_are_enough_hostile_files():
    assert len(CONFIGURATIONS) + len(DOCUMENTS) + len(WEIGHTS) + len(OTHER) * 4 > 100


# Our own sources


UNSAFE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.load",
    "marshal.loads", "shelve.open", "joblib.load", "dill.load", "dill.loads", "yaml.load", "yaml.load_all", "yaml.full_load",
    "yaml.unsafe_load", "yaml.unsafe_load_all", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
    "torch.hub.load_state_dict_from_url", "pandas.read_pickle", "pd.read_pickle", "numpy.fromfile",
}  # fmt: skip


def unsafe_calls(source: str) -> list[str]:
    """List the calls in a source that could execute what they read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, said = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if (
            name in UNSAFE
            or (name == "torch.load" and said.get("weights_only") != "True")
            or (name in ("np.load", "numpy.load") and said.get("allow_pickle", "False") != "False")
            or said.get("shell", "False") != "False"
        ):
            found.append(f"line {node.lineno}: {name}")
    return found


def test_no_source_of_ours_loads_what_could_be_executed():
    for path in sorted(Path(package.__file__).parent.rglob("*.py")):
        assert unsafe_calls(path.read_text()) == [], path


@pytest.mark.parametrize(
    "source",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, None, pickle)", "pickle.loads(b)", "eval('1')",
     "exec('1')", "yaml.load(t, Loader=L)", "yaml.unsafe_load(t)", "np.load(f, allow_pickle=True)", "joblib.load(f)",
     "torch.hub.load('a', 'b')", "subprocess.run('ls', shell=True)"],
)  # fmt: skip
def test_the_check_of_our_sources_sees_each_of_them(source):
    assert unsafe_calls(source)
    assert not unsafe_calls(
        "torch.load(f, weights_only=True); model.eval(); np.load(f, allow_pickle=False); yaml.safe_load(t)"
    )
