"""The command edit: known pixels to the byte, files of every kind, scores beside them, and refusals in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import genzoo as package
from genzoo import load
from genzoo.data import digits
from genzoo.diffusion.inverse import Inpainting, MomentMatching, Observation
from genzoo.diffusion.samplers import DDIM
from genzoo.distributions.discretization import bin_center, to_bytes
from genzoo.editing.task import from_bytes, region, to_levels
from genzoo.event import EventSpec
from genzoo.numerics.random import SampleStreams
from tests.commands import SMALL, genzoo, untrained

TINY_AR = ["model=autoregressive", "model.network.width=8", "model.network.layers=1"]
QUICK = ["sampler=ddim", "sampler.steps=4", "sampler.eta=1"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ddpm(here) -> Path:
    return untrained(here, *SMALL["ddpm"])[0]


@pytest.fixture
def vae(here) -> Path:
    return untrained(here, *SMALL["vae"])[0]


@pytest.fixture
def picture() -> np.ndarray:
    """A test digit on another scale than its 17 levels: bytes that no model of them would draw."""
    image = to_bytes(bin_center(digits().test.x[3, 0], 17), 17).numpy()
    image[0, :4] = [7, 100, 200, 251]
    Image.fromarray(image).save("digit.png")
    return image


@pytest.fixture
def mask() -> np.ndarray:
    unknown = np.zeros((8, 8), dtype=np.uint8)
    unknown[2:6, 3:7] = 255
    Image.fromarray(unknown).save("mask.png")
    return unknown > 0


def edited(run: Path, *words: str) -> np.lib.npyio.NpzFile:
    code, out, err = genzoo("edit", f"run={run}", "out=x.npz", *words)
    assert (code, err) == (0, ""), err
    assert out.endswith(": x.npz\n")
    return np.load("x.npz")


@pytest.mark.parametrize("method", ["repaint", "dps", "pigdm", "moment_matching"])
def test_known_pixels_are_those_of_the_file_to_the_byte_and_unknown_ones_are_drawn(ddpm, picture, mask, method):
    found = edited(ddpm, "image=digit.png", "mask=mask.png", "n=3", f"method={method}", *QUICK)
    samples = found["samples"]
    assert samples.shape == (1, 3, 8, 8, 1) and samples.dtype == np.uint8
    for image in (*samples[0, ..., 0], found["mean"][0, ..., 0]):
        np.testing.assert_array_equal(image[~mask], picture[~mask])
    assert (samples[0, 0, ..., 0] != samples[0, 1, ..., 0])[mask].mean() > 0.5
    assert np.all(found["std"][0, 0][~mask] == 0) and np.all(found["std"][0, 0][mask] > 0)


def test_unknown_pixels_of_the_file_are_not_looked_at(ddpm, picture, mask):
    first = edited(ddpm, "image=digit.png", "mask=mask.png", "n=2", *QUICK)["samples"]
    Image.fromarray(np.where(mask, 255 - picture, picture)).save("digit.png")
    np.testing.assert_array_equal(edited(ddpm, "image=digit.png", "mask=mask.png", "n=2", *QUICK)["samples"], first)


def test_the_command_draws_what_the_library_draws(ddpm, picture, mask):
    samples = edited(
        ddpm, "image=digit.png", "mask=mask.png", "n=2", "method=moment_matching", "method.iterations=2", *QUICK
    )
    operator = Inpainting((1, 8, 8), torch.from_numpy(mask)[None])
    value = operator(from_bytes(torch.from_numpy(picture)[None, None], 17)).expand(2, -1)
    sampler = MomentMatching(Observation(operator, value), DDIM(4, eta=1.0), iterations=2)
    x = sampler(load(ddpm), 2, None, SampleStreams(0, range(2))).x
    unknown = np.broadcast_to(mask[..., None], (2, 8, 8, 1))
    expected = to_bytes(x, 17).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(samples["samples"][0][unknown], expected[unknown])
    prior = {"_target_": "genzoo.diffusion.samplers.DDIM", "steps": 4, "eta": 1.0}
    method = {"method": "moment_matching", "overrides": ["method.iterations=2"], "sampler": prior}
    python = package.edit(ddpm, "digit.png", mask="mask.png", n=2, **method)
    torch.testing.assert_close(python.draws[0], x, rtol=1e-4, atol=1e-4)
    tensors = package.edit(ddpm, from_bytes(torch.from_numpy(picture)[None], 17), mask=mask[None], n=2, **method)
    assert torch.equal(tensors.draws, python.draws)
    with pytest.raises(ValueError, match=r"image: has shape \(1, 4, 4\)"):
        package.edit(ddpm, torch.zeros(1, 4, 4), mask=mask[None])
    with pytest.raises(ValueError, match="mask is missing"):
        package.edit(ddpm, "digit.png")
    with pytest.raises(ValueError, match=r"task\.sigma=-1"):
        package.edit(ddpm, "digit.png", "denoise", overrides=["task.sigma=-1"])


def test_bytes_and_the_scale_of_the_data_are_inverse_to_each_other():
    for levels in (2, 17, 256):
        k = torch.arange(levels)
        b = to_bytes(bin_center(k, levels), levels)
        assert torch.equal(to_levels(b, levels), k)
        torch.testing.assert_close(from_bytes(b, levels), bin_center(k, levels), rtol=0, atol=1.01 / 255)
        every = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(from_bytes(every, 256), bin_center(every.long(), 256))


@pytest.mark.parametrize("name", ["top", "bottom", "left", "right", "center"])
def test_regions_are_where_their_names_say(name):
    unknown = region(name, EventSpec((3, 8, 4), 256))[0].double()
    rows, columns = unknown.mean(1), unknown.mean(0)
    centre = (
        float((rows * torch.arange(8)).sum() / rows.sum()),
        float((columns * torch.arange(4)).sum() / columns.sum()),
    )
    expected = {"top": (1.5, 1.5), "bottom": (5.5, 1.5), "left": (3.5, 0.5), "right": (3.5, 2.5), "center": (3.5, 1.5)}
    assert centre == expected[name] and float(unknown.mean()) == (0.25 if name == "center" else 0.5)


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        (["task=denoise", "task.sigma=0.4"], (8, 8)),
        (["task=super_resolution"], (4, 4)),
        (["task=super_resolution", "task.factor=4"], (2, 2)),
        (["task=deblur"], (8, 8)),
    ],
)
def test_every_task_takes_the_picture_it_observes(ddpm, words, shape):
    Image.fromarray(np.full(shape, 90, dtype=np.uint8)).save("observed.png")
    found = edited(ddpm, "image=observed.png", "n=2", *words, *QUICK)
    assert found["samples"].shape == (1, 2, 8, 8, 1) and found["observed"].shape[2:] == shape
    np.testing.assert_allclose(found["observed"], 2 * (90 / 255 * 16 + 0.5) / 17 - 1, rtol=1e-6)
    assert genzoo("edit", f"run={ddpm}", "image=observed.png", "n=2", *words, *QUICK, "out=grid.png").code == 0
    grid = np.asarray(Image.open("grid.png"))
    assert grid.shape == (60, 5 * 58 + 2)  # observation, two draws, mean, spread


def test_colours_are_found_for_a_grey_picture(here):
    run = untrained(here, *SMALL["ddpm"], "data.shape=[3,8,8]")[0]
    Image.fromarray(np.full((8, 8), 90, dtype=np.uint8)).save("grey.png")
    found = edited(run, "image=grey.png", "task=colourise", "n=2", *QUICK)
    assert found["samples"].shape == (1, 2, 8, 8, 3) and found["observed"].shape == (1, 1, 8, 8)


def test_the_test_split_and_a_folder_are_scored(ddpm, here):
    words = ["task=super_resolution", "images=3", "n=4", *QUICK]
    code, out, err = genzoo("edit", f"run={ddpm}", "split=test", *words, "out=a.png")
    assert (code, err) == (0, "")
    assert "coverage_80" in out and "calibrated: 0.80" in out and "peak 255" in out and out.endswith(": a.png\n")
    found = json.loads(Path("a.json").read_text())
    assert set(found["scores"]) == {"coverage_50", "coverage_80", "coverage_90", "psnr_mean", "psnr_draw"}
    assert found["setting"]["images"] == 3 and found["setting"]["n"] == 4 and found["setting"]["nfe"] > 4
    assert np.asarray(Image.open("a.png")).shape == (3 * 58 + 2, 7 * 58 + 2)

    Path("pictures").mkdir()
    for i, image in enumerate(to_bytes(bin_center(digits().test.x[:3, 0], 17), 17).numpy()):
        Image.fromarray(image).save(f"pictures/{i}.png")
    code, _, err = genzoo("edit", f"run={ddpm}", "image=pictures", *words, "out=b.npz")
    assert code == 0
    assert json.loads(Path("b.json").read_text())["scores"] == found["scores"]  # of the same pictures
    code, _, _ = genzoo("edit", f"run={ddpm}", "image=pictures", *words, "batch_size=5", "out=c.npz")
    assert np.abs(np.load("b.npz")["samples"].astype(int) - np.load("c.npz")["samples"]).max() <= 16


@pytest.mark.parametrize("family", ["vae", "autoregressive"])
def test_other_families_are_edited_by_their_own_ability(here, family, picture):
    run = untrained(here, *(SMALL["vae"] if family == "vae" else TINY_AR))[0]
    quick = ["method=langevin", "method.steps=4"] if family == "vae" else []
    found = edited(run, "image=digit.png", "mask=bottom", "n=2", *quick)
    for image in found["samples"][0, ..., 0]:
        np.testing.assert_array_equal(image[:4], picture[:4])


def test_vectors_are_edited_in_an_npz(here):
    run = untrained(here, "model=ddpm", "data=moons", "model.schedule.num_steps=20")[0]
    points = np.array([[0.5, 9.0], [-0.3, 9.0]], dtype=np.float32)
    np.savez("points.npz", samples=points)
    np.save("mask.npy", np.array([0, 1]))
    found = edited(run, "image=points.npz", "mask=mask.npy", "n=5", *QUICK)
    assert found["samples"].shape == (2, 5, 2) and found["samples"].dtype == np.float32
    np.testing.assert_array_equal(found["samples"][..., 0], np.repeat(points[:, :1], 5, 1))
    assert abs(found["samples"][..., 1]).max() < 9 and found["samples"][..., 1].std() > 0
    code, out, _ = genzoo("edit", f"run={run}", "split=test", "task=denoise", "images=5", "n=3", *QUICK, "out=v.png")
    assert code == 0 and "rmse_mean" in out and Path("v.png").is_file()


def test_a_conditional_model_needs_a_class_and_takes_that_of_the_split(here, picture):
    run = untrained(here, *SMALL["ddpm"], "data.conditional=true")[0]
    words = ["image=digit.png", "mask=bottom", "n=2", *QUICK]
    code, out, err = genzoo("edit", f"run={run}", "out=x.npz", *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and "label is missing" in err
    a, b = (edited(run, *words, f"label={k}")["samples"] for k in (3, 4))
    assert (a != b).any()
    assert genzoo("edit", f"run={run}", "split=test", "mask=bottom", "images=2", "n=2", *QUICK, "out=y.npz").code == 0


BAD = {
    "image: set either image=": [],
    "image: set either": ["image=digit.png", "split=test"],
    "needed are 8x8": ["image=large.png", "mask=bottom"],
    "needed are 4x4": ["image=digit.png", "task=super_resolution"],
    "mask=large.png": ["image=digit.png", "mask=large.png"],
    "mask is missing": ["image=digit.png"],
    "belongs to task=inpaint": ["image=digit.png", "task=denoise", "mask=bottom"],
    "no pixel as unknown": ["image=digit.png", "mask=black.png"],
    "every pixel as unknown": ["image=digit.png", "mask=white.png"],
    "mask=nowhere.png": ["image=digit.png", "mask=nowhere.png"],
    "mask=.": ["image=digit.png", "mask=."],
    "numbers of shape": ["image=digit.png", "mask=mask.npy"],
    "3 channels": ["image=digit.png", "task=colourise"],
    "factor=3": ["image=digit.png", "task=super_resolution", "task.factor=3"],
    "std must be positive": ["image=digit.png", "task=deblur", "task.std=0"],
    "task.sigma=-1": ["image=digit.png", "task=denoise", "task.sigma=-1"],
    "task.sigma=0": ["image=digit.png", "task=denoise", "task.sigma=0"],
    "task.sigma=True": ["image=digit.png", "task=denoise", "task.sigma=true"],
    "did you mean 'denoise'": ["image=digit.png", "task=denoize"],
    "not a readable image": ["image=broken.png", "mask=bottom"],
    "image=nowhere.png": ["image=nowhere.png", "mask=bottom"],
    "image=notes.txt": ["image=notes.txt", "mask=bottom"],
    "uint8 (N, 8, 8, 1)": ["image=five.npz", "mask=bottom"],
    "without noise": ["image=digit.png", "task=denoise", "method=repaint"],
    "chain sampler": ["image=digit.png", "mask=bottom", "method=dps", "sampler=heun"],
    "fixed steps": ["image=digit.png", "mask=bottom", "sampler=ode"],
    "is a denoiser": ["image=digit.png", "mask=bottom", "method=langevin"],
    "unknown key 'method.iteration'": ["image=digit.png", "mask=bottom", "method=moment_matching", "method.iteration=3"],
    "n=0": ["image=digit.png", "mask=bottom", "n=0"],
    "a .png or a .npz": ["image=digit.png", "mask=bottom", "out=folder"],
    "is an existing folder": ["image=digit.png", "mask=bottom", "out=folder.png"],
    "there is no directory": ["image=digit.png", "mask=bottom", "out=nowhere/x.png"],
    "label": ["image=digit.png", "mask=bottom", "label=3"],
}  # fmt: skip


@pytest.mark.parametrize("holds", BAD)
def test_what_cannot_be_edited_is_refused_in_one_line(ddpm, picture, holds):
    Image.new("L", (9, 8)).save("large.png")
    Image.new("L", (8, 8)).save("black.png")
    Image.new("L", (8, 8), 255).save("white.png")
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    Path("notes.txt").write_text("x")
    np.savez("five.npz", samples=np.zeros((1, 8, 8, 5), dtype=np.uint8))
    np.save("mask.npy", np.ones((3, 3)))
    Path("folder.png").mkdir()
    before = sorted(Path().iterdir())
    code, out, err = genzoo("edit", f"run={ddpm}", *BAD[holds])
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert holds in err, err
    assert sorted(Path().iterdir()) == before


def test_families_without_the_ability_are_refused_in_one_line(here, vae, picture):
    code, out, err = genzoo("edit", f"run={vae}", "image=digit.png", "mask=bottom", "method=dps")
    assert (code, out, err.count("\n")) == (2, "", 1) and "choose langevin" in err
    code, out, err = genzoo("edit", f"run={vae}", "image=digit.png", "mask=bottom", "sampler=ddim")
    assert (code, out, err.count("\n")) == (2, "", 1) and "takes no sampler" in err
    ar = untrained(here / "ar", *TINY_AR)[0]
    code, out, err = genzoo("edit", f"run={ar}", "image=digit.png", "mask=top")
    assert (code, out, err.count("\n")) == (2, "", 1) and "raster order" in err
    vqvae = untrained(here / "vqvae", "model=vqvae")[0]
    code, out, err = genzoo("edit", f"run={vqvae}", "image=digit.png", "mask=top")
    assert (code, out, err.count("\n")) == (2, "", 1) and "edit: " in err
    moons = untrained(here / "moons", "model=ddpm", "data=moons")[0]
    for words, holds in (
        (["task=deblur"], "needs images"),
        (["mask=bottom"], "vectors need"),
        (["task=denoise"], "npz"),
    ):
        code, out, err = genzoo("edit", f"run={moons}", "image=digit.png", *words)
        assert (code, out, err.count("\n")) == (2, "", 1) and holds in err
    assert not Path("edit.png").exists()


def test_known_pixels_with_noise_are_drawn_and_not_copied(ddpm, picture):
    with edited(ddpm, "task=inpaint", "task.sigma=0.5", "mask=bottom", "image=digit.png", "n=4", *QUICK) as file:
        draws = file["samples"][0].astype(int)
    known = draws[:, :4]
    assert (known != picture[None, :4, :, None]).any() and (known[0] != known[1]).any()


def test_the_library_takes_masks_of_pixels_and_refuses_what_is_no_observation(ddpm, picture):
    x = from_bytes(torch.from_numpy(picture)[None, None], 17)[0]
    unknown = np.zeros((8, 8), dtype=bool)
    unknown[4:] = True
    settings = {"mask": unknown, "n": 2, "sampler": {"_target_": "genzoo.diffusion.samplers.DDIM", "steps": 4}}
    draws = package.edit(ddpm, x, **settings).draws
    assert draws.shape == (1, 2, 1, 8, 8) and torch.equal(draws[0, :, :, :4], x[None, :, :4].expand(2, -1, -1, -1))
    for image, problem in ((picture[None], "floats"), (x * torch.nan, "NaN"), (x[None][:0], "no observation")):
        with pytest.raises(ValueError, match=problem):
            package.edit(ddpm, image, **settings)
    with pytest.raises(ValueError, match="no classes"):
        package.edit(ddpm, x, label=3, **settings)
