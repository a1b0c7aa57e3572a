"""Contrastive networks by the commands: their scores, their use as encoders of unCLIP and as guides, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from genzoo import load
from genzoo.errors import UsageError
from genzoo.loading import LOAD_ENCODER, check_tokenizers, load_encoder
from genzoo.runs import Run
from genzoo.text import Tokenizer, run_tokenizer
from tests.commands import SMALL, TINY, genzoo, trained, untrained

SHAPES = ["data=shapes", "data.size=16", "data.n=80", "data.n_test=24", "metrics.features=null"]
CLIP = [*SMALL["clip"], *SHAPES]
UNCLIP = [*(word for word in SMALL["unclip"] if not word.startswith("encoder.")), *SHAPES, "metrics.throughput=2"]
TEXT = "text=a small red ring on the left"


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    return trained(*CLIP, f"outputs={folder}")


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_contrastive_network_is_trained_and_scored_by_retrieval(clip):
    found = Run(clip).result["metrics"]
    assert {"retrieval/loss", "retrieval/image_to_text", "retrieval/text_to_image"} <= found.keys()
    assert not any(name.startswith(("sampling/", "train/", "test/", "text/")) for name in found)
    protocol = found["retrieval/image_to_text"]["card"]["protocol"]
    assert protocol["split"] == "test" and protocol["candidates"] == protocol["n"] <= 16
    assert (clip / "tokenizer.json").exists() and not (clip / "samples.png").exists()
    code, _, err = genzoo("evaluate", f"run={clip}", "metrics.events=16")
    assert code == 0, err
    again = Run(clip).result["metrics"]
    assert again["retrieval/loss"]["value"] == pytest.approx(found["retrieval/loss"]["value"], rel=1e-5)
    code, _, err = genzoo("sample", f"run={clip}", "n=2")
    assert (code, err.count("\n")) == (2, 1) and "Contrastive" in err and "no samples" in err


def test_a_finished_network_is_the_encoder_of_a_run_that_needs_it_no_longer(clip, here):
    source = here / "source"
    shutil.copytree(clip, source)
    encoder = load_encoder(source)
    run = trained(*UNCLIP, "encoder=run", f"encoder.run={source}").resolve()
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["encoder"] == {"_target_": "genzoo.model.frozen", "model": Run(source).config["model"]}
    assert {event.get("stage") for event in Run(run).events()} == {"prior", "decoder", None}
    shutil.rmtree(source)
    model = load(run)
    own, weights = encoder.encoders.state_dict(), model.encoder.encoders.state_dict()
    assert own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)
    assert genzoo("sample", f"run={run}", TEXT, "n=2", "guidance=2", "out=x.npz").code == 0
    assert np.load("x.npz")["samples"].shape == (2, 16, 16, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["encoder=run", "encoder.run={clip}", "data.n=60"], "run=.*: has another tokenizer than the data|condition"),
        (["encoder=run", "encoder.run={ddpm}"], "DDPM is no contrastive network: train model=clip"),
        (["encoder=run", "encoder.run={clip}", "data.size=32"], "encoder: is for .*16, 16.*the data are"),
        (["encoder=shipped"], "encoder: is for .*32, 32.*the data are"),
        (["encoder=run", "encoder.run=/nowhere"], "/nowhere: no such directory"),
    ],
)
def test_what_is_no_encoder_of_the_data_is_refused_in_one_line(clip, here, words, message):
    ddpm = untrained(here / "other", *SMALL["ddpm"])[0]
    given = [word.format(clip=clip, ddpm=ddpm) for word in words]
    code, out, err = genzoo(*TINY, *UNCLIP, *given)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert re.search(message, err), err
    assert not Path("outputs").exists()


def test_tokens_of_another_tokenizer_are_refused_whatever_their_number(clip):
    own = run_tokenizer(Run(clip))
    other = Tokenizer.train(["b a", "a b", "a small red ring"], own.vocabulary, own.length)
    nodes = {"parts": [{"_target_": LOAD_ENCODER, "run": str(clip)}]}
    check_tokenizers(nodes, own)
    check_tokenizers({"parts": [{"_target_": "genzoo.families.clip.Contrastive"}]}, other)
    for tokenizer in (other, None):
        with pytest.raises(UsageError, match="has another tokenizer than the data"):
            check_tokenizers(nodes, tokenizer)


def test_a_network_of_noisy_images_guides_by_captions(here):
    ddpm = trained(*SMALL["ddpm"], *SHAPES)
    guide = trained("model=noisy_clip", "model.network.channels=8", "model.dim=8", "model.text_width=8", *SHAPES)
    assert "retrieval/image_to_text_noisy" in Run(guide).result["metrics"]
    words = [f"run={ddpm}", TEXT, "n=2", "sampler=ddim", "sampler.steps=3", "out=x.npz"]
    by = ["guidance=classifier", f"guidance.run={guide}", "guidance.scale=3"]
    code, out, err = genzoo("sample", *words, *by)
    assert code == 0 and "6 evaluations" in out, err
    guided = np.load("x.npz")["samples"]
    assert genzoo("sample", *words).code == 0
    assert not np.array_equal(guided, np.load("x.npz")["samples"])
    code, _, err = genzoo("sample", *words, "guidance=classifier", f"guidance.run={ddpm}")
    assert code == 2 and "DDPM is no classifier of noisy data: train model=noisy_classifier, or for captions" in err
