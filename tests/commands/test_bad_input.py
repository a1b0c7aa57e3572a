"""Bad input: exit code 2, exactly one line that names the key or file and what would do, and nothing written.

Every line below is what somebody may type, and beside it are the words that the answer must hold. Training itself is
replaced by a failure, so that a line that comes through is seen.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from genzoo.cli.evaluate import evaluate
from genzoo.errors import UsageError
from genzoo.training import fit as fitting
from tests.commands import SMALL, genzoo, untrained
from tests.conftest import composed


def bad_lines() -> Iterator[tuple[str, str]]:
    """Yield command lines and, separated by |, what the answer must hold."""
    # Keys that do not exist.
    yield "modle=ddpm", "'modle'|did you mean 'model'?"
    yield "trainer.batchsize=3", "'trainer.batchsize'|did you mean 'trainer.batch_size'?"
    yield "model.latent_dims=3", "'model.latent_dims'|did you mean 'model.latent_dim'?"
    yield "modle.latent_dim=3", "'modle.latent_dim'|did you mean 'model.latent_dim'?"
    yield "+foo=1", "'foo'|choose from budget, codec, data"
    yield "+model.foo=1", "'model.foo'|latent_dim"
    yield "+model.encoder.widht=1", "'model.encoder.widht'|did you mean 'width'?"
    yield "model=ddpm model.schedule.beta_start=1e-3", "num_steps|+model.schedule.beta_start"
    yield "logger=wandb logger.projekt=x", "did you mean 'logger.project'?"
    yield "sample model=vae run=x", "'model'|choose from augmentation"
    yield "--cfg job modle=ddpm", "did you mean 'model'?"
    # Choices that do not exist.
    yield "model=ddpn", "model 'ddpn'|did you mean 'ddpm'?"
    yield "data=cifar", "data 'cifar'|did you mean 'cifar10'?"
    yield "experiment=ddpm_cifar", "experiment 'ddpm_cifar'|did you mean 'ddpm_cifar10'?"
    yield "-m model=vae,gann", "model 'gann'|did you mean 'gan'"
    yield "model=null", "model 'null'|choose from"
    yield "logger=null", "~logger"
    yield "kind=plane", "kind=plane|data=digits is of kind image"
    yield "--config-dir /nowhere", "/nowhere"
    yield "--config-name other", "--config-name|sample"
    yield "--fast", "--fast"
    # What cannot be read.
    yield "model", "unknown command 'model'"
    yield "a=b=c", "cannot parse 'a=b=c'"
    yield "x=[1", "cannot parse 'x=[1'"
    yield "seed=${nothing}", "seed|nothing"
    # Types.
    yield "seed=abc", "seed=abc|integer"
    yield "trainer.batch_size=abc", "trainer.batch_size=abc|integer"
    yield "model.beta=abc", "model.beta='abc'|number"
    yield "model.encoder.width=abc", "model.encoder.width='abc'|integer"
    yield "optimizer.lr=abc", "optimizer.lr='abc'|number"
    yield "optimizer.betas=3", "optimizer.betas=3|tuple"
    yield "trainer.accelerator=tpu", "trainer.accelerator=tpu|cuda"
    yield "model=ddpm model.prediction=noise", "model.prediction='noise'|eps"
    yield "sample run=x device=tpu", "device=tpu|cpu"
    # Ranges.
    yield "trainer.batch_size=-1", "trainer.batch_size=-1|greater than 0"
    yield "trainer.batch_size=1000000000000000000000", "less than or equal to 1048576"
    yield "trainer.learning_rate.warmup=-1", "trainer.learning_rate|warmup|-1"
    yield "budget.seconds=-3", "budget.seconds=-3"
    yield "budget.seconds=nan", "budget.seconds=nan|finite"
    yield "optimizer.lr=-1", "optimizer|learning rate|-1"
    yield "optimizer.lr=nan", "optimizer.lr=nan|finite"
    yield "optimizer.betas=[2,3]", "optimizer|beta|2"
    yield "optimizer=sgd optimizer.momentum=-1", "optimizer|momentum|-1"
    yield "model.latent_dim=0", "latent_dim|0"
    yield "model.latent_dim=100000000000", "model|memory"
    yield "model.encoder.width=-5", "model|-5"
    yield "model=ddpm model.schedule.num_steps=0", "num_steps|0"
    yield "model=ddpm sampler.eta=2", "eta|2"
    yield "model=wgan_gp model.n_critic=0", "n_critic|0"
    yield "sample run=x n=0", "n=0"
    # What does not go together.
    yield "budget.seconds=null", "budget.images|budget.seconds|null"
    yield "model=vae sampler=ddim", "sampler|vae"
    yield "model.num_classes=10", "'model.num_classes'|set data.conditional=true"
    yield "+model.num_classes=10", "'model.num_classes'|set data.conditional=true"
    yield "-m model.num_classes=0,10", "'model.num_classes'|set data.conditional=true"
    yield "model=latent +codec.num_classes=10", "'model.codec.num_classes'|set data.conditional=true"
    yield "model=ddpm model.label_dropout=0", "'model.label_dropout'|did you mean 'model.condition_dropout'?"
    yield "sample run=. y=3", "'y'|did you mean 'label'?"
    yield "data=swiss_roll data.conditional=true", "data.conditional=true|no classes"
    yield "data.conditional=3", "data.conditional=3"
    yield "data.num_classes=3", "data.num_classes=3|10"
    yield "data.levels=256", "data.levels=256|17"
    yield "data.shape=[1,9,9]", "data.shape=[1, 9, 9]|[1, 8, 8]"
    yield "model=ddpm sampler.steps=5000", "sampler|5000|1000"
    yield "model=ddpm sampler=ancestral sampler.variance=learned", "sampler|variance"
    yield "model=ddpm metrics.num_samples=3", "num_samples|even"
    yield "model=realnvp model.scales=5", "scales=5|32"
    yield "data=moons likelihood@model.likelihood=image", "model.likelihood.levels"
    yield "optimizer._target_=torch.optim.Adan", "torch.optim.Adan"
    yield "model._target_=genzoo.families.vae.VEA", "genzoo.families.vae.VEA"
    # What is not there.
    yield "data=folder", "data.root is missing"
    yield "data=folder data.root=/nowhere", "/nowhere|not a folder"
    yield "data=cifar10", "cifar-10-python.tar.gz|put it at"
    yield "trainer.accelerator=cuda", "trainer.accelerator=cpu"
    yield "logger=wandb logger.mode=online", "logger|wandb login"
    yield "outputs=/proc/nothing", "outputs=/proc/nothing"
    yield "sample", "run is missing"
    yield "sample run=/nowhere", "run=/nowhere|no such directory"
    yield "sample run=.", "run=.|not a run directory"
    yield "evaluate run=.", "run=.|not a run directory"
    yield "evaluate", "run=DIR|samples=FOLDER"
    yield "evaluate run=. samples=x.npz data=digits", "set either run=DIR"
    yield "evaluate samples=x.npz", "data is missing"
    yield "evaluate samples=x.npz data=digits sampler=ddim", "sampler|already drawn"
    yield "evaluate run=. data=digits", "a run has its own data"
    yield "evaluate samples=/nowhere data=digits", "samples=/nowhere|no such folder"
    yield "evaluate samples=x.npz data=digits out=/nowhere/scores.json", "out=/nowhere/scores.json|no directory"
    yield "metrics.features=incepton", "metrics.features=incepton|inception, dinov2, clip_emoji, clip_shapes, digits"
    yield "metrics.features=inception", "weights-inception|metrics.inception_weights=FILE|metrics.features="
    yield "metrics.features=inception metrics.inception_weights=/nowhere", "metrics.inception_weights=/nowhere"
    yield "metrics.features=dinov2", "metrics.dinov2_weights=FILE"
    yield "metrics.features=identity", "metrics.features=identity|points"
    yield "data=moons metrics.features=digits", "metrics.features=digits|images"
    yield "metrics.n=63", "metrics.n=63|64|metrics.force=true"
    yield "trainer.scores=-1", "trainer.scores=-1"


@pytest.fixture(autouse=True)
def empty(monkeypatch, tmp_path) -> Path:
    """An empty directory to type in, where nothing trains and nobody is known to wandb."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("genzoo.data.images.urlopen", no_network)
    monkeypatch.setattr("genzoo.metrics.features.urlopen", no_network)

    def fit(*_, **__):
        raise AssertionError("this line was accepted")

    monkeypatch.setattr(fitting, "fit", fit)
    return here


def no_network(request, timeout):
    raise OSError("no network")


def refused(here: Path, *words: str, because: str) -> None:
    """Check that a command is answered by exit code 2 and one line with all of the words, and writes nothing."""
    before = sorted(here.rglob("*"))
    code, out, err = genzoo(*words)
    assert code == 2, err
    assert out == ""
    assert err.startswith("genzoo: ") and err.count("\n") == 1 and err.endswith("\n")
    for word in because.split("|"):
        assert word in err
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(("line", "because"), bad_lines(), ids=[line for line, _ in bad_lines()])
def test_one_line_says_what_is_wrong(empty, line, because):
    refused(empty, *line.split(), because=because)


def test_a_line_that_is_right_comes_through():
    """The planted failure is seen: the lines above are refused for their faults, not for the fixture's."""
    with pytest.raises(AssertionError, match="this line was accepted"):
        genzoo("trainer.threads=1", *SMALL["vae"])


def test_a_broken_picture_is_named(empty, tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "7.png").write_bytes(b"\x89PNG but no more")
    refused(
        empty, "data=folder", f"data.root={tmp_path}", "data.size=8", because=f"{tmp_path / '7.png'}|not a readable"
    )


def test_classes_that_a_folder_does_not_have_are_refused_once_it_is_read(empty, tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    words = ["data=folder", f"data.root={tmp_path}", "data.size=8", "data.conditional=true"]
    refused(empty, *words, because="data.conditional=true|no classes")


def test_data_without_a_test_split_are_refused_once_they_are_read(empty, tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    words = ["data=folder", f"data.root={tmp_path}", "data.size=8", "data.test_fraction=0"]
    refused(empty, *words, because="no test images|data.test_fraction=0.1|data.test_root")


# Runs


@pytest.fixture
def run(tmp_path) -> Path:
    return untrained(tmp_path, *SMALL["vae"])[0]


def rewrite(path: Path, **changes) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
def test_a_run_that_cannot_be_read_is_refused_by_the_name_of_its_file(empty, run, verb):
    checkpoint = run / "checkpoints" / "step-4"
    weights = (checkpoint / "ema.safetensors").read_bytes()

    def answer(because: str) -> None:
        refused(empty, verb, f"run={run}", because=because)

    flipped = bytearray(weights)
    flipped[-1] ^= 1
    (checkpoint / "ema.safetensors").write_bytes(flipped)
    answer(f"{checkpoint}/ema.safetensors|SHA-256")
    (checkpoint / "ema.safetensors").unlink()
    answer(f"{checkpoint}/ema.safetensors")
    (checkpoint / "manifest.json").write_text("{")
    answer(f"{checkpoint}/manifest.json")
    shutil.rmtree(checkpoint)
    answer("no checkpoint")
    (run / "config.yaml").write_text("model: [")
    answer(f"{run}/config.yaml|broken YAML")
    (run / "config.yaml").write_text("- a list")
    answer(f"{run}/config.yaml")
    (run / "config.yaml").write_text("seed: 3")
    answer(f"{run}/config.yaml")
    (run / "config.yaml").unlink()
    answer("not a run directory")
    refused(empty, verb, f"run={__file__}", because="no such directory")


def test_a_configuration_that_does_not_fit_its_weights_is_refused(empty, run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    rewrite(run / "config.yaml", model={**config["model"], "latent_dim": 5})
    refused(empty, "sample", f"run={run}", because="ema.safetensors|does not fit")


HOSTILE = [
    {"_target_": "os.system", "command": "touch done"},
    {"_target_": "genzoo.config.compose.os.system", "command": "touch done"},
    {"_target_": "genzoo.families.vae.torch.hub.load", "repo_or_dir": "evil/evil", "model": "evil"},
    {"_target_": "genzoo.families.vae.torch.load", "f": "done"},
    {"_target_": "genzoo.families.vae.nn.Module"},
    {"_target_": "genzoo.families.ddpm.geometric_strata", "T": 10, "count": 3},
    {"_target_": "genzoo.runs.write_atomically", "path": "done", "data": ""},
    {"_target_": "torch.hub.load", "repo_or_dir": "evil/evil", "model": "evil"},
    {"_target_": "builtins.eval", "source": "open('done', 'w')"},
    {"_target_": "evil.Model"},
    {"_target_": ["os.system"]},
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: str(hostile["_target_"]))
def test_what_a_strangers_run_names_is_neither_executed_nor_imported(empty, run, tmp_path, monkeypatch, hostile):
    (tmp_path / "evil.py").write_text(f"open({str(empty / 'done')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    evaluation = composed(f"run={run}", verb="evaluate")
    places = {
        "model": {"model": hostile},
        "model.encoder": {"model": {**config["model"], "encoder": hostile}},
        "data": {"model": config["model"], "data": {**config["data"], "source": hostile}},
    }
    for place, changed in places.items():
        rewrite(run / "config.yaml", **changed)
        with pytest.raises(UsageError) as info:
            evaluate(evaluation)
        assert str(info.value).startswith(f"{place}._target_=")
        if isinstance(hostile["_target_"], str):
            assert "not among the classes allowed in a run" in str(info.value)
        assert not list(empty.iterdir())
    assert "evil" not in sys.modules


def test_a_manifest_of_the_future_is_refused(empty, run):
    path = run / "checkpoints" / "step-4" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    refused(empty, "sample", f"run={run}", because="newer|99")


# Places to write to, and what a model does not have


def test_samples_go_only_where_they_can(empty, run, tmp_path):
    def answer(out: str, because: str) -> None:
        refused(empty, "sample", f"run={run}", f"out={out}", because=because)

    answer("nowhere/grid.png", "out=nowhere/grid.png|no directory nowhere")
    answer("nowhere/folder", "out=nowhere/folder|no directory nowhere")
    answer("grid.jpg", "out=grid.jpg|.png")
    answer("/proc/grid.png", "out=/proc/grid.png")
    (empty / "taken").write_text("a file")
    answer("taken", "out=taken|existing file")
    (empty / "taken.png").mkdir()
    answer("taken.png", "out=taken.png|existing folder")


def test_what_a_model_does_not_have_cannot_be_asked_for(empty, run, tmp_path):
    refused(empty, "sample", f"run={run}", "label=3", because="label=3|no classes")
    refused(empty, "sample", f"run={run}", "sampler=ddim", because="sampler|VAE")
    refused(empty, "evaluate", f"run={run}", "sampler=ddim", because="sampler|VAE")
    refused(empty, "sample", f"run={run}", "device=cuda", because="device=cuda|device=cpu")
    conditional = untrained(tmp_path, *SMALL["ddpm"], "data.conditional=true")[0]
    refused(empty, "sample", f"run={conditional}", "label=10", because="label=10|0..9")
    refused(empty, "sample", f"run={conditional}", "sampler=ddim", "sampler.steps=21", because="sampler|21|20")
    refused(empty, "evaluate", f"run={conditional}", "metrics.num_samples=3", because="num_samples|even")
    plane = untrained(tmp_path, "model=vae", "data=moons")[0]
    refused(empty, "sample", f"run={plane}", "out=folder", because="out=folder|.npz")
