"""Loading: the weights of a run come back bit by bit, averaged or trained, and nothing of the run is executed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import genzoo as package
from genzoo import load
from genzoo.diffusion.samplers import Ancestral
from genzoo.errors import UsageError
from genzoo.runs import Run, RunError
from genzoo.training import checkpoints
from tests.commands import SMALL, genzoo, trained, untrained
from tests.conftest import CLASSIFIERS
from tests.toys import Mean


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("family", [family for family in SMALL if family not in CLASSIFIERS])
def test_weights_come_back_averaged_or_trained(tmp_path, family):
    run, model, ema = untrained(tmp_path, *SMALL[family])
    assert not same(model, ema)
    loaded = load(run)
    assert type(loaded) is type(model) and same(loaded, ema) and same(load(run, ema=False), model)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_the_newest_checkpoint_is_loaded(tmp_path):
    run, model, ema = untrained(tmp_path, *SMALL["vae"])
    checkpoints.save(run / "checkpoints", 10, ema, model, {})  # step 10 comes after step 4
    assert same(load(run), model)


def test_another_sampler_may_be_given_to_a_denoiser_alone(tmp_path):
    run = untrained(tmp_path, *SMALL["ddpm"])[0]
    model = load(run, sampler={"_target_": "genzoo.diffusion.samplers.Ancestral", "steps": 3})
    assert isinstance(model.sampler, Ancestral)
    assert model.sample(2).nfe == 3
    with pytest.raises(UsageError, match=r"steps must be in 1\.\.20"):
        load(run, sampler={"_target_": "genzoo.diffusion.samplers.Ancestral", "steps": 21})
    with pytest.raises(UsageError, match="VAE samples in one pass"):
        load(untrained(tmp_path, *SMALL["vae"])[0], sampler={"_target_": "genzoo.diffusion.samplers.Ancestral"})


def test_a_strangers_family_is_made_only_when_it_is_trusted(tmp_path):
    run = Run.create(
        tmp_path,
        "run",
        {
            "model": {
                "_target_": "tests.toys.Mean",
                "event": {"_target_": "genzoo.event.EventSpec", "shape": [2]},
                "start": 3.0,
            }
        },
    )
    checkpoints.save(run.path / "checkpoints", 1, Mean(), Mean(start=5.0), {})
    with pytest.raises(
        UsageError, match=r"model\._target_=tests\.toys\.Mean: not among .* trust=\[tests\.toys\.Mean\]"
    ):
        load(run.path)
    assert load(run.path, trust=["tests.toys.Mean"]).mean.tolist() == [5.0, 5.0]


def test_what_is_no_generative_model_is_refused(tmp_path):
    run = Run.create(tmp_path, "run", {"model": {"_target_": "genzoo.nn.mlp.MLP", "in_shape": [2], "out_shape": [2]}})
    with pytest.raises(UsageError, match="is not a GenerativeModel"):
        load(run.path)
    (run.path / "config.yaml").write_text(yaml.safe_dump({"model": 3}))
    with pytest.raises(UsageError, match="has no model section"):
        load(run.path)
    with pytest.raises(RunError, match="no such directory"):
        load(tmp_path / "nowhere")


def test_public_names_are_found_where_they_live():
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'gan'"):
        package.gan  # noqa: B018


# A codec of a finished run


LATENT = [
    "model=latent",
    "prior.network.width=8",
    "prior.network.depth=1",
    "prior.schedule.num_steps=20",
    "sampler.steps=5",
]


def test_a_run_over_another_one_s_codec_needs_it_no_longer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, _, average = untrained(tmp_path, *SMALL["vae"])
    run = trained(*LATENT, "codec=run", f"codec.run={source}", "metrics.throughput=2").resolve()
    text = (run / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["model"]["codec"] == {"_target_": "genzoo.model.frozen", "model": Run(source).config["model"]}
    assert config["codec"]["run"] == str(source), "where it came from stays on record"
    assert {event.get("stage") for event in Run(run).events()} == {"prior", None}

    shutil.rmtree(source)
    model = load(run)
    assert same(model.codec, average), "its averaged weights, bit by bit"
    assert [stage.name for stage in model.stages()] == ["prior"]
    before = load(run, ema=False)
    assert same(before.codec, average) and not same(before.prior, model.prior)
    for command in (
        ["sample", f"run={run}", "n=4", "sampler=ddim", "sampler.steps=3"],
        ["evaluate", f"run={run}", "metrics.events=4", "metrics.throughput=2"],
    ):
        code, _, err = genzoo(*command)
        assert code == 0, err
    assert load(run, sampler={"_target_": "genzoo.diffusion.samplers.Ancestral", "steps": 3}).sample(2).nfe == 3 + 1


def test_a_codec_that_does_not_fit_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae, ddpm = (untrained(tmp_path, *SMALL[name])[0] for name in ("vae", "ddpm"))
    for words, message in [
        (["data=moons", f"codec.run={vae}"], r"model: codec: models EventSpec\(shape=\(1, 8, 8\), levels=17\)"),
        ([f"codec.run={ddpm}"], "model: codec: DDPM has no encoder"),
        (["codec.run=/nowhere"], "model.codec: run=/nowhere: no such directory"),
        ([], r"codec\.run is missing: set codec\.run="),
    ]:
        code, out, err = genzoo(*LATENT, "codec=run", *words)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert re.search(message, err), err
    assert not Path("outputs").exists()


def test_a_stranger_s_run_may_not_name_another_run(tmp_path):
    run = untrained(tmp_path, *SMALL["vae"])[0]
    config = Run(run).config
    config["model"]["encoder"] = {"_target_": "genzoo.loading.load", "run": str(run)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UsageError, match=r"genzoo\.loading\.load: not among the classes"):
        load(run)


def test_parts_are_chosen_where_there_are_any():
    for words, message in [
        (["model=vae", "codec=vae"], "codec: vae has no codec; omit it"),
        (["model=ddpm", "prior=ddpm"], "prior: DDPM has no prior; omit it"),
        (["model=latent", "prior=realnvp", "sampler=ddim"], "sampler: latent samples in one pass"),
    ]:
        code, _, err = genzoo(*words)
        assert code == 2 and message in err
