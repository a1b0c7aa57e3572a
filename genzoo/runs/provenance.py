"""Provenance of a run: command, commit, versions and machine, and the job id."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from genzoo.runs.redact import redact_words

SCHEMA = 1  # version of the format of runs and checkpoints


def now() -> str:
    """UTC time in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def provenance() -> dict[str, Any]:
    """Collect command, commit, versions and machine of this process."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    here = Path(__file__).parent
    commit = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    packages = ("genzoo", "torch", "torchvision", "pytorch-lightning", "torchmetrics", "hydra-core", "numpy")
    return {
        "command": shlex.join(["python", "-m", "genzoo", *redact_words(sys.argv[1:])]),
        "git_commit": commit.stdout.strip() or None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": {"system": platform.platform(), "cpu": processor(), "cores": os.cpu_count()},
    }


def processor() -> str:
    """CPU model name on Linux, else the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


# Keys without influence on the result: locations, logging and processes.
UNHASHED_KEYS = (
    *("outputs", "logger", "timeout", "objective", "resume", "trust"),
    *("trainer.save_seconds", "trainer.workers", "trainer.devices", "trainer.nodes"),
)


def job_id(config: dict[str, Any]) -> str:
    """SHA-256 of a configuration without ``UNHASHED_KEYS``."""
    hashed = {key: value for key, value in config.items() if key not in UNHASHED_KEYS}
    if "trainer" in hashed:
        hashed["trainer"] = {k: v for k, v in hashed["trainer"].items() if f"trainer.{k}" not in UNHASHED_KEYS}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
