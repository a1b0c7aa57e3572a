"""Samples by the command: the bytes of ``model.sample``, whatever the file, the batch size and how many are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genzoo import load
from genzoo.prob.random import SampleStreams
from tests.commands import SMALL, genzoo, untrained


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def drawn(run: Path, *words: str) -> np.ndarray:
    """Sample into an array by the command."""
    code, out, err = genzoo("sample", f"run={run}", "out=x.npz", *words)
    assert (code, err) == (0, "") and out.endswith(": x.npz\n")
    return np.load("x.npz")["samples"]


def bytes_of(x: torch.Tensor, levels: int = 17) -> np.ndarray:
    """The way back to bytes, written out: level k of K is [2k/K - 1, 2(k + 1)/K - 1), its shade 255 k/(K - 1)."""
    k = np.clip(np.floor(levels * (x.numpy() + 1) / 2), 0, levels - 1)
    return np.rint(255 * k / (levels - 1)).astype(np.uint8).transpose(0, 2, 3, 1)


@pytest.fixture
def vae(here) -> Path:
    return untrained(here, *SMALL["vae"])[0]


@pytest.fixture
def ddpm(here) -> Path:
    return untrained(here, *SMALL["ddpm"], "model.num_classes=10", "sampler=ancestral")[0]


def test_the_command_draws_what_the_loaded_model_draws(vae):
    samples = drawn(vae, "n=5", "seed=3")
    assert samples.dtype == np.uint8 and samples.shape == (5, 8, 8, 1)
    np.testing.assert_array_equal(samples, bytes_of(load(vae).sample(5, rng=SampleStreams(3, range(5))).x))


def test_half_of_the_bits_draw_almost_the_same(ddpm):
    whole, half = (
        drawn(ddpm, "n=4", "sampler=ddim", "sampler.steps=4", f"precision={p}") for p in ("32-true", "bf16-mixed")
    )
    apart = np.abs(whole.astype(int) - half.astype(int))
    assert 0 < apart.mean() < 0.02 * 255


def test_points_of_the_plane_are_written_as_they_are(here):
    run = untrained(here, "model=realnvp", "data=moons", "model.couplings=2")[0]
    samples = drawn(run, "n=5")
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, load(run).sample(5, rng=SampleStreams(0, range(5))).x.numpy())
    assert genzoo("sample", f"run={run}", "out=cloud.png").code == 0
    with Image.open("cloud.png") as picture:
        assert picture.format == "PNG"


def test_a_sample_depends_on_its_seed_and_index_alone(ddpm):
    many = drawn(ddpm, "n=7", "batch_size=7")
    # A network's sums may be ordered otherwise in another batch size: a level, 16 shades, may tip over, no more.
    for words in (["n=7", "batch_size=3"], ["n=4", "batch_size=7"]):
        fewer = drawn(ddpm, *words).astype(int)
        assert np.abs(fewer - many[: len(fewer)]).max() <= 16
        assert (fewer != many[: len(fewer)]).mean() < 0.01
    assert (drawn(ddpm, "n=7", "seed=1") != many).mean() > 0.2


def test_pictures_hold_the_same_samples(vae):
    samples = drawn(vae, "n=5")[..., 0]
    assert genzoo("sample", f"run={vae}", "n=5", "out=folder").code == 0
    files = sorted(Path("folder").iterdir())
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(5)]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(path)) for path in files]), samples)

    assert genzoo("sample", f"run={vae}", "n=5", "out=grid.png").code == 0
    grid = np.asarray(Image.open("grid.png"))
    assert grid.shape == (2 * 58 + 2, 3 * 58 + 2)  # three columns; 8x8 pixels are enlarged to 56, with gaps of 2
    np.testing.assert_array_equal(grid[2:58:7, 2:58:7], samples[0])
    np.testing.assert_array_equal(grid[60:116:7, 60:116:7], samples[4])


def test_ema_false_draws_from_the_trained_weights(here):
    run, model, ema = untrained(here, *SMALL["vae"])
    with torch.no_grad():
        streams = (SampleStreams(0, range(4)) for _ in range(2))
        models = {"true": ema, "false": model}
        expected = {
            flag: bytes_of(m.sample(4, rng=rng).x) for (flag, m), rng in zip(models.items(), streams, strict=True)
        }
    assert (expected["true"] != expected["false"]).any()
    for flag, samples in expected.items():
        np.testing.assert_array_equal(drawn(run, "n=4", f"ema={flag}"), samples)


def test_another_sampler_takes_as_many_evaluations_as_it_says(ddpm):
    own = genzoo("sample", f"run={ddpm}", "n=2", "out=own.npz").out
    other = genzoo("sample", f"run={ddpm}", "n=2", "sampler=ddim", "sampler.steps=5", "out=other.npz").out
    assert own == "2 samples, 20 evaluations each: own.npz\n"
    assert other == "2 samples, 5 evaluations each: other.npz\n"
    model = load(ddpm, sampler={"_target_": "genzoo.samplers.DDIM", "steps": 5})
    expected = bytes_of(model.sample(2, rng=SampleStreams(0, range(2))).x)
    np.testing.assert_array_equal(np.load("other.npz")["samples"], expected)


def test_a_class_can_be_asked_for(ddpm):
    expected = load(ddpm).sample(3, torch.full((3,), 7), rng=SampleStreams(0, range(3))).x
    np.testing.assert_array_equal(drawn(ddpm, "n=3", "y=7"), bytes_of(expected))
    assert (drawn(ddpm, "n=3", "y=2") != bytes_of(expected)).any()
