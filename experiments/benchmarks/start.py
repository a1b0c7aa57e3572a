"""What a user waits for before anything happens: the help, a configuration, the first image; beside the imports of the
libraries.

Each is a process of its own, and its processor seconds are counted from its first to its last. The run that is loaded
is a small VAE of images, with untrained weights, which makes no difference here.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from run import Pair

ROOT = Path(__file__).resolve().parents[2]


def process(*words: str, folder: Path | None = None) -> Callable[[], None]:
    """Return what runs Python with some words."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def go() -> None:
        subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)

    return go


def imports(module: str) -> Callable[[], None]:
    return process("-c", f"import {module}")


@functools.cache
def a_run() -> Path:
    """Train for a moment, and return the run directory."""
    folder = Path(tempfile.mkdtemp())
    process("-m", "genzoo", "model=vae", "data=digits", "budget=smoke", folder=folder)()
    return next(folder.glob("outputs/*/*"))


def sample() -> Callable[[], None]:
    run = a_run()
    return process("-m", "genzoo", "sample", f"run={run}", f"out={run / 'new.png'}")


def load() -> Callable[[], None]:
    return process("-c", f"from genzoo import load; load({str(a_run())!r}).sample(1)")


def pairs() -> Iterator[Pair]:
    """A part of the time that an import takes."""
    torch, lightning = functools.partial(imports, "torch"), functools.partial(imports, "pytorch_lightning")
    help_, show = (functools.partial(process, "-m", "genzoo", *words) for words in (["--help"], ["--cfg", "job"]))
    yield Pair("python -m genzoo --help", "import torch", help_, torch, 0.25, at_most=True)
    yield Pair("python -m genzoo --cfg job", "import torch", show, torch, 0.3, at_most=True)
    yield Pair("sample, to the first image", "import pytorch_lightning", sample, lightning, 0.5, at_most=True)
    yield Pair("load, to the first image", "import pytorch_lightning", load, lightning, 0.5, at_most=True)
