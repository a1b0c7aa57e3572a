"""Latents and sampling paths by the commands: what the library returns, for every family, or a refusal in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import genzoo as package
from genzoo import load
from genzoo.data import digits, with_validation
from genzoo.distributions.discretization import bin_center, to_bytes
from genzoo.errors import UsageError
from genzoo.latents import can_encode, has_normal_prior, latent_space, mean_divergences
from genzoo.model import AbilityError, Discrete, GenerativeModel
from genzoo.numerics.random import SampleStreams, randn
from genzoo.runs import Run
from tests.commands import SMALL, genzoo, untrained
from tests.conftest import CAPTIONED, CONDITIONED, FAMILIES, IMAGES_ONLY
from tests.test_interface import DATA, SIZES, shrunk

COMMANDS = ("encode", "decode", "reconstruct", "interpolate", "traverse", "attribute", "trajectory")
CLASSES = ["zero", "one", "two", "three", "4", "5", "6", "7", "8", "9"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def coarse(monkeypatch) -> None:
    """Solve the ODE of a DDPM coarsely: with random weights its drift is rough, and accuracy is tested elsewhere."""
    monkeypatch.setattr("genzoo.latents.TOLERANCE", 0.5)


@pytest.fixture
def vae(here) -> Path:
    return untrained(here, *SMALL["vae"])[0]


@pytest.fixture
def ddpm(here) -> Path:
    return untrained(here, *SMALL["ddpm"], "data.conditional=true", "sampler=ddim", "sampler.steps=6")[0]


def done(verb: str, run: Path, *words: str) -> str:
    """Run a command and return its line."""
    code, out, err = genzoo(verb, f"run={run}", *words)
    assert (code, err, out.count("\n")) == (0, "", 1), err
    return out


def array(path: str = "x.npz", name: str = "samples") -> np.ndarray:
    with np.load(path) as file:
        return file[name]


def pixels(x: torch.Tensor, levels: int = 17) -> np.ndarray:
    """Convert images, (..., C, H, W), to bytes, (..., H, W, C)."""
    return np.moveaxis(to_bytes(x, levels).numpy(), -3, -1)


def centers(split: str = "test") -> tuple[torch.Tensor, torch.Tensor]:
    part = getattr(with_validation(digits(), 0.1), split)
    assert part.y is not None
    return bin_center(part.x, 17), part.y


# Every family


def tiny(root: Path, family: str, kind: str, conditional: bool) -> Path:
    """Write a run of a family with random weights and sizes that are as small as can be."""
    words = [f"model={family}", *DATA[kind], *(["data.conditional=true"] if conditional else [])]
    sizes: list[str] = []

    def walk(node: dict, cut: dict, prefix: str) -> None:
        for name, value in node.items():
            if isinstance(value, dict):
                walk(value, cut[name], f"{prefix}{name}.")
            elif value != cut[name]:
                sizes.append(f"{prefix}{name}={cut[name]}")

    config = package.config.compose.preflight("train", words).config  # type: ignore[union-attr]
    walk(config["model"], shrunk(config["model"], {**SIZES[kind], "tolerance": 0.05}), "model.")
    # A part that is chosen by name is set at its own key.
    own = {
        **{f"model.{part}.sampler.": "sampler." for part in ("prior", "base", "upsampler", "decoder")},
        "model.codec.": "codec.",
        "model.encoder.": "encoder.",
        "model.prior.": "prior.",
        "model.sampler.": "sampler.",
    }
    for long, short in own.items():
        if short.rstrip(".") in config:
            sizes = [f"{short}{text.removeprefix(long)}" if text.startswith(long) else text for text in sizes]
    sizes = list(dict.fromkeys(sizes))
    return untrained(root, *words, *sizes)[0]


def works(model: GenerativeModel) -> dict[str, bool]:
    """Which command applies to a model, by its abilities."""
    try:
        space = latent_space(model)
    except AbilityError:
        return dict.fromkeys(COMMANDS, False)
    real = not isinstance(space, Discrete)
    encodes = can_encode(model)
    return {
        "encode": encodes, "decode": True, "reconstruct": encodes, "interpolate": real, "traverse": real,
        "attribute": real and encodes,
    }  # fmt: skip


@pytest.mark.parametrize("conditional", [False, True], ids=["", "conditional"])
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in CAPTIONED])
def test_every_family_works_or_is_refused_in_one_line(here, coarse, family, kind, conditional):
    if (kind == "plane" and family in IMAGES_ONLY) or (not conditional and family in CONDITIONED):
        with pytest.raises(UsageError, match=r"images|conditional"):
            tiny(here, family, kind, conditional)
        return
    run = tiny(here, family, kind, conditional)
    model = load(run)
    expected = works(model)
    expected["trajectory"] = package.diffusion.denoiser.path_model(model) is not None
    n = ["n=2"]
    words = {
        "encode": [*n, "out=z.npz"], "decode": ["latents=z.npz", "out=x.npz"], "reconstruct": [*n, "out=x.png"],
        "interpolate": [*n, "steps=3", "out=x.png"], "traverse": ["dimensions=[0]", "steps=3", "out=x.png"],
        "attribute": [*n, "images=2", "strengths=[0,1]", "minus=0", "plus=1", "out=x.png"],
        "trajectory": [*n, "frames=3", "out=x.png"],
    }  # fmt: skip
    if expected["decode"] and not expected["encode"]:
        y = {"y": np.zeros(2, np.int64)} if conditional else {}
        np.savez("z.npz", z=np.zeros((2, *latent_space(model).shape), np.float32), **y)
    before = set(here.iterdir())
    for verb in COMMANDS:
        code, out, err = genzoo(verb, f"run={run}", *words[verb])
        written = set(here.iterdir()) - before
        if expected[verb]:
            assert (code, err, out.count("\n")) == (0, "", 1), (verb, err)
            assert written <= {here / "z.npz", here / "x.npz", here / "x.png"} and written
        else:
            assert (code, out, err.count("\n")) == (2, "", 1), (verb, out, err)
            assert not written - {here / "z.npz", here / "x.npz", here / "x.png"}
            assert "choose" in err or "latents=z.npz: no such file" in err or "has no latents" in err
        for path in (here / "x.npz", here / "x.png"):
            path.unlink(missing_ok=True)


# The library's results, bit for bit


def test_latents_of_the_test_split_are_those_of_the_model_in_its_order(vae):
    line = done("encode", vae, "out=z.npz")
    x, y = centers()
    np.testing.assert_array_equal(array("z.npz", "z"), package.encode(vae, x).numpy())
    np.testing.assert_array_equal(array("z.npz", "y"), y.numpy())
    assert array("z.npz", "z").dtype == np.float32
    assert str(array("z.npz", "meaning")) in line and "mean of the posterior" in line and "360 latents" in line
    done("encode", vae, "out=z.npz", "examples=train", "label=[3,7]")
    x, y = centers("train")
    chosen = (y == 3) | (y == 7)
    np.testing.assert_array_equal(array("z.npz", "z"), package.encode(vae, x[chosen]).numpy())
    np.testing.assert_array_equal(array("z.npz", "y"), y[chosen].numpy())


def test_decoding_is_the_inverse_of_encoding(here):
    run = untrained(here, *SMALL["realnvp"])[0]
    done("encode", run, "out=z.npz")
    done("decode", run, "latents=z.npz", "out=x.npz")
    np.testing.assert_array_equal(array(), pixels(centers()[0]))
    done("decode", run, "latents=z.npz", "out=folder")
    np.testing.assert_array_equal(np.asarray(Image.open("folder/000007.png")), array()[7, ..., 0])


def test_codes_are_integers_that_decode_to_reconstructions(here):
    small = [
        "model.codec.codebook_size=8",
        "model.codec.embedding_dim=4",
        "codec.encoder.width=8",
        "codec.decoder.width=8",
    ]
    run = untrained(here, "model=vqvae", *[word.removeprefix("model.") for word in small])[0]
    done("encode", run, "out=z.npz", "n=5")
    z = array("z.npz", "z")
    assert z.dtype == np.int64 and 0 <= z.min() <= z.max() < 8
    done("decode", run, "latents=z.npz", "out=x.npz")
    decoded = array()
    line = done("reconstruct", run, "out=x.npz", "n=5")
    np.testing.assert_array_equal(array(), decoded)
    assert f"{len(np.unique(z))} of 8 codes used" in line


def test_reconstructions_stand_below_their_originals_with_the_error_between_them(vae):
    done("reconstruct", vae, "out=x.npz", "n=10")
    data, samples = array(name="data"), array()
    line = done("reconstruct", vae, "out=x.png", "n=10")
    mse = ((data / 255.0 - samples / 255.0) ** 2).mean()
    assert f"10 reconstructions, mse {mse:.4g}, psnr " in line
    grid = np.asarray(Image.open("x.png"))
    assert grid.shape == (4 * 58 + 2, 8 * 58 + 2)
    np.testing.assert_array_equal(grid[2:58:7, 2:58:7], data[0, ..., 0])
    np.testing.assert_array_equal(grid[60:116:7, 2:58:7], samples[0, ..., 0])
    np.testing.assert_array_equal(grid[118:174:7, 60:116:7], data[9, ..., 0])
    np.testing.assert_array_equal(grid[176:232:7, 60:116:7], samples[9, ..., 0])
    assert (grid[118:174, 118:] == 255).all()


def test_the_choice_of_examples_is_a_function_of_the_seed_and_the_index(vae):
    done("reconstruct", vae, "out=x.npz", "n=10")
    ten = array(name="data")
    for words, same in ((["n=4"], True), (["n=4", "batch_size=1"], True), (["n=4", "seed=1"], False)):
        done("reconstruct", vae, "out=x.npz", *words)
        assert (array(name="data") == ten[:4]).all() == same


def test_interpolations_run_between_the_latents_of_examples(vae):
    line = done("interpolate", vae, "out=x.npz", "n=3", "steps=5")
    rows = array()
    assert rows.shape == (3, 5, 8, 8, 1) and "3 interpolations of 5 points on great circles" in line
    x = centers()[0]
    order = torch.randperm(360, generator=package.numerics.random.generator("examples", 0))[:6]
    z = package.encode(vae, x[order])
    expected = package.interpolate(vae, z[0::2], z[1::2], 5).transpose(0, 1)
    np.testing.assert_array_equal(rows, pixels(expected))
    done("interpolate", vae, "out=x.png", "n=3", "steps=5")
    grid = np.asarray(Image.open("x.png"))
    assert grid.shape == (3 * 58 + 2, 5 * 58 + 2)
    np.testing.assert_array_equal(grid[60:116:7, 176:232:7], rows[1, 3, ..., 0])
    done("interpolate", vae, "out=x.gif", "n=3", "steps=5")
    with Image.open("x.gif") as gif:
        gif.seek(2)
        np.testing.assert_array_equal(np.asarray(gif.convert("L"))[2:58:7, 60:116:7], rows[1, 2, ..., 0])


def test_draws_from_the_prior_are_a_function_of_the_seed_and_the_index(here):
    run = untrained(here, *SMALL["wgan_gp"])[0]
    rng = SampleStreams(5, range(4))
    start, end = (randn((4, 4), rng=rng) for _ in range(2))
    expected = pixels(package.interpolate(run, start, end, 3).transpose(0, 1))
    done("interpolate", run, "out=x.npz", "n=4", "steps=3", "seed=5")
    np.testing.assert_array_equal(array(), expected)
    done("interpolate", run, "out=x.npz", "n=2", "steps=3", "seed=5", "examples=prior")
    assert np.abs(array().astype(int) - expected[:2]).max() <= 16  # a level, by the order of sums
    line = done("traverse", run, "out=x.npz", "seed=5", "dimensions=[2]", "steps=3", "reach=2")
    z = randn((1, 4), rng=SampleStreams(5, range(1)))
    np.testing.assert_array_equal(array(), pixels(package.traverse(run, z, [2], [-2.0, 0.0, 2.0])[:, :, 0]))
    assert line == "latents 2 of 4, as set, from -2 to 2: x.npz\n"


def test_the_latents_of_a_traversal_are_the_informative_ones(vae):
    line = done("traverse", vae, "out=x.npz", "steps=3")
    x = centers()[0]
    order = torch.randperm(360, generator=package.numerics.random.generator("examples", 0))
    kl = mean_divergences(load(vae), x[order])
    assert kl is not None
    chosen = [i for i in kl.argsort(descending=True).tolist() if kl[i] > 0.05] or [int(kl.argmax())]
    assert line.startswith(f"latents {', '.join(map(str, chosen))} of 4, the largest KL divergences ({kl.max():.2f}")
    z = package.encode(vae, x[order[:1]])
    np.testing.assert_array_equal(array(), pixels(package.traverse(vae, z, chosen, [-3.0, 0.0, 3.0])[:, :, 0]))


def test_a_flow_is_traversed_along_its_largest_changes(here):
    run = untrained(here, *SMALL["realnvp"])[0]
    line = done("traverse", run, "out=x.npz", "steps=2")
    chosen = [int(i) for i in line.partition(" of ")[0].removeprefix("latents ").split(", ")]
    order = torch.randperm(360, generator=package.numerics.random.generator("examples", 0))
    z = package.encode(run, centers()[0][order[:1]])
    ends = package.traverse(run, z, range(64), [-3.0, 3.0])[:, :, 0]
    change = (ends[:, 1] - ends[:, 0]).square().flatten(1).mean(1)
    assert chosen == change.argsort(descending=True)[:10].tolist() and "largest changes" in line


def test_an_attribute_is_the_difference_of_class_means_added_to_held_out_images(vae):
    line = done("attribute", vae, "minus=3", "plus=8", "out=x.npz", "n=2", "images=20", "strengths=[0,0.5,2]")
    generator = package.numerics.random.generator("examples", 0)
    x, y = centers("train")
    order = torch.randperm(len(x), generator=generator)
    means = {k: package.encode(vae, x[order][y[order] == k][:20]).double().mean(0) for k in (3, 8)}
    x, y = centers()
    order = torch.randperm(360, generator=package.numerics.random.generator("examples", 0))
    z = package.encode(vae, x[order][y[order] == 3][:2])
    moved = [package.decode(vae, z + s * (means[8] - means[3]).float()) for s in (0, 0.5, 2)]
    found, expected = array().astype(int), pixels(torch.stack(moved, 1)).astype(int)
    assert found.shape == (2, 3, 8, 8, 1)
    assert np.abs(found - expected).max() <= 16 and (found != expected).mean() < 0.02
    assert "2 examples of 3 towards 8 by 0, 0.5, 2 times" in line and "from 20 and 20 examples" in line


def test_a_path_ends_in_the_samples_of_sample(ddpm):
    done("trajectory", ddpm, "out=x.npz", "n=5", "frames=4", "seed=2")
    states, noise = array(), array(name="noise")
    assert states.shape == (5, 4, 1, 8, 8) and states.dtype == np.float32
    rows = pixels(torch.from_numpy(states))
    assert noise[-1] == array(name="times")[-1] == 0 and (np.diff(noise) < 0).all()
    genzoo("sample", f"run={ddpm}", "n=5", "seed=2", "out=y.npz")
    np.testing.assert_array_equal(rows[:, -1], array("y.npz"))
    path = package.trajectory(ddpm, 5, frames=4, seed=2)
    np.testing.assert_array_equal(states, path.x.transpose(0, 1).numpy())
    line = done("trajectory", ddpm, "out=x.png", "n=5", "frames=4", "seed=2")
    assert line.startswith("5 samples, 6 evaluations each, 4 states, sigma/alpha = ") and ", 0: x.png" in line
    grid = np.asarray(Image.open("x.png"))
    assert grid.shape == (5 * 58 + 2, 4 * 58 + 2)
    np.testing.assert_array_equal(grid[60:116:7, 176:232:7], rows[1, 3, ..., 0])
    done("trajectory", ddpm, "out=x.gif", "n=5", "seed=2")
    with Image.open("x.gif") as gif:
        gif.seek(gif.n_frames - 1)
        np.testing.assert_array_equal(np.asarray(gif.convert("L"))[2:58:7, 60:116:7], rows[1, 3, ..., 0])
    done("trajectory", ddpm, "out=y.npz", "n=5", "frames=4", "seed=2", "show=estimate")
    np.testing.assert_array_equal(array("y.npz")[:, -1], states[:, -1])
    assert (array("y.npz")[:, 1] != states[:, 1]).any()


def test_states_of_an_exploding_path_are_shown_with_unit_noise(here):
    small = ["model.network.channels=8", "model.network.multipliers=[1]", "sampler=heun", "sampler.steps=5"]
    run = untrained(here, "model=score_sde", "schedule@model.schedule=ve", *small)[0]
    path = package.trajectory(run, 4, frames=4)
    done("trajectory", run, "out=x.png", "n=4", "frames=4")
    grid = np.asarray(Image.open("x.png"))
    assert path.noise[0] > 10
    scaled = path.x[0] / (1 + path.noise[0] ** 2) ** 0.5
    np.testing.assert_array_equal(grid[2:58:7, 2:58:7], pixels(scaled)[0, ..., 0])
    np.testing.assert_array_equal(grid[2:58:7, 176:232:7], pixels(path.x[-1])[0, ..., 0])


def test_classes_of_a_path_are_named_as_for_sample(ddpm):
    Run(ddpm).update_status(classes=CLASSES)
    done("trajectory", ddpm, "out=x.npz", "n=2", "frames=2", "label=[two,7]")
    genzoo("sample", f"run={ddpm}", "n=2", "label=[two,7]", "out=y.npz")
    np.testing.assert_array_equal(pixels(torch.from_numpy(array()[:, -1])), array("y.npz"))


def test_a_conditional_model_encodes_with_the_labels_of_its_data(ddpm, coarse):
    done("encode", ddpm, "out=z.npz", "n=4")
    x, y = centers()
    order = torch.randperm(360, generator=package.numerics.random.generator("examples", 0))[:4]
    z = array("z.npz", "z")
    np.testing.assert_array_equal(z, package.encode(ddpm, x[order], y[order]).numpy())
    other = package.encode(ddpm, x[order], (y[order] + 1) % 10).numpy()
    assert np.abs(z - other).max() > 1e-3
    done("decode", ddpm, "latents=z.npz", "out=x.npz")
    np.testing.assert_array_equal(array(), pixels(package.decode(ddpm, z, y[order])))


def test_a_conditional_model_interpolates_within_a_class(here):
    run = untrained(here, *SMALL["vae"], "data.conditional=true")[0]
    x, y = centers()
    done("interpolate", run, "n=4", "steps=2", "out=x.npz")
    every = pixels(package.reconstruct(run, x, y)).astype(int)
    labels = []
    for row in array():
        apart = [np.abs(every - end).max((1, 2, 3)) for end in row]
        labels.append([set(y[torch.from_numpy(gap <= 16)].tolist()) for gap in apart])
    assert len(labels) == 4 and all(first & last for first, last in labels)
    done("interpolate", run, "n=2", "steps=2", "label=5", "out=x.npz")
    five = every[(y == 5).numpy()]
    assert all((np.abs(five - end).max((1, 2, 3)) <= 16).any() for row in array() for end in row)


# Examples of files


def test_files_are_encoded_in_their_order(vae):
    x, y = centers()
    np.savez("mine.npz", samples=pixels(x[:5]), y=y[:5].numpy())
    done("encode", vae, "examples=mine.npz", "out=z.npz")
    np.testing.assert_array_equal(array("z.npz", "z"), package.encode(vae, x[:5]).numpy())
    np.testing.assert_array_equal(array("z.npz", "y"), y[:5].numpy())
    Path("folder").mkdir()
    for i in range(3):
        Image.fromarray(pixels(x[i])[..., 0]).save(f"folder/{i}.png")
    code, _, err = genzoo("encode", f"run={vae}", "examples=folder", "out=z.npz")
    assert code == 0 and "examples=folder: 3 images" in err
    np.testing.assert_array_equal(array("z.npz", "z"), package.encode(vae, x[:3]).numpy())


def test_a_file_of_a_conditional_model_has_its_labels_or_one_label(ddpm, coarse):
    x, y = centers()
    np.savez("with.npz", samples=pixels(x[:3]), y=y[:3].numpy())
    np.savez("without.npz", samples=pixels(x[:3]))
    done("encode", ddpm, "examples=with.npz", "out=z.npz")
    expected = package.encode(ddpm, x[:3], y[:3]).numpy()
    np.testing.assert_array_equal(array("z.npz", "z"), expected)
    code, _, err = genzoo("encode", f"run={ddpm}", "examples=without.npz", "out=z2.npz")
    assert code == 2 and "label=" in err and not Path("z2.npz").exists()
    done("encode", ddpm, "examples=without.npz", "label=4", "out=z.npz")
    np.testing.assert_array_equal(array("z.npz", "z"), package.encode(ddpm, x[:3], torch.full((3,), 4)).numpy())


def test_points_of_the_plane_are_plotted_over_their_density(here):
    small = ["model.network.width=8", "model.network.depth=1", "model.tolerance=1e-3"]
    run = untrained(here, "model=flow_matching", "data=moons", *small)[0]
    for verb, words in {
        "interpolate": ["n=2", "steps=3"], "traverse": ["steps=3"], "trajectory": ["n=50", "frames=3"],
        "attribute": ["minus=upper", "plus=lower", "n=2", "images=10"], "reconstruct": ["n=5"],
    }.items():  # fmt: skip
        done(verb, run, *words, "out=x.png")
        picture = np.asarray(Image.open("x.png").convert("RGB")).astype(int)
        orange = (np.abs(picture - (241, 128, 63)).max(-1) < 40).sum()
        assert (orange > 500) == (verb != "reconstruct"), verb
    done("trajectory", run, "n=50", "frames=3", "out=x.gif")
    with Image.open("x.gif") as gif:
        assert gif.n_frames == 3
    done("trajectory", run, "n=50", "frames=3", "out=x.npz")
    np.testing.assert_array_equal(array(), package.trajectory(run, 50, frames=3).x.transpose(0, 1).numpy())


def test_colour_images_are_encoded_and_shown(here):
    Path("pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(f"pictures/{i:02d}.png")
    data = ["data=folder", "data.root=pictures", "data.size=8", "data.channels=3", "data.test_fraction=0.5"]
    run = untrained(here, *SMALL["vae"], *data)[0]
    for out in ("x.png", "x.gif"):
        code, _, err = genzoo("interpolate", f"run={run}", "n=2", "steps=3", f"out={out}")
        assert code == 0, err
        with Image.open(out) as picture:
            assert np.asarray(picture.convert("RGB")).std((0, 1)).min() > 0
    code, _, err = genzoo("encode", f"run={run}", "examples=pictures", "out=z.npz")
    assert code == 0 and array("z.npz", "z").shape == (12, 4), err
    code, _, err = genzoo("attribute", f"run={run}", "minus=0", "plus=1", "out=y.png")
    assert code == 2 and "the data have no classes" in err and not Path("y.png").exists()


def test_data_that_have_changed_are_named(vae):
    Run(vae).update_status(data_sha256="0" * 64)
    code, _, err = genzoo("encode", f"run={vae}", "n=2", "out=z.npz")
    assert code == 0 and err.count("\n") == 1 and "have changed" in err


# Bad input


def spoilt(name: str) -> Callable[[Path], list[str]]:
    """Write a file of latents or examples that cannot be used, and return the words that name it."""
    arrays = {
        "short": ("latents", {"z": np.zeros((2, 3), np.float32)}),
        "ints": ("latents", {"z": np.zeros((2, 4), np.int64)}),
        "nan": ("latents", {"z": np.full((2, 4), np.nan, np.float32)}),
        "none": ("latents", {"z": np.zeros((0, 4), np.float32)}),
        "objects": ("latents", {"z": np.array([{}, 1], dtype=object)}),
        "floats": ("examples", {"samples": np.zeros((2, 8, 8, 1))}),
        "large": ("examples", {"samples": np.zeros((2, 9, 9, 1), np.uint8)}),
        "many": ("examples", {"samples": np.zeros((2, 8, 8, 1), np.uint8), "y": np.zeros(3, int)}),
    }

    def write(here: Path) -> list[str]:
        key, content = arrays[name]
        np.savez(here / f"{name}.npz", **content)
        return [f"{key}={name}.npz"]

    return write


BAD: list[tuple[str, str, list[str] | Callable[[Path], list[str]], str]] = [
    ("vae", "decode", spoilt("short"), r"holds float32 (2, 3), not floats (N, 4)"),
    ("vae", "decode", spoilt("ints"), r"holds int64 (2, 4), not floats"),
    ("vae", "decode", spoilt("nan"), "NaN"),
    ("vae", "decode", spoilt("none"), "(0, 4)"),
    ("vae", "decode", spoilt("objects"), "latents=objects.npz"),
    ("vae", "decode", ["latents=nowhere.npz"], "nowhere.npz: no such file"),
    ("vae", "encode", spoilt("floats"), "examples=floats.npz"),
    ("vae", "encode", spoilt("large"), "(2, 9, 9, 1)"),
    ("vae", "encode", spoilt("many"), "not 2 numbers"),
    ("vae", "encode", ["examples=nowhere"], "examples=nowhere: no such folder or file"),
    ("vae", "encode", ["out=z.png"], "out=z.png"),
    ("vae", "encode", ["out=no/z.npz"], "there is no directory"),
    ("vae", "encode", ["label=12"], "classes 0..9"),
    ("vae", "encode", ["label=cat"], "label=cat"),
    ("vae", "reconstruct", ["out=x.gif"], "out=x.gif: must be a .png or a .npz"),
    ("vae", "interpolate", ["out=x.webm"], "out=x.webm"),
    ("vae", "traverse", ["dimensions=[4]"], "the latents have the dimensions 0..3"),
    ("vae", "attribute", ["minus=3", "plus=3"], "are one class"),
    ("vae", "attribute", ["minus=3", "plus=eight"], "plus=eight: the data have the classes 0..9"),
    ("vae", "attribute", ["minus=10", "plus=3"], "minus=10: the data have the classes 0..9"),
    ("vae", "trajectory", [], "samples in one pass and has no sampling path"),
    ("wgan_gp", "encode", [], "has no encoder"),
    ("wgan_gp", "interpolate", ["examples=test"], "has no encoder"),
    ("wgan_gp", "interpolate", ["label=3"], "data.conditional=true"),
    ("ddpm", "trajectory", ["sampler=ode"], "no time grid"),
    ("ddpm", "trajectory", ["sampler=ancestral", "sampler.steps=21"], "steps must be in 1..20"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "verb", "words", "message"), BAD, ids=lambda part: part if part in COMMANDS else "")
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(here, family, verb, words, message):
    run = untrained(here, *SMALL[family])[0]
    words = words if isinstance(words, list) else words(here)
    before = sorted(here.rglob("*"))
    code, out, err = genzoo(verb, f"run={run}", *words)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("genzoo: ") and message in err
    assert sorted(here.rglob("*")) == before


def test_an_mp4_without_pyav_is_refused_before_anything_is_drawn(ddpm, monkeypatch):
    find = package.data.animation.importlib.util.find_spec
    monkeypatch.setattr(package.data.animation.importlib.util, "find_spec", lambda n: None if n == "av" else find(n))
    code, out, err = genzoo("trajectory", f"run={ddpm}", "out=x.mp4")
    assert (code, out, err.count("\n")) == (2, "", 1) and "pip install 'genzoo[video]'" in err
    assert not Path("x.mp4").exists()


def test_a_learned_prior_is_not_drawn_from(here):
    run = tiny(here, "latent", "plane", False)
    assert not has_normal_prior(load(run))
    code, out, err = genzoo("interpolate", f"run={run}", "examples=prior", "out=x.png")
    assert (code, out, err.count("\n")) == (2, "", 1) and "is learned" in err
    assert "on lines, as the prior is learned" in done("interpolate", run, "n=2", "steps=3", "out=x.png")
