"""The library's functions: arguments that cannot be right are refused in one line, and none is passed over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

import genzoo
from genzoo.conditions import ClassLabels
from genzoo.families.vae import VAE


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Any:
    """A run on vectors of three classes."""
    x = np.random.default_rng(0).normal(size=(200, 2)).astype("float32")
    quiet = ["metrics.n=0", "trainer.grids=0", "optimizer.lr=1e-3"]
    outputs = tmp_path_factory.mktemp("runs")
    y = np.arange(200) % 3
    return genzoo.train("vae", x, y=y, conditional=True, budget={"images": 64}, outputs=outputs, overrides=quiet)


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$")


def test_a_run_is_not_scored_on_other_data_than_its_own(run):
    for other in ({"data": np.zeros((50, 2))}, {"y": np.zeros(50, int)}):
        with refused("its own data"):
            genzoo.evaluate(run, n=0, **other)


def test_a_conditional_model_is_not_scored_on_data_without_conditions():
    with refused("y: the model has the condition ClassLabels"):
        genzoo.evaluate(VAE((2,), ClassLabels(3)), np.random.default_rng(0).normal(size=(100, 2)), n=0)


def test_a_model_of_images_is_scored_on_a_folder_in_its_own_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    scores = genzoo.evaluate(VAE((1, 8, 8), levels=256), tmp_path, n=0)
    assert scores["test/bpd_upper"]["value"] > 0
