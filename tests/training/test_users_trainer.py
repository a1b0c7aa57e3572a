"""The module in a Trainer of the user's own: validation, checkpoints, precision and data that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from genzoo.conditions import ClassLabels
from genzoo.data.dataset import Split
from genzoo.families.gan import WGANGP
from genzoo.families.vae import VAE
from genzoo.numerics.random import generator
from genzoo.training.module import GenerativeModule


def points(n: int = 64) -> Split:
    return Split(torch.randn(n, 2, generator=generator("points")) + 3, torch.arange(n) % 3)


def trainer(tmp_path: Any, **settings: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{**quiet, "accelerator": "cpu", "default_root_dir": tmp_path, **settings})


@pytest.mark.parametrize("condition", [None, ClassLabels(3)])
def test_a_critic_with_a_gradient_penalty_is_validated(tmp_path, condition):
    module = GenerativeModule(WGANGP((2,), condition), data=points(), batch_size=8)
    user = trainer(tmp_path, max_epochs=1)
    user.fit(module)
    assert module.steps == 7 and torch.isfinite(user.callback_metrics["val/critic"])
