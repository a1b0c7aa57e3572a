"""Vectors of any dimension, brought by somebody else's package: from the data to scores, samples and pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genzoo.data.pictures import save_scatter
from genzoo.errors import UsageError
from genzoo.evaluation.samples import memorization_scores, point_scores
from genzoo.metrics.sliced_wasserstein import sliced_wasserstein
from genzoo.model import Bijective, Density, GenerativeModel
from genzoo.numerics.random import generator
from tests.commands import genzoo
from tests.conftest import CAPTIONED, CONDITIONED, FAMILIES, IMAGES_ONLY
from tests.test_interface import Case, batch, objectives

# Couplings cut a vector in two.
REFUSED = {
    ("realnvp", 1): "two",
    ("glow", 1): "two",
    ("nsf", 1): "two",
    **{(family, D): "images" for family in IMAGES_ONLY for D in (1, 5)},
}


@pytest.mark.parametrize("D", [1, 5])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*CAPTIONED, *CONDITIONED)])
def test_a_family_takes_vectors_of_any_dimension_or_refuses_in_one_line(family, D):
    case = Case(family, "plane", ("data=moons", f"data.shape=[{D}]"), False)
    if (family, D) in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[family, D]) as refusal:
            case.fresh()
        assert "\n" not in str(refusal.value)
        return
    model = case.model()
    assert isinstance(model, GenerativeModel) and model.shape == (D,)
    x, _ = batch(model, 8)
    for part, turn in objectives(model.train()):
        part.loss(x, rng=generator("loss"), **turn).total.backward()
    model.eval()
    samples = model.sample(8, rng=generator("sample")).x
    assert samples.shape == (8, D) and bool(samples.isfinite().all())
    if isinstance(model, Density):
        value = model.log_prob(x, num_samples=4, rng=generator("density")).value
        assert value.shape == (8,) and bool(value.isfinite().all())
    if isinstance(model, Bijective):
        torch.testing.assert_close(model.decode(model.encode(x)), x, atol=5e-2, rtol=0)


@pytest.mark.parametrize("D", [1, 2, 3, 10])
def test_vectors_are_compared_in_every_dimension(D):
    """Of two normal distributions whose means are apart by one, the slices see 1/D of the square of it on average."""
    x, y = torch.randn(2, 4000, D, generator=generator("vectors", D))
    y[:, 0] += 1.0
    assert sliced_wasserstein(x, x) == pytest.approx(0, abs=1e-9)
    assert sliced_wasserstein(x, y) == pytest.approx(D**-0.5, rel=0.15)
    scores = point_scores(y[:300], x[:400], "vectors/test")
    assert scores["sliced_wasserstein"].value > 0 and scores["mmd"].value > 0
    copies, _ = memorization_scores(x[:50], x[:400], y[:100], False, "vectors", None)
    assert copies["copied"].value == 1.0


@pytest.mark.parametrize("D", [1, 2, 5])
def test_vectors_of_any_dimension_have_a_picture(tmp_path, D):
    x = torch.randn(30, D)
    x[:, -1] = 0.5  # a coordinate that does not move
    save_scatter(tmp_path / "a.png", x, x + 1)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


SOURCE = """
import torch
from genzoo.data.dataset import DataSet, Split

def vectors(dim):
    x = torch.randn(400, dim, generator=torch.Generator().manual_seed(0))
    return DataSet(Split(x[:300], None), Split(x[300:], None), None)
"""
DATA = """
defaults:
  - override /kind@_global_.kind: plane
name: vectors
shape: [5]
levels: null
num_classes: 0
conditional: false
flip: false
source: {_target_: laboratory.vectors, dim: "${data.shape[0]}"}
"""


@pytest.mark.parametrize(("family", "D"), [("realnvp", 3), ("ddpm", 5), ("wgan_gp", 1)])
def test_another_package_s_vectors_go_from_training_to_scores_samples_and_pages(tmp_path, monkeypatch, family, D):
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "laboratory.yaml").write_text(DATA)
    (tmp_path / "laboratory.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "laboratory", None)
    monkeypatch.delitem(sys.modules, "laboratory")
    words = [f"model={family}", "data=laboratory", f"data.shape=[{D}]", "budget.images=128", "trainer.batch_size=64"]
    words += ["budget.seconds=null", "trainer.threads=1", "metrics.n=40", "metrics.events=8", "metrics.num_samples=4"]
    words += ["metrics.throughput=4", f"outputs={tmp_path / 'runs'}"]
    code, out, err = genzoo(f"--config-dir={tmp_path / 'conf'}", *words)
    assert code == 0, err
    run = Path(out.splitlines()[-1].removeprefix("run: "))
    assert (run / "samples.png").is_file()
    for name in ("test/sliced_wasserstein", "test/mmd", "test/fd_identity"):
        assert name in out
    array, picture = tmp_path / "x.npz", tmp_path / "x.png"
    for target in (array, picture):
        assert genzoo("sample", f"run={run}", "n=40", f"out={target}").code == 0
    assert np.load(array)["samples"].shape == (40, D)
    code, out, err = genzoo("evaluate", f"run={run}", "trust=[laboratory.vectors]", "metrics.n=40")
    assert code == 0, err
    code, out, err = genzoo(
        f"--config-dir={tmp_path / 'conf'}", "evaluate", f"samples={array}", "data=laboratory", f"data.shape=[{D}]"
    )
    assert code == 0 and "test/sliced_wasserstein" in out, err
    code, out, err = genzoo("compare", f"runs={tmp_path / 'runs'}", f"out={tmp_path / 'page'}")
    assert code == 0, err
