"""Variations by the command: which embedding and which noise each picture has, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import genzoo as package
from genzoo.data import digits
from genzoo.distributions.discretization import to_bytes
from genzoo.editing.task import from_bytes
from genzoo.evaluation.samples import stored
from genzoo.numerics.random import SampleStreams
from genzoo.runs import Run
from genzoo.text import run_tokenizer
from genzoo.variations import image_path, text_path
from tests.commands import SMALL, genzoo, trained, untrained

SHAPES = ["data=shapes", "data.size=16", "data.n=80", "data.n_test=24"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return untrained(tmp_path_factory.mktemp("unclip"), *SMALL["unclip"], "data=digits")[0]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    images = stored(digits().test.x[:2], 17)
    for name, image in zip("ab", images, strict=True):
        Image.fromarray(image[0].numpy()).save(f"{name}.png")
    return tmp_path


def pictures() -> Tensor:
    return from_bytes(stored(digits().test.x[:2], 17), 17)


def vary(run: Path, *words: str) -> np.ndarray:
    code, out, err = genzoo("vary", f"run={run}", "image=a.png", "out=x.npz", *words)
    assert code == 0, err
    assert out.rstrip().endswith(": x.npz")
    return np.load("x.npz")["samples"]


def as_bytes(x: Tensor) -> np.ndarray:
    return to_bytes(x, 17).numpy().transpose(0, 2, 3, 1)


def test_variations_are_draws_of_the_embedding_with_noise_of_their_own(run):
    found, model, x = vary(run, "n=3", "seed=5"), package.load(run), pictures()
    assert found.shape == (1, 4, 8, 8, 1)
    np.testing.assert_array_equal(found[0, :1], as_bytes(x[:1]))
    drawn = model.from_embedding(model.embed_image(x[:1]).expand(3, -1), rng=SampleStreams(5, range(3))).x
    np.testing.assert_array_equal(found[0, 1:], as_bytes(drawn))
    assert len({image.tobytes() for image in found[0]}) == 4


def test_a_path_between_pictures_has_one_noise_in_each_row(run):
    found, model, x = vary(run, "to=b.png", "n=2", "steps=4"), package.load(run), pictures()
    assert found.shape == (2, 6, 8, 8, 1)
    path = image_path(*(model.embed_image(picture[None]) for picture in x), 4)[:, 0]
    for row in range(2):
        np.testing.assert_array_equal(found[row, [0, -1]], as_bytes(x))
        drawn = model.from_embedding(path, rng=SampleStreams(0, [row] * 4)).x
        np.testing.assert_array_equal(found[row, 1:-1], as_bytes(drawn))


def test_texts_turn_the_embedding_of_a_picture():
    run = trained(*SMALL["unclip"], *SHAPES, "metrics.features=null")
    model = package.load(run)
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save("a.png")
    texts = ["a red ring", "a blue ring"]
    found = vary(run, f"from_text={texts[0]}", f"text={texts[1]}", "steps=3", "n=1", "strength=0.4")
    x = from_bytes(torch.from_numpy(np.array(Image.open("a.png"))).permute(2, 0, 1)[None], 256)
    before, after = (model.embed_text(run_tokenizer(Run(run)).encode([text])) for text in texts)
    path = text_path(model.embed_image(x), before, after, 3, 0.4)[:, 0]
    drawn = model.from_embedding(path, rng=SampleStreams(0, [0] * 3)).x
    np.testing.assert_array_equal(found[0, 1:], to_bytes(drawn, 256).numpy().transpose(0, 2, 3, 1))


def test_classes_are_named_in_place_of_texts(run):
    found, model = vary(run, "from_text=2", "text=7", "steps=2", "n=1"), package.load(run)
    e = model.embed_image(pictures()[:1])
    path = text_path(e, *(model.embed_text(torch.tensor([k])) for k in (2, 7)), 2, 0.5)[:, 0]
    np.testing.assert_array_equal(found[0, 1:], as_bytes(model.from_embedding(path, rng=SampleStreams(0, [0, 0])).x))


def test_from_python_the_variations_are_those_of_the_command(run):
    x = pictures()
    assert torch.equal(package.vary(run, x[0], n=3, seed=5), package.vary(run, "a.png", n=3, seed=5))
    for words, settings in ((["n=3", "seed=5"], {"n": 3, "seed": 5}), (["to=b.png"], {"to": "b.png"})):
        found = vary(run, *words)
        drawn = package.vary(run, "a.png", **settings)
        given = found[:, 1 : 1 + drawn.shape[1]]
        np.testing.assert_array_equal(given.reshape(-1, 8, 8, 1), as_bytes(drawn.flatten(0, 1)))
    assert package.vary(run, x[0], guidance=2.0, n=2).shape == (1, 2, 1, 8, 8)
    for wrong, message in (
        ({"from_text": "3"}, "set both"),
        ({"invert": True, "guidance": 2.0}, "omit guidance"),
        ({"to": x}, "one image each"),
    ):
        with pytest.raises(ValueError, match=message):
            package.vary(run, x[0], **wrong)


def test_the_prior_is_guided_by_a_key_of_its_own(run):
    settings = {"text": None, "label": 3, "seed": 2}
    plain, guided = (package.sample(run, 4, prior_guidance=scale, **settings) for scale in (None, 3.0))
    assert not torch.equal(plain, guided)
    assert genzoo("sample", f"run={run}", "label=3", "n=4", "seed=2", "prior_guidance=3", "out=y.npz").code == 0
    np.testing.assert_array_equal(np.load("y.npz")["samples"], as_bytes(guided))
    code, out, _ = genzoo("sample", f"run={run}", "label=3", "n=2", "prior_guidance=3", "guidance=2", "out=y.npz")
    assert code == 0 and f"{2 * 2 * 2 + 2 * 2} evaluations each" in out


def test_the_noise_of_a_picture_restores_it(run):
    found, x = vary(run, "invert=true", "to=b.png", "steps=2"), pictures()
    assert found.shape == (1, 4, 8, 8, 1)
    error = np.abs(found[0, 1:3].astype(int) - as_bytes(x)).mean()
    assert error < 12, "an untrained decoder is restored to the tolerance of the ODE"


def test_guidance_and_animations(run):
    assert not np.array_equal(vary(run, "n=2", "guidance=3"), vary(run, "n=2"))
    assert genzoo("vary", f"run={run}", "image=a.png", "to=b.png", "out=x.gif", "n=2").code == 0
    with Image.open("x.gif") as animation:
        assert animation.n_frames > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image=c.png"], "image=c.png: there is no such file"),
        (["image=a.png", "to=c.png"], "to=c.png: there is no such file"),
        (["image=a.png", "text=3"], "from_text is missing"),
        (["image=a.png", "from_text=3"], "text is missing"),
        (["image=a.png", "from_text=3", "text=3"], "are equal, and have no difference"),
        (["image=a.png", "from_text=3", "text=11"], "text=11"),
        (["image=a.png", "from_text=3", "text=4", "to=b.png"], "to, text: set only one"),
        (["image=a.png", "strength=0"], "strength"),
        (["image=a.png", "invert=true", "guidance=2"], "invert: .*omit guidance"),
        (["image=a.png", "out=x.gif"], "no order to be animated"),
        (["image=a.png", "out=x.txt"], "out=x.txt"),
    ],
)
def test_what_cannot_be_varied_is_refused_in_one_line(run, words, message):
    code, out, err = genzoo("vary", f"run={run}", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err), err


def test_other_families_are_refused(tmp_path):
    run = untrained(tmp_path, *SMALL["vae"])[0]
    code, _, err = genzoo("vary", f"run={run}", "image=a.png")
    assert (code, err) == (2, "genzoo: VAE draws no images of an embedding: choose unclip\n")
