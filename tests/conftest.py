"""What all tests share: one thread, a random state that no test hands on, and configurations composed as by the CLI."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from genzoo.config.compose import validate
from genzoo.config.paths import CONF
from tests import compositions
from tests.children import Child

torch.set_num_threads(1)
compositions.remember()

CLASSIFIERS = ("noisy_classifier", "clip", "noisy_clip")  # files of conf/model without samples
IMAGES_ONLY = ("cascade", "masked_diffusion")  # files of conf/model that refuse vectors
CONDITIONED = ("unclip",)  # files of conf/model that need conditions
FAMILIES = sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem not in CLASSIFIERS)
CAPTIONED = ("dalle", "glide")  # families whose data must have captions

# The files that take longest, the slowest first: processes that share the files then end together.
SLOW_FILES = (
    "test_interface.py", "test_crossings.py", "test_resume.py", "test_pretended_gpu.py", "test_processes.py",
    "test_compare.py", "test_page.py", "test_hostile_files.py", "test_loggers.py", "test_evaluate.py",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist keep the order of the files, instead of beginning with those that have most tests."""
    if config.pluginmanager.hasplugin("xdist"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow files, and keep the order within each."""
    order = {name: place for place, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep statistics and downloads of the tests away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def own_package() -> Iterator[None]:
    """Let child processes import the package beside these tests, wherever another one is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(CONF.parent), os.environ.get("PYTHONPATH")])))
        yield


@pytest.fixture(autouse=True, scope="session")
def python_hears_interrupts() -> Iterator[None]:
    """Take SIGINT and SIGHUP as in a terminal: a background job of a script, and nohup, begin by ignoring them."""
    taken = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in taken.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def handlers_given_back() -> Iterator[None]:
    """Fail a test after which a signal is handled by somebody else than before it."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    after = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


@pytest.fixture(autouse=True)
def restored_randomness() -> Iterator[None]:
    """Start every test from the same random state, and give back the one that was there."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.manual_seed(0)
    yield
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])


def suitable(model: str, data: str) -> list[str]:
    """Choose a family and data, or other data that it does not refuse."""
    if model in CAPTIONED:
        data = "shapes"
    elif model in IMAGES_ONLY and data == "moons":
        data = "digits"
    return [f"model={model}", f"data={data}", *(["data.conditional=true"] if model in CONDITIONED else [])]


def composed(*overrides: str, verb: str = "train", config_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Compose and validate a configuration from the words of a command line, as plain types."""
    search = [f"hydra.searchpath=[file://{os.path.abspath(config_dir)}]"] if config_dir else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="genzoo"):
        return validate(verb, compose(verb, [*search, *overrides]))


@pytest.fixture(name="composed")
def composed_fixture() -> Callable[..., dict[str, Any]]:
    return composed


@pytest.fixture
def forked_jobs(monkeypatch) -> None:
    """Fork the jobs of a sweep from a process that has imported the libraries, which saves seconds for each."""
    monkeypatch.setattr("genzoo.jobs.sweep.subprocess", SimpleNamespace(Popen=Child, PIPE=subprocess.PIPE))


@pytest.fixture
def without_a_login(monkeypatch, tmp_path) -> None:
    """Hide the user's key of wandb."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
