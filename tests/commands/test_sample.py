"""Samples by the command: the bytes of ``model.sample``, whatever the file, the batch size and how many are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genzoo import load
from genzoo import sample as genzoo_sample
from genzoo.errors import UsageError
from genzoo.labels import class_number
from genzoo.numerics.random import SampleStreams
from genzoo.runs import Run
from genzoo.training import checkpoints
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
    return untrained(here, *SMALL["ddpm"], "data.conditional=true", "sampler=ancestral")[0]


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
    model = load(ddpm, sampler={"_target_": "genzoo.diffusion.samplers.DDIM", "steps": 5})
    expected = bytes_of(model.sample(2, rng=SampleStreams(0, range(2))).x)
    np.testing.assert_array_equal(np.load("other.npz")["samples"], expected)


def test_a_class_can_be_asked_for(ddpm):
    expected = load(ddpm).sample(3, torch.full((3,), 7), rng=SampleStreams(0, range(3))).x
    np.testing.assert_array_equal(drawn(ddpm, "n=3", "label=7"), bytes_of(expected))
    assert (drawn(ddpm, "n=3", "label=2") != bytes_of(expected)).any()


def test_a_class_is_known_by_its_name_where_the_run_keeps_the_names(ddpm):
    names = [f"kind-{i}" for i in range(10)]
    code, _, err = genzoo("sample", f"run={ddpm}", "n=3", "out=x.npz", "label=kind-7")
    assert code == 2 and "0..9" in err and "does not store their names" in err
    Run(ddpm).update_status(classes=names)
    np.testing.assert_array_equal(drawn(ddpm, "n=3", "label=kind-7"), drawn(ddpm, "n=3", "label=7"))
    code, _, err = genzoo("sample", f"run={ddpm}", "n=3", "out=x.npz", "label=kind-77")
    assert (code, err.count("\n")) == (2, 1) and "did you mean 'kind-7'" in err
    Run(ddpm).update_status(classes=[1, {}])  # somebody's run
    assert genzoo("sample", f"run={ddpm}", "n=3", "out=x.npz", "label=kind-7").code == 2


def test_numbers_and_names_of_classes_are_told_apart():
    years = ("1995", "1996", "10")
    assert [class_number(y, 3, years) for y in (0, 1, 2, "1995", 1996, "10", 10)] == [0, 1, 2, 0, 1, 2, 2]
    digits = tuple("0123456789")
    assert [class_number(y, 10, digits) for y in (7, "7")] == [7, 7]
    mixed = ("1", "10", "2")  # number 1 is "10", number 2 is "2"
    assert [class_number(y, 3, mixed) for y in (0, 2, 10, "1", "2")] == [0, 2, 1, 0, 2]
    with pytest.raises(UsageError, match=r"label=1: is the index of class 10 and the name of class 0"):
        class_number(1, 3, mixed)
    for y, num_classes, names in ((3, 3, ()), ("cat", 3, ("cat", "dog")), (3, 3, years), ("cat", 0, ())):
        with pytest.raises(UsageError, match=f"label={y}: this model has"):
            class_number(y, num_classes, names)


def test_a_class_without_training_images_is_not_drawn(here):
    run, model, ema = untrained(here, *SMALL["vae"], "data.conditional=true")
    for m in (model, ema):
        m.conditioner.probs[3] = 0
    checkpoints.save(run / "checkpoints", 5, model, ema, {})
    code, _, err = genzoo("sample", f"run={run}", "n=3", "label=3", "out=x.npz")
    assert code == 2 and "label=3" in err and "no training image has this class" in err
    assert genzoo("sample", f"run={run}", "n=3", "label=4", "out=x.npz").code == 0


def test_a_folder_holds_the_samples_that_were_asked_for_and_no_older_ones(vae):
    assert genzoo("sample", f"run={vae}", "n=20", "out=folder").code == 0
    (Path("folder") / ".DS_Store").touch()
    assert genzoo("sample", f"run={vae}", "n=5", "seed=1", "out=folder").code == 0
    files = sorted(path for path in Path("folder").iterdir() if path.name != ".DS_Store")
    assert [path.name for path in files] == [f"{i:06d}.png" for i in range(5)]
    pictures = np.stack([np.asarray(Image.open(path)) for path in files])
    np.testing.assert_array_equal(pictures, drawn(vae, "n=5", "seed=1")[..., 0])


@pytest.mark.parametrize("name", ["mine.png", "notes.txt", "000003.png", "000099.png", "deep", "link"])
def test_what_others_have_put_into_a_folder_is_never_replaced_nor_mixed_with_samples(vae, name):
    assert genzoo("sample", f"run={vae}", "n=8", "out=folder").code == 0
    path = Path("folder", name)
    path.unlink(missing_ok=True)
    if name == "deep":
        path.mkdir()
    elif name == "link":
        Path("folder/000002.png").replace("elsewhere.png")
        path = Path("folder/000002.png")
        path.symlink_to("../elsewhere.png")
    else:
        Image.new("L", (8, 8)).save(path, "PNG")  # of the same name and kind, but another program's
    before = {file.name: file.is_file() and file.read_bytes() for file in Path("folder").iterdir()}
    code, out, err = genzoo("sample", f"run={vae}", "n=2", "out=folder")
    assert (code, out, err.count("\n")) == (2, "", 1) and path.name in err and "choose a new or an empty folder" in err
    assert {file.name: file.is_file() and file.read_bytes() for file in Path("folder").iterdir()} == before


def test_several_classes_are_drawn_a_row_each(ddpm):
    Run(ddpm).update_status(classes=["zero", "one", "two", "three", "4", "5", "6", "7", "8", "9"])
    listed = drawn(ddpm, "n=3", "label=[two,zero,7]")
    with np.load("x.npz") as file:
        assert file["y"].tolist() == [2, 2, 2, 0, 0, 0, 7, 7, 7]
    expected = load(ddpm).sample(9, torch.tensor([2, 0, 7]).repeat_interleave(3), rng=SampleStreams(0, range(9))).x
    np.testing.assert_array_equal(listed, bytes_of(expected))
    assert genzoo("sample", f"run={ddpm}", "n=3", "label=[two,zero,7]", "out=grid.png").code == 0
    grid = np.asarray(Image.open("grid.png"))
    assert grid.shape == (3 * 58 + 2, 3 * 58 + 2)  # a row of three for each class
    np.testing.assert_array_equal(grid[60:116:7, 2:58:7], listed[3, ..., 0])

    drawn(ddpm, "label=3-5")  # 8 of each by default
    with np.load("x.npz") as file:
        assert file["y"].tolist() == [3] * 8 + [4] * 8 + [5] * 8
    with np.load("x.npz") as file:
        assert len(file["samples"]) == 24
    drawn(ddpm, "label=3")
    with np.load("x.npz") as file:
        assert file["y"].tolist() == [3] * 64


def test_the_library_draws_several_classes_as_the_command_does(ddpm):
    x = genzoo_sample(ddpm, 2, label=[1, 4])
    np.testing.assert_array_equal(bytes_of(x), drawn(ddpm, "n=2", "label=[1,4]"))
    torch.testing.assert_close(genzoo_sample(ddpm, 1, label="8-9"), genzoo_sample(ddpm, 1, label=[8, 9]))


@pytest.mark.parametrize(
    ("label", "problem"),
    [("0-10", "classes 0..9"), ("5-3", "must not exceed"), ("[1,1]", "occurs twice"), ("[]", "list 1 to 1000"),
     ("[0-2,2]", "occurs twice"), ("[null]", "list 1 to 1000"), ("-3", "at least 0"), ("[true]", "classes are 0..9")],
)  # fmt: skip
def test_lists_of_classes_that_cannot_be_are_refused_in_one_line(ddpm, label, problem):
    code, out, err = genzoo("sample", f"run={ddpm}", "out=x.npz", f"label={label}")
    assert (code, out, err.count("\n")) == (2, "", 1) and problem in err and not Path("x.npz").exists()


def test_an_unconditional_model_has_no_classes(vae):
    code, out, err = genzoo("sample", f"run={vae}", "out=x.npz", "label=0-9")
    assert (code, out, err.count("\n")) == (2, "", 1) and "data.conditional=true" in err
