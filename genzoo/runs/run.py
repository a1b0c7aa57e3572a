"""A run is a directory that anybody can read: nothing here imports torch, so that a report opens hundreds at once.

It may also be anybody's: what is read here is a regular file of a sane size that holds plain values, or it is refused in
one line. Links are not followed, for they lead to files of the reader's that the run's author wants shown or changed: files
are opened with ``O_NOFOLLOW`` or replaced by a rename, and before anything is written into a run its whole tree is checked.

<root>/<model>-<data>/<UTC time with microseconds>-<random>/
  config.yaml      resolved, plain             status.json   running, done or failed and why; versions, machine, command
  metrics.jsonl    one line an event           checkpoints/  step-<n>/ with weights, averages, state and checksums
  samples/         a PNG a sampling event      results/      <hash>.json for each protocol and setting scored
  samples.png      the last of them            result.json   the latest of them
  parents/         weights of the finished models that training builds on, such as a teacher or a codec
  precomputed/     what was computed once, before the first step, such as the pairs of a teacher

Files are replaced in one rename, so that whoever reads sees whole ones. One process at a time trains into a run: it holds a
lock of the operating system's, which ends with the process, however it ends.
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
except ImportError:  # on Windows a run has no lock
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
        RunError: where there is none.
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
            raise RunError(f"{link}: is a link, of which a run has none")

    @classmethod
    def create(
        cls,
        root: str | os.PathLike[str],
        name: str,
        config: dict[str, Any],
        job: str | None = None,
        fill: Callable[[Path], None] = lambda _: None,
    ) -> Run:
        """Make a new run directory whose name nobody else has, under ``<root>/<name>/``.

        Args:
            root: of all runs.
            name: of the family and the data.
            config: plain types; secrets are not kept.
            job: the name of what was asked for, as ``job_id`` gives it.
            fill: writes what the run needs of others into its directory, before it is a run.

        Raises:
            RunError: where it cannot be made.
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
        """Refuse to write into a run that could lead the writing elsewhere, or that holds a file in a folder's place.

        Raises:
            RunError: naming a link, a pipe, a device or a hard link anywhere in the run, or what is of the wrong kind.
        """
        check_tree(self.path, links={f"wandb/{name}" for name in WANDB_LINKS}, shared=FOLDERS)
        for names, is_right, kind in ((FOLDERS + LOGS, os.path.isdir, "folder"), (FILES, os.path.isfile, "file")):
            for path in (self.path / name for name in names):
                if os.path.lexists(path) and not is_right(path):
                    raise RunError(f"{path}: is no {kind}")

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Keep everybody else from training into this run, until this process ends or is done with it.

        Raises:
            RunError: where another process trains, or the run holds what would lead the writing elsewhere.
        """
        self.check_writable()
        if fcntl is None:
            yield
            return
        with open_regular(self.path / ".lock", append=True) as file:
            try:
                # A lock of the process, which its children do not inherit, as they would one of ``flock``.
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
        """Record the end of a run whose process on this machine has ended without recording it, as after a SIGKILL.

        The lock decides, not the number of the process, which another one may have by now. A run of another machine is left
        to that machine, and one of another user to that user.

        Returns:
            Whether it was so.
        """
        status = self.status
        if status.get("state") != "running" or status.get("host") != socket.gethostname() or fcntl is None:
            return False
        lock = self.path / ".lock"
        if self.path.stat().st_uid != os.getuid() or (not _has_content(lock) and _is_alive(status.get("pid"))):
            return False  # it was made, and is about to be locked
        with self.training():
            if self.status.get("state") != "running":
                return False
            why = f"process {status.get('pid')} ended without a word, as by SIGKILL or a loss of power"
            self.update_status(state="failed", why=why)
        return True

    def complete(self) -> None:
        """Make the folders that a copy may lack, and remove what processes that were killed have left half written."""
        for name in FOLDERS:
            (self.path / name).mkdir(exist_ok=True)
        for left in (*self.path.glob(".*-*"), *(self.path / "results").glob(".*-*")):
            if left.is_file() and time.time() - left.stat().st_mtime > 3600:  # and not of somebody who is still writing
                left.unlink()

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, plain types only.

        Raises:
            RunError: where the file is no YAML mapping.
        """
        path = self.path / "config.yaml"
        content = read_file(path, YAML_BYTES)
        try:
            config = parse_yaml(content)
        except ValueError as error:
            raise RunError(f"{path}: broken YAML: {error}") from error
        if not isinstance(config, dict):
            raise RunError(f"{path}: holds no mapping")
        return upgraded(config)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return read_json(path) if os.path.lexists(path) else {}

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
        with storing(path, len(line)), open_regular(path, append=True) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)  # half a line would spoil the next one
                raise

    def logged(self) -> int:
        """Return how many bytes of events there are, and make them outlast a loss of power."""
        with open_regular(self.path / "metrics.jsonl", append=True) as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def forget_events(self, size: int) -> None:
        """Go back to the first ``size`` bytes of events, or the whole lines of them that there are.

        Raises:
            RunError: naming the first of these lines that is no event; nothing is written then.
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
        """Read ``metrics.jsonl``; a last line that a crash has cut short is left out.

        Raises:
            RunError: naming the line that is broken, or a file beyond any that training writes.
        """
        for number, line in self.event_lines():
            yield self.parse_event(line, number, checked=False)

    def event_lines(self) -> Iterator[tuple[int, bytes]]:
        """Read the lines of ``metrics.jsonl`` with their numbers, without a last one that a crash has cut short.

        Raises:
            RunError: for a file beyond any that training writes.
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
        """Read one line of ``metrics.jsonl``.

        Args:
            line: its bytes.
            number: of it, from 1.
            checked: whether it must be an event as training writes them, see ``check_event``, or any JSON.

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
        """The latest scores, empty before the first."""
        return self._read("result.json")

    def results(self) -> Iterator[dict[str, Any]]:
        """Read the scores of every protocol and setting, the oldest first."""
        yield from (result for _, result in self.named_results())

    def named_results(self, most: int = 10_000) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Read the scores of every protocol and setting with the names of their files, the oldest first.

        Args:
            most: files that there may be.
        """
        paths = sorted((self.path / "results").glob("*.json"))
        if len(paths) > most:
            raise RunError(f"{self.path / 'results'}: holds more than {most:,} files")
        found = [(path, self._read(f"results/{path.name}")) for path in paths]
        yield from sorted(found, key=lambda pair: str(pair[1].get("scored")))

    def write_result(self, result: dict[str, Any]) -> Path:
        """Keep scores under a name that follows from their protocol and setting, and as the latest."""
        key = json.dumps({name: score["card"] for name, score in result["metrics"].items()}, sort_keys=True)
        path = self.path / "results" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, to_json(result))
        write_atomically(self.path / "result.json", to_json(result))
        return path


def mark_dead_runs(folders: Iterable[Path]) -> None:
    """Record the end of all runs among some folders whose processes have ended without recording it."""
    for folder in folders:
        with contextlib.suppress(OSError, RunError, ResourceError):  # no run, or none that can be written to
            if b'"running"' in read_file(folder / "status.json", JSON_BYTES):
                Run(folder).mark_if_dead()


def _has_content(path: Path) -> bool:
    try:
        return path.stat(follow_symlinks=False).st_size > 0
    except OSError:
        return False


def _is_alive(pid: Any) -> bool:
    """Return whether a process of this machine exists."""
    if type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, who may signal it
        return True
    return True
