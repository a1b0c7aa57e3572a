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
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from genzoo.redact import redact, redact_words

try:
    import fcntl
except ImportError:  # on Windows a run has no lock
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1  # of runs and checkpoints, raised when older ones are no longer alike
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GONE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV)

FOLDERS = ("checkpoints", "samples", "results")  # of a run
FILES = ("config.yaml", "status.json", "metrics.jsonl", "samples.png", "result.json", ".lock")  # of a run
LOGS = ("csv", "tensorboard", "wandb", ".wandb")  # folders in which loggers of other packages write
WANDB_LINKS = (
    "latest-run",
    "debug.log",
    "debug-internal.log",
)  # in wandb/: removed and made anew by wandb, never followed

# What a file may hold, far above what genzoo writes.
YAML_BYTES, JSON_BYTES, PICTURE_BYTES, EVENT_BYTES = 2**20, 2**22, 2**24, 2**28
NAMES = 1000  # of numbers in one event
NODES = 50_000  # values of a configuration
DEPTH = 50  # of nesting
LARGEST = 1e100  # number, so that sums and squares of several are finite


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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file could not be written, also where a disk has become read-only or has gone.

    Args:
        path: what is written.

    Raises:
        ResourceError: naming the file and the cause.
    """
    try:
        with storing(path):
            yield
    except OSError as error:
        if error.errno not in _GONE:
            raise
        raise ResourceError(f"{error.filename or path}: cannot be written to: {error.strerror}") from error


def check_writable(folder: Path, said: str) -> None:
    """Refuse a folder that cannot be written to, before anything takes long.

    Args:
        folder: an existing one.
        said: what the user said, ``key=value``.

    Raises:
        RunError: where it is read-only.
        ResourceError: where its disk is full.
    """
    try:
        with storing(folder / "file"):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RunError(f"{said}: cannot be written to: {error.strerror}") from error


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file in one step: readers see the old one or the new one, whole, also after a crash.

    A link at ``path`` is replaced itself; the file that it leads to is untouched.

    Args:
        path: of the file.
        data: its new contents.
        durable: whether to wait until the file and its name are on the disk.

    Raises:
        ResourceError: where the disk is full; the old file is untouched.
        RunError: where a directory has its name.
    """
    with storing(path, len(data)):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            if isinstance(error, IsADirectoryError):
                raise RunError(f"{path}: is a directory, where a file belongs") from error
            raise
    if durable:
        sync(path.parent)


def sync(folder: Path) -> None:
    """Make names in a folder, such as one that a rename has made, outlast a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path, *, append: bool = False) -> BinaryIO:
    """Open a regular file for reading, or for reading and appending; a link, a pipe or a device is not even touched.

    A file that is appended to may have no other name: what a hard link from elsewhere leads to is not the run's own.

    Raises:
        RunError: naming the file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT if append else os.O_RDONLY
    # Opened without waiting for the other end of a pipe, and without following a link that has just been put there.
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    verb = "appended to" if append else "read"
    try:
        if os.path.lexists(path) or not append:
            _check_regular(path, path.lstat(), verb)
        descriptor = os.open(path, flags, 0o644)
        try:
            found = os.fstat(descriptor)
            _check_regular(path, found, verb)
            if append and found.st_nlink > 1:
                raise RunError(f"{path}: {_HARD}")
            return os.fdopen(descriptor, "ab+" if append else "rb", buffering=0 if append else -1)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise RunError(f"{path}: cannot be {verb}: {error.strerror}") from error


_HARD = "has another name elsewhere (a hard link), which would be changed too; copy the run by cp -r"


def _check_regular(path: Path, found: os.stat_result, verb: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise RunError(f"{path}: is no regular file; links, pipes and devices are not {verb}")


def check_tree(folder: Path, *, links: Container[str] = (), shared: Container[str] = ()) -> None:
    """Refuse a folder in which, at any depth, is anything but folders and files that are its own.

    Args:
        folder: a directory, or where none is yet.
        links: relative paths that may be symbolic links.
        shared: names at the top below which files may have other names elsewhere, since they are replaced and not changed.

    Raises:
        RunError: naming a symbolic link, a pipe, a device, a socket, or a file that is a hard link.
    """
    left = [folder] if os.path.lexists(folder) else []
    try:
        while left:
            here = left.pop()
            with os.scandir(here) as entries:
                for entry in entries:
                    path = here / entry.name
                    name = path.relative_to(folder)
                    if entry.is_symlink():
                        if name.as_posix() not in links:
                            raise RunError(f"{path}: is a link, of which a run has none")
                    elif entry.is_dir(follow_symlinks=False):
                        left.append(path)
                    elif not entry.is_file(follow_symlinks=False):
                        raise RunError(f"{path}: is neither a file nor a folder; a run has no pipes and no devices")
                    elif name.parts[0] not in shared and entry.stat(follow_symlinks=False).st_nlink > 1:
                        raise RunError(f"{path}: {_HARD}")
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error


def read_file(path: Path, limit: int) -> bytes:
    """Read a regular file, unless it is too large.

    Raises:
        RunError: naming the file.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise RunError(f"{path}: has {size:,} bytes, more than the {limit:,} that such a file may have")
        try:
            return file.read(size)
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}") from error


def _check_plain(value: Any) -> None:
    """Refuse what no run holds: endless nesting, keys that are no words, dates, NaN, numbers beyond all bounds.

    Raises:
        ValueError: saying what it is.
    """
    level = [value]
    for _ in range(DEPTH + 1):
        below: list[Any] = []
        for node in level:
            kind = type(node)
            if kind is str or node is None or kind is bool:
                continue
            if kind is float or kind is int:
                if not -LARGEST <= node <= LARGEST:  # nor is NaN
                    raise ValueError(f"holds a number that is not finite or beyond {LARGEST:g}")
            elif kind is dict:
                for key in node:
                    if type(key) is not str:
                        raise ValueError(f"the key {key!r} is no text")
                below.extend(node.values())
            elif kind is list:
                below.extend(node)
            else:
                raise ValueError(f"holds a {kind.__name__}, which is neither a number nor a text")
        level = below
    if level:
        raise ValueError(f"nested more than {DEPTH} deep")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
        raise ValueError(f"the key {twice[:100]!r} stands there twice")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_once)


def parse_json(data: bytes) -> Any:
    """Read JSON that a run may hold.

    Raises:
        ValueError: for anything else.
    """
    try:
        value = _JSON.decode(data.decode())
    except RecursionError as error:
        raise ValueError(f"nested more than {DEPTH} deep") from error
    _check_plain(value)
    return value


AXES = {"step", "images", "planned_images", "seconds", "flops", "images_per_second"}  # of an event


def check_event(event: Any) -> dict[str, Any]:
    """Check one line of ``metrics.jsonl``: what happened, where along the axes, and numbers by their names.

    Raises:
        ValueError: for anything else.
    """
    if type(event) is not dict or type(event.get("event")) is not str:
        raise ValueError("is no event: it needs the name of one, a text")
    for name in AXES & event.keys():
        if not _is_number(event[name]) or (event[name] is not None and event[name] < 0):
            raise ValueError(f"{name} is no number of at least 0, or null")
    values = event.get("values")
    if "values" in event or event["event"] in ("train", "interim"):
        if type(values) is not dict or len(values) > NAMES:
            raise ValueError(f"values is no mapping of at most {NAMES:,} names to numbers")
        for name, value in values.items():
            if not _is_number(value):
                raise ValueError(f"values: {name[:100]!r} is no number")
    return event


def _is_number(value: Any) -> bool:
    return value is None or type(value) is float or type(value) is int


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of a run, which must hold a mapping.

    Raises:
        RunError: naming the file.
    """
    content = read_file(path, JSON_BYTES)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise RunError(f"{path}: broken JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: holds no mapping")
    return value


_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which writes what stands in two places twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def parse_yaml(data: bytes) -> Any:
    """Read YAML that a run may hold: no tags, no aliases, no key twice.

    Raises:
        ValueError: for anything else.
    """
    try:
        loader = _Loader(data)
        try:
            value = _compose(loader)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from error
    _check_plain(value)
    return value


def _compose(loader: Any) -> Any:
    """Build what a stream of events describes; libyaml's own composer dies of deep nesting."""
    found: list[Any] = []  # of the document, of which there is one
    open_: list[list[Any]] = [
        found
    ]  # entries of the collections that have not ended; of mappings keys and values in turn
    count = documents = 0
    while loader.check_event():
        event = loader.get_event()
        count += 1
        if count > NODES or len(open_) > DEPTH + 1:
            raise ValueError(f"nested more than {DEPTH} deep, or more than {NODES:,} values")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise ValueError(f"an alias or a tag in line {line}, which no configuration of a run has")
        if isinstance(event, yaml.ScalarEvent):
            open_[-1].append(_plain_scalar(event.value) if event.implicit[0] else event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append([])
        elif isinstance(event, yaml.SequenceEndEvent):
            entries = open_.pop()
            open_[-1].append(entries)
        elif isinstance(event, yaml.MappingEndEvent):
            entries = open_.pop()
            for key in entries[::2]:
                if type(key) is not str:
                    raise ValueError(f"the key {str(key)[:100]!r} is no text")
            open_[-1].append(_once(list(zip(entries[::2], entries[1::2], strict=True))))
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise ValueError("holds two documents")
    return found[0] if found else None


@functools.lru_cache(4096)
def _plain_scalar(text: str) -> Any:
    """Return what a text without quotes stands for: a number, a truth value, nothing, or itself."""
    loader = yaml.SafeLoader("")
    tag = loader.resolve(yaml.ScalarNode, text, (True, False))
    try:
        return loader.construct_object(yaml.ScalarNode(tag, text))
    finally:
        loader.dispose()


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
                if error.errno in _FULL:
                    raise
            raise RunError(f"outputs={root}: {error.filename}: {error.strerror}") from error
        write_atomically(path / "config.yaml", yaml.dump(redact(config), Dumper=_Dumper, sort_keys=False).encode())
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
        with _open(self.path / ".lock", append=True) as file:
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
        return config

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
        with storing(path, len(line)), _open(path, append=True) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)  # half a line would spoil the next one
                raise

    def logged(self) -> int:
        """Return how many bytes of events there are, and make them outlast a loss of power."""
        with _open(self.path / "metrics.jsonl", append=True) as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def forget_events(self, size: int) -> None:
        """Go back to the first ``size`` bytes of events, or the whole lines of them that there are.

        Raises:
            RunError: naming the first of these lines that is no event; nothing is written then.
        """
        path, kept = self.path / "metrics.jsonl", b""
        if os.path.lexists(path):
            with _open(path) as file:
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
        with _open(path) as file:
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
