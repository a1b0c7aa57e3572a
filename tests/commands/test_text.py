"""Models of captions by the commands: what is trained, sampled by text, scored, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import genzoo as package
from genzoo.conditions import Tokens
from genzoo.data import with_validation
from genzoo.data.shapes import shapes
from genzoo.errors import UsageError
from genzoo.evaluation.text import attribute_scores, held_out_captions
from genzoo.numerics.random import SampleStreams
from genzoo.runs import Run
from genzoo.text import run_tokenizer
from tests.commands import SMALL, TINY, genzoo, untrained

SHAPES = ["data=shapes", "data.size=16", "data.n=80", "data.n_test=24", "metrics.features=null"]
TEXT = "a small red ring on the left"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = [*SMALL["ddpm"], *TINY, *SHAPES, "metrics.n=20", "metrics.throughput=2", f"outputs={folder}"]
    code, out, err = genzoo(*words)
    assert code == 0, err
    return Path(out.rpartition("run: ")[2].strip())


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_holds_its_tokenizer_and_its_captions_are_its_condition(trained):
    run, data = Run(trained), shapes(size=16, n=80, n_test=24)
    tokenizer = run_tokenizer(run)
    assert run.status["tokenizer_sha256"] == tokenizer.sha256 == data.tokenizer.sha256
    model = package.load(trained)
    assert model.condition == Tokens(tokenizer.length, tokenizer.vocabulary) == data.condition
    assert torch.equal(model.conditioner.examples, with_validation(data, 0.1).train.y)


def test_samples_by_text_are_those_of_its_tokens(trained, here):
    assert genzoo("sample", f"run={trained}", f"text={TEXT}", "n=3", "seed=4", "out=x.npz").code == 0
    found = np.load("x.npz")
    assert list(found["captions"]) == [TEXT] * 3
    model = package.load(trained)
    y = run_tokenizer(Run(trained)).encode([TEXT]).expand(3, -1)
    np.testing.assert_array_equal(found["y"], y)
    x = model.sample(3, y, rng=SampleStreams(4, range(3))).x
    torch.testing.assert_close(package.sample(trained, 3, text=TEXT, seed=4), x)
    levels = np.clip(np.floor(128 * (x.numpy() + 1)), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(found["samples"], levels)


def test_a_file_of_texts_is_a_row_each(trained, here):
    Path("texts.txt").write_text("a red ring\na large blue square\n")
    assert genzoo("sample", f"run={trained}", "texts=texts.txt", "n=2", "out=x.npz").code == 0
    captions = list(np.load("x.npz")["captions"])
    assert captions == ["a red ring"] * 2 + ["a large blue square"] * 2
    twice = package.sample(trained, 2, text=["a red ring", "a large blue square"])
    assert len(twice) == 4
    assert genzoo("sample", f"run={trained}", "texts=texts.txt", "n=2", "out=x.png").code == 0
    assert Image.open("x.png").size == (2 * (96 + 6) + 6, 2 * (96 + 6 + 15 + 4))


def test_a_folder_of_samples_is_a_data_set_of_captions(trained, here):
    for _ in range(2):
        assert genzoo("sample", f"run={trained}", f"text={TEXT}", "n=2", "out=pictures").code == 0
        lines = [json.loads(line) for line in Path("pictures/captions.jsonl").read_text().splitlines()]
        assert lines == [{"file": f"{i:06d}.png", "caption": TEXT} for i in range(2)]


@pytest.mark.parametrize(
    "text", ['it is "red", (so) {what}', "back\\slash \\", "${data.name}", "1", "true", "a=b", "x'y"]
)
def test_every_text_is_taken_as_it_is_typed(trained, here, text):
    code, _, err = genzoo("sample", f"run={trained}", f"text={text}", "n=1", "out=x.npz")
    if "tokens, at most" not in err:
        assert code == 0, err
        assert list(np.load("x.npz")["captions"]) == [text]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("text=",), "text"),
        (("text=  ",), "text: is empty"),
        (("text=" + "word " * 10_000,), "tokens, at most"),
        ((f"text={TEXT}", "texts=t.txt"), "set only one of them"),
        (("texts=missing.txt",), "texts=missing.txt"),
        (("label=red",), "set text="),
    ],
)
def test_bad_texts_are_answered_in_one_line(trained, here, words, message):
    code, _, err = genzoo("sample", f"run={trained}", *words)
    assert code == 2 and message in err and err.strip().count("\n") == 0 and len(err) < 300


def test_unknown_characters_are_said(trained, here):
    code, _, err = genzoo("sample", f"run={trained}", "text=a röt ring", "n=1", "out=x.png")
    assert code == 0 and "no training caption has the characters 'ö'" in err


def test_a_run_without_captions_has_no_text(here):
    run = untrained(here, *SMALL["ddpm"], "data.conditional=true")[0]
    code, _, err = genzoo("sample", f"run={run}", f"text={TEXT}")
    assert code == 2 and "this model has no captions" in err
    with pytest.raises(UsageError, match="this model has no captions"):
        package.sample(run, 1, text=TEXT)


class Colour:
    """A checker of nothing but a red picture."""

    name, accuracy = "red", 1.0

    def check(self, x, captions):
        red = (x[:, 0] > 128).flatten(1).all(1).double()
        named = torch.tensor(["red" in caption for caption in captions])
        other = torch.ones(len(x), dtype=torch.float64)
        return {"colour": torch.where(named, red, torch.nan), "other": other}


def test_a_picture_is_right_where_no_named_attribute_is_wrong():
    x = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    x[:2, 0] = 255
    found = attribute_scores(x, ["red", "red", "red", "blue"], Colour(), "text/attributes", "test/train")
    score = found["text/attributes"]
    assert score.value == 0.75 and score.stderr == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert score.detail == {"per_attribute": {"colour": pytest.approx(2 / 3), "other": 1.0}}
    assert score.protocol["checker"] == "red" and score.protocol["n_fake"] == 4


def test_held_out_captions_are_those_of_the_test_split_equally_often():
    data = shapes(size=16, n=80, n_test=24)
    chosen = held_out_captions(data, 48, seed=3)
    assert sorted(data.tokenizer.decode(chosen)) == sorted(2 * data.tokenizer.decode(data.test.y))
    assert not torch.equal(chosen, held_out_captions(data, 48, seed=4))


def test_a_training_scores_seen_and_held_out_captions(trained):
    metrics = Run(trained).result["metrics"]
    for name, split in (("text/attributes", "train"), ("text/held_out", "test")):
        card = metrics[name]["card"]
        assert 0 <= metrics[name]["value"] <= 1 and card["protocol"]["n_fake"] == 20
        assert card["protocol"]["captions"] == f"shapes/{split}" and card["protocol"]["checker_accuracy"] > 0.99
