"""A run is a directory that anybody can read: nothing here imports torch, so that a report opens hundreds at once.

<root>/<model>-<data>/<UTC time with microseconds>-<random>/
  config.yaml      resolved, plain             status.json   running, done or failed and why; versions, machine, command
  metrics.jsonl    one line an event           checkpoints/  step-<n>/ with weights, averages, state and checksums
  samples/         a PNG a sampling event      results/      <hash>.json for each protocol and setting scored
  samples.png      the last of them            result.json   the latest of them

Files are replaced in one rename, so that whoever reads sees whole ones. One process at a time trains into a run: it holds a
lock of the operating system's, which ends with the process, however it ends.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from genzoo.redact import redact, redact_words

try:
    import fcntl
except ImportError:  # on Windows a run has no lock
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1  # of runs and checkpoints, raised when older ones are no longer alike
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunError(ValueError):
    """A directory that is no run, or a run that lacks what was asked for; the message is one line."""

    exit_code = 2  # of the command line


class ResourceError(RuntimeError):
    """Too little of something that a machine has: disk, memory, helpers; the message is one line."""

    exit_code = 4  # of the command line


@contextlib.contextmanager
def storing(path: Path, size: int | None = None) -> Iterator[None]:
    """Say which file a full disk has kept from being written.

    Args:
        path: what is written.
        size: of it, in bytes, where that is known.

    Raises:
        ResourceError: naming both, and what is free.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        with contextlib.suppress(OSError):
            path = Path(error.filename or path)
        needed = "" if size is None else f"{size:,} bytes to write, "
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
        raise ResourceError(f"{path}: {error.strerror}: {needed}{free:,} free; make room and go on") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step: readers see the old one or the new one, whole, also after a crash.

    Raises:
        ResourceError: where the disk is full; the old file is untouched.
    """
    with storing(path, len(data)):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    sync(path.parent)


def sync(folder: Path) -> None:
    """Make names in a folder, such as one that a rename has made, outlast a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not know, by null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, indent: int | None = 2) -> bytes:
    """Write plain types as JSON, numbers that are not finite as null and secrets blotted out."""
    separators = None if indent else (",", ":")
    return (json.dumps(_finite(redact(value)), indent=indent, separators=separators, allow_nan=False) + "\n").encode()


def now() -> str:
    """UTC time in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def provenance() -> dict[str, Any]:
    """Say what made a run: command, commit, versions and machine."""

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
    """Name the processor, as Linux does, or its architecture elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


# Where a job is written down, who watches it and which processes do it change nothing of what it is.
OF_NO_MATTER = (
    *("outputs", "logger", "timeout", "objective", "resume", "trust"),
    *("trainer.save_seconds", "trainer.workers", "trainer.devices", "trainer.nodes"),
)


def job_id(config: dict[str, Any]) -> str:
    """Name a job by what it trains and how: its configuration but for where it is written down."""
    said = {key: value for key, value in config.items() if key not in OF_NO_MATTER}
    if "trainer" in said:
        said["trainer"] = {k: v for k, v in said["trainer"].items() if f"trainer.{k}" not in OF_NO_MATTER}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class Run:
    """A run directory.

    Args:
        path: an existing run directory.

    Raises:
        RunError: where there is none.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_dir():
            raise RunError(f"run={path}: no such directory")
        if not (self.path / "config.yaml").is_file():
            raise RunError(f"run={path}: not a run directory, it has no config.yaml")

    @classmethod
    def create(cls, root: str | os.PathLike[str], name: str, config: dict[str, Any], job: str | None = None) -> Run:
        """Make a new run directory whose name nobody else has, under ``<root>/<name>/``.

        Args:
            root: of all runs.
            name: of the family and the data.
            config: plain types; secrets are not kept.
            job: the name of what was asked for, as ``job_id`` gives it.

        Raises:
            RunError: where it cannot be made.
        """
        parent = Path(root) / name
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = cls._fresh(parent)
            for folder in ("checkpoints", "samples", "results"):
                (path / folder).mkdir()
        except OSError as error:
            with storing(parent):
                if error.errno in _FULL:
                    raise
            raise RunError(f"outputs={root}: {error.filename}: {error.strerror}") from error
        write_atomically(path / "config.yaml", yaml.safe_dump(redact(config), sort_keys=False).encode())
        run = cls(path)
        run.update_status(schema=SCHEMA, state="running", started=now(), pid=os.getpid(), job=job, **provenance())
        return run

    @staticmethod
    def _fresh(parent: Path) -> Path:
        while True:
            stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
            path = parent / f"{stamp}-{secrets.token_hex(3)}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Keep everybody else from training into this run, until this process ends or is done with it.

        Raises:
            RunError: where another process trains.
        """
        if fcntl is None:
            yield
            return
        with open(self.path / ".lock", "a+") as file:
            try:
                # A lock of the process, which its children do not inherit, as they would one of ``flock``.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                file.seek(0)
                raise RunError(f"run={self.path}: is being trained by {file.read().strip() or 'a process'}") from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, plain types only.

        Raises:
            RunError: where the file is no YAML mapping.
        """
        try:
            config = yaml.safe_load((self.path / "config.yaml").read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(f"{self.path / 'config.yaml'}: broken YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(config, dict):
            raise RunError(f"{self.path / 'config.yaml'}: holds no mapping")
        return config

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path}: broken JSON: {error}") from error
        if not isinstance(content, dict):
            raise RunError(f"{path}: holds no mapping")
        return content

    @property
    def status(self) -> dict[str, Any]:
        """State of the run, and where it came from."""
        return self._read("status.json")

    def update_status(self, **fields: Any) -> None:
        """Set some fields of the status."""
        write_atomically(self.path / "status.json", to_json({**self.status, **fields}))

    def log(self, **event: Any) -> None:
        """Append one event to ``metrics.jsonl``."""
        line, path = to_json(event, indent=None), self.path / "metrics.jsonl"
        with storing(path, len(line)), open(path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)  # half a line would spoil the next one
                raise

    def logged(self) -> int:
        """Return how many bytes of events there are, and make them outlast a loss of power."""
        with open(self.path / "metrics.jsonl", "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def forget_events(self, size: int) -> None:
        """Go back to the first ``size`` bytes of events, or the whole lines of them that there are."""
        path = self.path / "metrics.jsonl"
        kept = path.read_bytes()[:size] if path.is_file() else b""
        write_atomically(path, kept[: kept.rfind(b"\n") + 1])

    def events(self) -> Iterator[dict[str, Any]]:
        """Read ``metrics.jsonl``; a last line that a crash has cut short is left out."""
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise RunError(f"{path}: line {number}: broken JSON: {error}") from error

    @property
    def result(self) -> dict[str, Any]:
        """The latest scores, empty before the first."""
        return self._read("result.json")

    def results(self) -> Iterator[dict[str, Any]]:
        """Read the scores of every protocol and setting, the oldest first."""
        found = [self._read(f"results/{path.name}") for path in (self.path / "results").glob("*.json")]
        yield from sorted(found, key=lambda result: str(result.get("scored")))

    def write_result(self, result: dict[str, Any]) -> Path:
        """Keep scores under a name that follows from their protocol and setting, and as the latest."""
        key = json.dumps({name: score["card"] for name, score in result["metrics"].items()}, sort_keys=True)
        path = self.path / "results" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        write_atomically(path, to_json(result))
        write_atomically(self.path / "result.json", to_json(result))
        return path
