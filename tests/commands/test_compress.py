"""Compression by the commands: the file of the library, restored as images and classes, or a refusal in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import genzoo as package
from genzoo.data import digits
from genzoo.distributions.discretization import bin_center, to_bytes
from genzoo.runs import Run
from tests.commands import SMALL, genzoo, trained, untrained


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vae(here) -> Path:
    return untrained(here / "outputs", *SMALL["vae"])[0]


def pixels(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(to_bytes(bin_center(x, 17), 17).numpy(), -3, -1)


def test_the_test_split_is_compressed_in_its_order_and_restored(vae):
    code, out, err = genzoo("compress", f"run={vae}", "data=test", "out=x.gzc")
    assert (code, err, out.count("\n")) == (0, "", 1), err
    data = Path("x.gzc").read_bytes()
    assert data == package.compress(vae, bin_center(digits().test.x, 17)).data
    assert out == f"360 images in {len(data)} bytes, {len(data) / (360 * 8):.4f} bits/dim: x.gzc\n"
    for words in ([], [f"run={vae}"], ["runs=outputs"]):  # the run is found by its weights
        code, out, err = genzoo("decompress", "x.gzc", "out=x.npz", *words)
        assert (code, out, err) == (0, "360 images of x.gzc: x.npz\n", "")
        with np.load("x.npz") as file:
            np.testing.assert_array_equal(file["samples"], pixels(digits().test.x))
            assert "y" not in file
        Path("x.npz").unlink()
    # What was restored is compressed to the same bytes again, and so is a folder of pictures.
    genzoo("decompress", "x.gzc", "out=x.npz")
    genzoo("decompress", "x.gzc", "out=folder")
    for source in ("x.npz", "folder"):
        code, _, err = genzoo("compress", f"run={vae}", f"examples={source}", "out=y.gzc")
        assert code == 0 and Path("y.gzc").read_bytes() == data, err


def test_classes_are_restored_with_their_images(here):
    run = untrained(here, *SMALL["vae"], "data.conditional=true")[0]
    code, out, err = genzoo("compress", f"run={run}", "n=7", "label=[2,5]")
    assert (code, err) == (0, "") and "7 images" in out and "classes included" in out
    code, _, err = genzoo("decompress", "file=compressed.gzc", f"run={run}")
    assert (code, err) == (0, "")
    with np.load("decompressed.npz") as file:
        assert set(file["y"]) <= {2, 5} and file["samples"].shape == (7, 8, 8, 1)


def test_a_longer_run_restores_what_it_has_compressed_itself(here):
    run = trained(*SMALL["vae"], "budget.images=128", "trainer.learning_rate.decay=constant")
    genzoo("compress", f"run={run}", "n=3", "out=x.gzc")
    code, out, err = genzoo(f"resume={run}", "budget.images=256")
    assert code == 0, err
    longer = out.splitlines()[-1].removeprefix("run: ")
    code, out, err = genzoo("decompress", "x.gzc", f"run={longer}")
    assert (code, out, err.count("\n")) == (2, "", 1) and "x.gzc: was compressed by another model" in err
    assert genzoo("decompress", "x.gzc", f"run={run}").code == 0
    genzoo("compress", f"run={longer}", "n=3", "out=x.gzc")
    assert genzoo("decompress", "x.gzc", f"run={longer}").code == 0


def test_wrong_input_is_refused_in_one_line(vae, here):
    genzoo("compress", f"run={vae}", "n=3", "out=x.gzc")
    data = Path("x.gzc").read_bytes()
    Path("cut.gzc").write_bytes(data[:-2])
    Path("other.gzc").write_bytes(b"another file")
    np.savez("empty.npz", samples=np.zeros((0, 8, 8, 1), np.uint8))
    flow = untrained(here / "flow", *SMALL["realnvp"])[0]
    for words, says in {
        ("decompress", "cut.gzc", f"run={vae}"): "cut.gzc: is damaged or incomplete",
        ("decompress", "other.gzc", f"run={vae}"): "other.gzc: is not a file written by genzoo compress",
        ("decompress", "none.gzc", f"run={vae}"): "file=none.gzc: no such file",
        ("decompress", "x.gzc", f"run={vae}", "ema=false"): "x.gzc: was compressed by another model",
        ("decompress", "x.gzc", "runs=flow"): "no run in flow has the model that compressed it",
        ("decompress", "x.gzc", f"run={flow}"): "RealNVP has no lossless code: choose autoregressive",
        ("decompress", "x.gzc", f"run={vae}", "out=x.jpg"): "out=x.jpg: must be",
        ("compress", f"run={flow}"): "RealNVP has no lossless code: choose autoregressive",
        ("compress", f"run={vae}", "out=x.npz"): "out=x.npz: must be a .gzc",
        ("compress", f"run={vae}", "examples=empty.npz"): "empty.npz",
        ("compress", f"run={vae}", "batch_size=0"): "batch_size",
    }.items():
        code, out, err = genzoo(*words)
        assert (code, out, err.count("\n")) == (2, "", 1) and says in err, (words, err)
    assert Run(vae).status["state"] == "done" and not Path("decompressed.npz").exists()
