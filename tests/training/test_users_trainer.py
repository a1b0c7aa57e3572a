"""The module in a Trainer of the user's own: validation, checkpoints, precision and data that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from genzoo.conditions import ClassLabels
from genzoo.data.dataset import DataSet, Split
from genzoo.families.gan import WGANGP
from genzoo.families.vae import VAE
from genzoo.numerics.random import generator
from genzoo.training.budget import LearningRate
from genzoo.training.module import GenerativeModule


def points(n: int = 64) -> Split:
    return Split(torch.randn(n, 2, generator=generator("points")) + 3, torch.arange(n) % 3)


def trainer(tmp_path: Any, **settings: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**quiet, "accelerator": "cpu", "default_root_dir": tmp_path, **settings})


@pytest.mark.parametrize("condition", [None, ClassLabels(3)])
def test_a_critic_with_a_gradient_penalty_is_validated(tmp_path, condition):
    module = GenerativeModule(WGANGP((2,), condition), data=points(), batch_size=8)
    user = trainer(tmp_path, max_epochs=1)
    user.fit(module)
    assert module.steps == 7 and torch.isfinite(user.callback_metrics["val/critic"])


def test_the_averaged_weights_are_loaded_with_a_checkpoint_by_whoever_loads_it(tmp_path):
    def fresh(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        return {"model": VAE((2,)), "data": points(), "batch_size": 8}

    kept = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    module = GenerativeModule(**fresh(0))
    trainer(tmp_path, max_steps=5, enable_checkpointing=True, callbacks=[kept]).fit(module)
    (expected,) = trainer(tmp_path).validate(module, verbose=False)

    other = GenerativeModule(**fresh(1))
    (found,) = trainer(tmp_path).validate(other, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert found == expected
    loaded = GenerativeModule.load_from_checkpoint(tmp_path / "last.ckpt", **fresh(2))
    for name, value in module.ema.model.state_dict().items():
        assert torch.equal(loaded.ema.model.state_dict()[name], value), name


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_the_averaged_weights_have_the_precision_of_the_trained_ones(tmp_path, precision):
    module = GenerativeModule(VAE((2,)), data=points(), batch_size=8)
    user = trainer(tmp_path, max_epochs=1, precision=precision)
    user.fit(module)
    user.validate(module, verbose=False)
    assert module.ema.model.dtype == module.model.dtype
    assert torch.isfinite(user.callback_metrics["val/loss"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataSet(Split(torch.zeros(9, 1, 4, 4, dtype=torch.uint8), None), points(), 17), "levels=17.* 256"),
        (DataSet(points(), points(), None), r"shape=\(2,\).*\(1, 4, 4\)"),
        (points(), r"shape=\(2,\)"),
        (torch.zeros(9, 1, 4, 4), "Tensor is no DataSet"),
        ("digits", "str is no DataSet"),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused_in_one_line(data, message):
    with pytest.raises(ValueError, match=message) as refusal:
        GenerativeModule(VAE((1, 4, 4), levels=256), data=data)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("first", [3, 7], ids=["within an epoch", "after an epoch"])
def test_epochs_that_are_continued_from_a_checkpoint_are_those_of_one_fit(tmp_path, first):
    def fresh(seed: int) -> GenerativeModule:
        torch.manual_seed(seed)
        rate = LearningRate("cosine")
        return GenerativeModule(VAE((2,)), data=points(), batch_size=8, learning_rate=rate)

    whole, continued = fresh(0), fresh(1)
    kept = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=first, save_top_k=-1)
    trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=[kept]).fit(whole)
    trainer(tmp_path, max_epochs=3).fit(continued, ckpt_path=tmp_path / f"step={first}.ckpt")
    assert continued.steps == whole.steps == 21
    for mine, other in ((whole.model, continued.model), (whole.ema.model, continued.ema.model)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in mine.state_dict().items())


def test_a_second_fit_does_the_steps_of_its_own_trainer(tmp_path):
    module = GenerativeModule(VAE((2,)), data=points(), batch_size=8)
    kept = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer(tmp_path, max_steps=5).fit(module)
    trainer(tmp_path, max_steps=6, enable_checkpointing=True, callbacks=[kept]).fit(module)
    assert module.steps == 11
    continued = GenerativeModule(VAE((2,)), data=points(), batch_size=8)
    trainer(tmp_path, max_steps=8).fit(continued, ckpt_path=tmp_path / "last.ckpt")
    assert continued.steps == 13
