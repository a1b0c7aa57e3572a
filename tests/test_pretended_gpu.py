"""On a GPU every family trains without waiting for it, is stopped, goes on, samples and is scored: on one that is pretended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.on_pretended_gpu import scenarios

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> dict[str, str]:
    """Play the chosen scenarios in a process that cannot go back to a CPU, all in one, since it imports for seconds."""
    chosen = [item.callspec.params["name"] for item in request.session.items if getattr(item, "callspec", None)
              and item.fspath == request.node.fspath]  # fmt: skip
    out = tmp_path_factory.mktemp("pretended") / "results.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.on_pretended_gpu", str(out), *chosen]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", scenarios())
def test_a_gpu_is_neither_mixed_with_the_host_nor_waited_for(name, results):
    assert not results[name], results[name]
