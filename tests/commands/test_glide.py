"""The model GLIDE by the commands: data without captions are refused, pictures are edited by text, and both processes train."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import genzoo as package
from genzoo import load
from genzoo.diffusion.guidance import ClassifierFreeGuidance
from genzoo.diffusion.inverse import Inpainting, MomentMatching, Observation
from genzoo.diffusion.samplers import DDIM
from genzoo.distributions.discretization import to_bytes
from genzoo.editing.task import from_bytes, region
from genzoo.families.ddpm import DDPM
from genzoo.families.flow_matching import FlowMatching
from genzoo.numerics.random import SampleStreams
from genzoo.runs import Run
from genzoo.text import run_tokenizer
from genzoo.training import checkpoints
from tests.commands import SMALL, TINY, described, genzoo, untrained

SHAPES = ["data=shapes", "data.size=16", "data.n=40", "data.n_test=8"]
NETWORK = [
    "model.network.width=8", "model.network.layers=1", "model.network.heads=2", "model.network.text_width=8",
    "model.network.text_layers=1",
]  # fmt: skip
UNET = [
    "network@model.network=glide_image", "model.network.channels=8", "model.network.multipliers=[1]",
    "model.network.head_channels=8", "model.network.text_width=8", "model.network.text_layers=1",
]  # fmt: skip
GLIDE = ["model=glide", "process=ddpm", *SHAPES, *NETWORK]
TEXT, OTHER = "a small red ring on the left", "a large blue cross on a black background"
QUICK = ["sampler=ddim", "sampler.steps=4", "sampler.eta=1"]
DDIM4 = {"_target_": "genzoo.diffusion.samplers.DDIM", "steps": 4, "eta": 1.0}


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    words = [
        *GLIDE,
        *TINY,
        "model.schedule.num_steps=20",
        "sampler.steps=4",
        "trainer.grids=0",
        "metrics.features=null",
    ]
    code, out, err = genzoo(*words, f"outputs={tmp_path_factory.mktemp('glide')}")
    assert code == 0, err
    trained = Path(out.rpartition("run: ")[2].strip())
    model = load(trained)
    with torch.no_grad():  # random weights, so that captions count
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    checkpoints.save(trained / "checkpoints", Run(trained).status["step"], model, model, {})
    return trained


@pytest.fixture
def picture(here) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(image).save("x.png")
    return image


def tokens(run: Path, text: str, n: int) -> torch.Tensor:
    return run_tokenizer(Run(run)).encode([text]).expand(n, -1)


# What is trained


@pytest.mark.parametrize(
    "words",
    [
        ["data=digits"],
        ["data=digits", "data.conditional=true"],
        ["data=moons"],
        ["data=moons", "data.conditional=true"],
        ["data=shapes", "data.size=16", "data.conditional=false"],
        ["data=moons", "process=ddpm", "network@model.network=glide_image"],
    ],
)
def test_data_without_captions_are_refused_before_anything_is_made(here, words):
    code, out, err = genzoo("model=glide", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "data=shapes data.conditional=true" in err and not list(here.iterdir())


def test_glide_is_diffusion_or_flow_matching_by_one_word():
    network = {"width": 8, "cross_attention": True}
    diffusion = described(*GLIDE)["model"]
    flow = described("model=glide", *SHAPES, *NETWORK)["model"]
    assert diffusion["_target_"] == f"{DDPM.__module__}.DDPM" and diffusion["prediction"] == "x0"
    assert flow["_target_"] == f"{FlowMatching.__module__}.FlowMatching"
    assert diffusion["network"] == flow["network"] and network.items() <= flow["network"].items()
    assert diffusion["condition_dropout"] == flow["condition_dropout"] > 0
    assert described("model=ddpm", *SHAPES)["model"].keys() == diffusion.keys()
    code, _, err = genzoo("model=vae", "process=flow_matching")
    assert code == 2 and "unknown key 'process'" in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [NETWORK, [*UNET, "process=ddpm", "model.prediction=v"]])
def test_other_processes_and_networks_are_trained_and_sampled_by_text(here, words):
    code, out, err = genzoo("model=glide", *SHAPES, *words, *TINY, "budget.images=64", "trainer.batch_size=32",
                            "trainer.grids=0", "metrics.features=null", "metrics.events=2")  # fmt: skip
    assert code == 0, err
    trained = out.rpartition("run: ")[2].strip()
    assert genzoo("sample", f"run={trained}", f"text={TEXT}", "guidance=2.0", "n=2", "out=x.npz").code == 0
    assert np.load("x.npz")["samples"].shape == (2, 16, 16, 3)


# What is edited


def edited(run: Path, *words: str) -> np.ndarray:
    code, out, err = genzoo("edit", f"run={run}", "out=x.npz", *words)
    assert (code, err) == (0, ""), err
    assert out.endswith(": x.npz\n")
    return np.load("x.npz")["samples"]


@pytest.mark.parametrize("scale", [None, 1.0, 3.0])
def test_a_picture_is_filled_by_its_text_with_guidance(run, picture, scale):
    words = [] if scale is None else [f"guidance={scale}"]
    found = edited(run, "image=x.png", "mask=bottom", f"text={TEXT}", "n=2", *QUICK, *words)
    np.testing.assert_array_equal(found[0, :, :8], np.stack([picture[:8]] * 2))
    model = load(run)
    operator = Inpainting(model.shape, region("bottom", model.event))
    value = operator(from_bytes(torch.from_numpy(picture).permute(2, 0, 1)[None], 256)).expand(2, -1)
    denoiser = model if scale is None else ClassifierFreeGuidance(model, scale)
    sampler = MomentMatching(Observation(operator, value), DDIM(4, eta=1.0))
    x = sampler(denoiser, 2, tokens(run, TEXT, 2), SampleStreams(0, range(2))).x
    np.testing.assert_array_equal(found[0][:, 8:], to_bytes(x, 256).permute(0, 2, 3, 1).numpy()[:, 8:])
    python = package.edit(run, "x.png", mask="bottom", text=TEXT, n=2, guidance=scale, sampler=DDIM4)
    torch.testing.assert_close(python.draws[0], x)
    other = edited(run, "image=x.png", "mask=bottom", f"text={OTHER}", "n=2", *QUICK, *words)
    assert (other != found).any()


@pytest.mark.parametrize("method", ["repaint", "dps", "pigdm"])
def test_every_method_takes_text_and_guidance(run, picture, method):
    words = ["image=x.png", "mask=left", "n=2", f"method={method}", *QUICK]
    draws = [edited(run, *words, f"text={TEXT}", f"guidance={scale}") for scale in (1.0, 3.0)]
    assert (draws[0] != draws[1]).any()
    for found in draws:
        np.testing.assert_array_equal(found[0, :, :, 8:], np.stack([picture[:, 8:]] * 2))


def test_other_tasks_take_text_and_pictures_of_the_split_their_own_captions(run, picture):
    Image.fromarray(picture[::2, ::2]).save("small.png")
    draws = [
        edited(run, "image=small.png", "task=super_resolution", f"text={text}", "n=1", *QUICK) for text in (TEXT, OTHER)
    ]
    assert (draws[0] != draws[1]).any()
    words = ["split=test", "mask=right", "images=2", "n=2", *QUICK]
    own = edited(run, *words)
    setting = json.loads(Path("x.json").read_text())["setting"]
    assert setting["text"] is None and setting["guidance"] is None
    assert (edited(run, *words, f"text={TEXT}") != own).any()
    assert (edited(run, *words, "guidance=4.0") != own).any()
    setting = json.loads(Path("x.json").read_text())["setting"]
    assert setting["guidance"]["scale"] == 4.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "text is missing: the model is conditional; set text="),
        (["label=3"], "set text="),
        (["text="], "text"),
        ([f"text={TEXT}", "label=3"], "set only one of them"),
        (["text=" + "red " * 60], "tokens, at most"),
        ([f"text={TEXT}", "guidance=-1"], "scale must be at least 0"),
        ([f"text={TEXT}", "guidance=classifier", "guidance.run=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_edited_is_answered_in_one_line(run, picture, words, message):
    code, out, err = genzoo("edit", f"run={run}", "image=x.png", "mask=bottom", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert not Path("edit.png").exists()


def test_models_that_are_not_guided_are_refused(here, picture):
    vae = untrained(here, *SMALL["vae"], "data.conditional=true")[0]
    Image.fromarray(picture[:8, :8, 0]).save("grey.png")
    edit = functools.partial(genzoo, "edit", f"run={vae}", "image=grey.png", "mask=bottom", "label=3")
    code, out, err = edit("guidance=2.0")
    assert (code, out, err.count("\n")) == (2, "", 1) and "guidance" in err
    code, out, err = edit(f"text={TEXT}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    with pytest.raises(ValueError, match="pass only one of them"):
        package.edit(vae, torch.zeros(1, 8, 8), mask="bottom", label=3, text=TEXT)


# What is encoded


def test_latents_and_paths_have_their_captions(run, here):
    assert genzoo("encode", f"run={run}", "n=2", "out=z.npz").code == 0
    found = np.load("z.npz")
    np.testing.assert_array_equal(found["y"].shape, (2, run_tokenizer(Run(run)).length))
    assert genzoo("decode", f"run={run}", "latents=z.npz", "out=x.npz").code == 0
    assert genzoo("reconstruct", f"run={run}", "n=2", "out=r.png").code == 0
    code, _, err = genzoo("interpolate", f"run={run}", "n=1", "steps=3", "out=i.png")
    assert code == 2 and "no two examples of one condition" in err
    assert genzoo("interpolate", f"run={run}", "n=1", "steps=3", "examples=prior", "out=i.png").code == 0
    assert genzoo("trajectory", f"run={run}", "n=2", "frames=3", "out=t.png", "guidance=2.0").code == 0
