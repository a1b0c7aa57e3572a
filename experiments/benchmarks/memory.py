"""Peak memory of a default run, beside that of a bare loop on the same model and data.

Both are processes of their own: `python -m genzoo model=MODEL data=digits` with a budget of 5,000 images, with its
scores, pictures and checkpoints; and a loop that holds the same data and builds the same network from the same
configuration, and takes as many steps of fused Adam. What counts is the largest resident set of either.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from run import Pair

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 5_000
BARE = f"""
import sys, torch
from genzoo.config.compose import preflight
from genzoo.config.instantiate import build
from genzoo.jobs.building import describe_model
from genzoo.distributions.discretization import dequantize
config = preflight("train", sys.argv[1:]).config
describe_model(config, build)
model, data = build(config["model"], "model"), build(config["data"]["source"], "data").train
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
batch = config["trainer"]["batch_size"]
with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
    for _ in range({IMAGES} // batch):
        x = dequantize(data.x[torch.randint(len(data.x), (batch,))], model.levels)
        model.loss(x).total.backward()
        optimizer.step()
        optimizer.zero_grad()
"""
# Prints the largest resident set of a command, in bytes, which a child does not inherit from who starts it.
WATCH = """
import os, subprocess, sys
pid = os.posix_spawn(sys.executable, [sys.executable, *sys.argv[1:]], os.environ, file_actions=[
    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0), (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)])
_, status, used = os.wait4(pid, 0)
assert status == 0, status
print(used.ru_maxrss * 1024)
"""


def peak(*words: str) -> Callable[[], Callable[[], int]]:
    """Set up what runs Python with some words, and returns its peak memory in bytes."""

    def go() -> int:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with tempfile.TemporaryDirectory() as folder:
            watched = [sys.executable, "-c", WATCH, *words]
            return int(subprocess.run(watched, cwd=folder, env=environment, check=True, capture_output=True).stdout)

    return lambda: go


def pairs() -> Iterator[Pair]:
    """A family that rounds its events to latents, and one that loses nothing."""
    for family in ("vae", "realnvp"):
        chosen = [f"model={family}", "data=digits"]
        ours, bare = peak("-m", "genzoo", *chosen, f"budget.images={IMAGES}"), peak("-c", BARE, *chosen)
        name = f"peak memory of a default run, model={family}"
        yield Pair(name, "bare loop", ours, bare, 1.3, at_most=True, measure="returned")
