"""The commands as a user types them, and runs to try them on."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from genzoo.__main__ import main
from genzoo.config.instantiate import build
from genzoo.jobs.building import describe_model
from genzoo.model import GenerativeModel
from genzoo.runs import Run
from genzoo.training import checkpoints
from tests.conftest import composed

# A training of four steps on networks that are as small as can be.
TINY = [
    "budget.images=256",
    "trainer.batch_size=64",
    "trainer.threads=1",
    "metrics.n=0",
    "metrics.events=16",
    "metrics.num_samples=4",
]
SMALL = {
    "vae": ["model=vae", "model.encoder.width=4", "model.decoder.width=4", "model.latent_dim=4"],
    "realnvp": ["model=realnvp", "model.network.width=4", "model.couplings=1", "model.scales=1"],
    "ddpm": ["model=ddpm", "model.network.channels=8", "model.network.multipliers=[1]", "model.schedule.num_steps=20",
             "sampler.steps=20"],
    "clip": ["model=clip", "model.network.width=4", "model.dim=8", "model.text_width=8"],
    "unclip": ["model=unclip", "data.conditional=true", "encoder.network.width=4", "encoder.dim=8", "encoder.text_width=8",
               "prior.network.width=8", "prior.network.depth=1", "prior.sampler.steps=2", "sampler.steps=2",
               "model.decoder.network.channels=8", "model.decoder.network.multipliers=[1]"],
    "wgan_gp": ["model=wgan_gp", "model.generator.width=4", "model.critic.width=4", "model.latent_dim=4"],
}  # fmt: skip


class Outcome(NamedTuple):
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


def genzoo(*words: str) -> Outcome:
    """Type ``genzoo`` and some words; what is no exit, a bug of ours, passes through."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "argv", ["genzoo", *words]),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def trained(*words: str) -> Path:
    """Train by the command and return the run that it names in its last line."""
    code, out, err = genzoo(*TINY, *words)
    assert code == 0, err
    return Path(out.splitlines()[-1].removeprefix("run: "))


def described(*words: str) -> dict[str, Any]:
    """Compose a configuration of a training, and describe the model by the event and condition of its data."""
    config = composed(*words)
    describe_model(config, build)
    return config


def untrained(root: Path, *words: str) -> tuple[Path, GenerativeModel, GenerativeModel]:
    """Write a run whose weights are random, and return it with its trained and its averaged model, which differ."""
    config = described(*TINY, *words)
    model = build(config["model"], "model")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    ema = copy.deepcopy(model)
    with torch.no_grad():
        for p in ema.parameters():
            p *= 0.9
    run = Run.create(root, "run", config)
    checkpoints.save(run.path / "checkpoints", 4, model, ema, {})
    run.update_status(state="done", step=4, images=256, train_seconds=0.5)
    return run.path, model.eval(), ema.eval()
