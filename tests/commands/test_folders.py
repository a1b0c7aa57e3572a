"""Runs on somebody's folder of images: what is said of it, which classes it has, and by which names they are drawn."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genzoo import load
from genzoo.config.instantiate import build
from genzoo.data import DataSet, Split
from genzoo.jobs.building import class_names, unseen_classes
from genzoo.jobs.train import draw_grid
from genzoo.runs import Run
from tests.commands import SMALL, TINY, described, genzoo


def test_a_folder_is_read_as_is_said_and_its_classes_are_known_by_name_ever_after(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    sizes = {"data/train/cat": 30, "data/train/dog": 40, "data/test/dog": 10, "data/test/cat": 8, "data/test/emu": 3}
    for folder, n in sizes.items():
        Path(folder).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(f"{folder}/{i}.png")
    Path("data/train/notes.txt").touch()
    words = ["data=folder", "data.root=data", "data.size=8", "data.channels=1", "data.conditional=true", *SMALL["vae"]]
    code, out, err = genzoo(*TINY, *words, "data.validation=0")
    assert code == 0, err
    assert "70 training and 18 test images, 2 classes (cat, dog); test split from the folder test" in err
    assert "1 file skipped: 1 .txt" in err and "3 images of emu in the folder test left out" in err
    run = Run(out.splitlines()[-1].removeprefix("run: "))
    assert run.status["classes"] == ["cat", "dog"]
    assert load(run.path).conditioner.probs.tolist() == pytest.approx([3 / 7, 4 / 7])
    shutil.rmtree("data")
    for name, y in (("by-name", "dog"), ("by-number", "1")):
        assert genzoo("sample", f"run={run.path}", f"label={y}", "n=4", f"out={name}.npz").code == 0
    np.testing.assert_array_equal(*(np.load(f"{name}.npz")["samples"] for name in ("by-name", "by-number")))


def test_classes_that_nobody_has_learned_are_named_and_not_drawn(tmp_path):
    x, y = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 2, 2, 0, 0, 2])
    data = DataSet(Split(x, y), Split(x, y // 2), levels=17, classes=("a", "b", "c"))
    assert list(unseen_classes(data)) == ["class b has 3 test images and no training image: it is never sampled"]
    assert class_names(data) == ["a", "b", "c"]
    assert class_names(dataclasses.replace(data, classes=tuple(f"identity-{i}" for i in range(10_000)))) == []
    model, asked = build(described(*SMALL["vae"], "data.conditional=true")["model"], "model"), []
    model.conditioner.probs.copy_(torch.tensor([0.5, 0.0, 0.5, *[0.0] * 7]))
    sample = model.sample
    model.sample = lambda n, y=None, *, rng=None: asked.append(y) or sample(n, y, rng=rng)
    draw_grid(model, data, tmp_path / "grid.png", n=6)
    assert asked[0].tolist() == [0, 2, 0, 2, 0, 2]
