"""Run directories. Nothing here imports torch, so that reports open hundreds of runs quickly.

Run directories are untrusted input: files must be regular, of bounded size and of plain values. Links are not followed, since
they could expose or modify other files of the reader: files are opened with ``O_NOFOLLOW`` or replaced by a rename, and the
whole tree is checked before writing into a run.

<root>/<model>-<data>/<UTC time with microseconds>-<random>/
  config.yaml      resolved, plain             status.json   running, done or failed and why; versions, machine, command
  metrics.jsonl    one event per line          checkpoints/  step-<n>/ with weights, averages, state and checksums
  samples/         a PNG per sampling event    results/      <hash>.json for each protocol and setting scored
  samples.png      the latest of them          result.json   the latest of them
  stable/          step-<n>/ from before the decay of the learning rate, from which a longer run can go on
  parents/         weights of finished models used in training, such as a teacher or a codec
  precomputed/     results of the precomputation before training, such as the pairs of a teacher

Files are replaced atomically. A file lock excludes concurrent training into one run; the kernel releases it however the process
ends.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from genzoo.runs.redact import redact

try:
    import fcntl
except ImportError:  # no locks on Windows
    fcntl = None  # type: ignore[assignment]
from genzoo.runs.errors import ResourceError, RunError
from genzoo.runs.files import FULL, LOGS, WANDB_LINKS, check_tree, open_regular, read_file, storing, write_atomically
from genzoo.runs.formats import (
    EVENT_BYTES,
    JSON_BYTES,
    YAML_BYTES,
    Dumper,
    check_event,
    parse_json,
    parse_yaml,
    read_json,
    to_json,
)
from genzoo.runs.provenance import SCHEMA, now, provenance
from genzoo.runs.upgrade import upgraded

FOLDERS = ("checkpoints", "samples", "results")  # of a run
FILES = ("config.yaml", "status.json", "metrics.jsonl", "samples.png", "result.json", ".lock")  # of a run


class Run:
    """A run directory.

    Args:
        path: an existing run directory.

    Raises:
        RunError: if it is not a run directory.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            if not self.path.is_dir():
                raise RunError(f"run={path}: no such directory")
            if not (self.path / "config.yaml").is_file():
                raise RunError(f"run={path}: not a run directory, it has no config.yaml")
            with os.scandir(self.path) as entries:
                link = next((entry.path for entry in entries if entry.is_symlink()), None)
        except OSError as error:
            raise RunError(f"run={path}: {error.strerror}") from error
        if link:
            raise RunError(f"{link}: is a link, which a run may not contain")

    @classmethod
    def create(
        cls,
        root: str | os.PathLike[str],
        name: str,
        config: dict[str, Any],
        job: str | None = None,
        fill: Callable[[Path], None] = lambda _: None,
    ) -> Run:
        """Create a run directory with a unique name under ``<root>/<name>/``.

        Args:
            root: folder of run directories.
            name: family and data.
            config: plain types; secrets are redacted.
            job: job id, see ``job_id``.
            fill: writes further files into the directory, before it becomes a run.

        Raises:
            RunError: if it cannot be created.
        """
        parent = Path(root) / name
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path = cls._fresh(parent)
            for folder in FOLDERS:
                (path / folder).mkdir()
            fill(path)
        except OSError as error:
            with storing(parent):
                if error.errno in FULL:
                    raise
            raise RunError(f"outputs={root}: {error.filename}: {error.strerror}") from error
        write_atomically(path / "config.yaml", yaml.dump(redact(config), Dumper=Dumper, sort_keys=False).encode())
        run = cls(path)
        here = {"pid": os.getpid(), "host": socket.gethostname()}
        run.update_status(schema=SCHEMA, state="running", started=now(), **here, job=job, **provenance())
        return run

    @staticmethod
    def _fresh(parent: Path) -> Path:
        while True:
            stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
            path = parent / f"{stamp}-{secrets.token_hex(3)}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path

    def check_writable(self) -> None:
        """Check that a run contains no links or special files, and no file in place of a folder.

        Raises:
            RunError: naming a link, a pipe, a device or a hard link, or a path of the wrong kind.
        """
        check_tree(self.path, links={f"wandb/{name}" for name in WANDB_LINKS}, shared=FOLDERS)
        for names, is_right, kind in ((FOLDERS + LOGS, os.path.isdir, "folder"), (FILES, os.path.isfile, "file")):
            for path in (self.path / name for name in names):
                if os.path.lexists(path) and not is_right(path):
                    raise RunError(f"{path}: is not a {kind}")

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Lock the run for training within a block.

        Raises:
            RunError: if another process trains into it, or ``check_writable`` fails.
        """
        self.check_writable()
        if fcntl is None:
            yield
            return
        with open_regular(self.path / ".lock", append=True) as file:
            try:
                # Unlike ``flock``, a POSIX lock is not inherited by children.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                file.seek(0)
                holder = file.read(1000).decode(errors="replace").strip() or "a process"
                raise RunError(f"run={self.path}: is being trained by {holder}") from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            yield

    def mark_if_dead(self) -> bool:
        """Set the state of a running run to failed if its process on this machine was killed, as by SIGKILL.

        The lock decides, since process ids are reused. Runs of other machines and users are skipped.

        Returns:
            Whether the state was changed.
        """
        status = self.status
        if status.get("state") != "running" or status.get("host") != socket.gethostname() or fcntl is None:
            return False
        lock = self.path / ".lock"
        if self.path.stat().st_uid != os.getuid() or (not _has_content(lock) and _is_alive(status.get("pid"))):
            return False  # created, but not locked yet
        with self.training():
            if self.status.get("state") != "running":
                return False
            why = f"process {status.get('pid')} ended unexpectedly, as by SIGKILL or a power loss"
            self.update_status(state="failed", why=why)
        return True

    def complete(self) -> None:
        """Create missing folders, and remove temporary files of killed processes."""
        for name in FOLDERS:
            (self.path / name).mkdir(exist_ok=True)
        for left in (*self.path.glob(".*-*"), *(self.path / "results").glob(".*-*")):
            if left.is_file() and time.time() - left.stat().st_mtime > 3600:  # no process still writes it
                left.unlink()

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, plain types.

        Raises:
            RunError: if the file is not a YAML mapping.
        """
        path = self.path / "config.yaml"
        content = read_file(path, YAML_BYTES)
        try:
            config = parse_yaml(content)
        except ValueError as error:
            raise RunError(f"{path}: broken YAML: {error}") from error
        if not isinstance(config, dict):
            raise RunError(f"{path}: is not a mapping")
        return upgraded(config)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return read_json(path) if os.path.lexists(path) else {}

    @property
    def status(self) -> dict[str, Any]:
        """State and provenance of the run."""
        return self._read("status.json")

    def update_status(self, **fields: Any) -> None:
        """Update fields of the status."""
        write_atomically(self.path / "status.json", to_json({**self.status, **fields}))

    def log(self, **event: Any) -> None:
        """Append one event to ``metrics.jsonl``."""
        line, path = to_json(event, indent=None), self.path / "metrics.jsonl"
        with storing(path, len(line)), open_regular(path, append=True) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)  # a partial line would corrupt the next one
                raise

    def logged(self) -> int:
        """Fsync the events and return their size in bytes."""
        with open_regular(self.path / "metrics.jsonl", append=True) as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def forget_events(self, size: int) -> None:
        """Truncate the events to the complete lines of the first ``size`` bytes.

        Raises:
            RunError: naming the first of these lines that is not an event; nothing is written then.
        """
        path, kept = self.path / "metrics.jsonl", b""
        if os.path.lexists(path):
            with open_regular(path) as file:
                if min(os.fstat(file.fileno()).st_size, size) > EVENT_BYTES:
                    raise RunError(f"{path}: has more than {EVENT_BYTES:,} bytes")
                kept = file.read(size)
        kept = kept[: kept.rfind(b"\n") + 1]
        for number, line in enumerate(kept.split(b"\n")[:-1], 1):
            self.parse_event(line, number)
        write_atomically(path, kept)

    def events(self) -> Iterator[dict[str, Any]]:
        """Read ``metrics.jsonl``; a truncated last line is skipped.

        Raises:
            RunError: naming an invalid line, or for an oversized file.
        """
        for number, line in self.event_lines():
            yield self.parse_event(line, number, checked=False)

    def event_lines(self) -> Iterator[tuple[int, bytes]]:
        """Read the numbered lines of ``metrics.jsonl``; a truncated last line is skipped.

        Raises:
            RunError: for an oversized file.
        """
        path = self.path / "metrics.jsonl"
        if not os.path.lexists(path):
            return
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > EVENT_BYTES:
                raise RunError(f"{path}: has more than {EVENT_BYTES:,} bytes")
            for number in itertools.count(1):
                line = file.readline(JSON_BYTES)
                if not line.endswith(b"\n") and len(line) < JSON_BYTES:
                    return
                yield number, line

    def parse_event(self, line: bytes, number: int, *, checked: bool = True) -> dict[str, Any]:
        """Parse one line of ``metrics.jsonl``.

        Args:
            line: its bytes.
            number: line number, from 1.
            checked: whether to validate it by ``check_event``.

        Raises:
            RunError: naming the line.
        """
        try:
            event = parse_json(line)
        except ValueError as error:
            raise RunError(f"{self.path / 'metrics.jsonl'}: line {number}: broken JSON: {error}") from error
        try:
            return check_event(event) if checked else event
        except ValueError as error:
            raise RunError(f"{self.path / 'metrics.jsonl'}: line {number}: {error}") from error

    @property
    def result(self) -> dict[str, Any]:
        """The latest scores; empty before the first."""
        return self._read("result.json")

    def results(self) -> Iterator[dict[str, Any]]:
        """Read the scores of all protocols and settings, oldest first."""
        yield from (result for _, result in self.named_results())

    def named_results(self, most: int = 10_000) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Read the scores of all protocols and settings with their paths, oldest first.

        Args:
            most: largest number of files.

        Raises:
            RunError: for more files.
        """
        paths = sorted((self.path / "results").glob("*.json"))
        if len(paths) > most:
            raise RunError(f"{self.path / 'results'}: contains more than {most:,} files")
        found = [(path, self._read(f"results/{path.name}")) for path in paths]
        yield from sorted(found, key=lambda pair: str(pair[1].get("scored")))

    def write_result(self, result: dict[str, Any]) -> Path:
        """Save scores as the latest, and under the hash of their protocol and setting."""
        key = json.dumps({name: score["card"] for name, score in result["metrics"].items()}, sort_keys=True)
        path = self.path / "results" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, to_json(result))
        write_atomically(self.path / "result.json", to_json(result))
        return path


def mark_dead_runs(folders: Iterable[Path]) -> None:
    """Call ``mark_if_dead`` on all runs among some folders."""
    for folder in folders:
        with contextlib.suppress(OSError, RunError, ResourceError):  # not a run, or read-only
            if b'"running"' in read_file(folder / "status.json", JSON_BYTES):
                Run(folder).mark_if_dead()


def _has_content(path: Path) -> bool:
    try:
        return path.stat(follow_symlinks=False).st_size > 0
    except OSError:
        return False


def _is_alive(pid: Any) -> bool:
    """Whether a process of this machine exists."""
    if type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        return True
    return True
