"""File access of runs: atomic writes, and bounded reads that do not follow links."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import BinaryIO

from genzoo.runs.errors import ResourceError, RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GONE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV)
LOGS = ("csv", "tensorboard", "wandb", ".wandb")  # folders of loggers
WANDB_LINKS = (
    "latest-run",
    "debug.log",
    "debug-internal.log",
)  # in wandb/: replaced by wandb, never followed


@contextlib.contextmanager
def storing(path: Path, size: int | None = None) -> Iterator[None]:
    """Convert errors of a full disk.

    Args:
        path: the file to write.
        size: its size in bytes, if known.

    Raises:
        ResourceError: naming the file, its size and the free space.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        with contextlib.suppress(OSError):
            path = Path(error.filename or path)
        needed = "" if size is None else f"{size:,} bytes to write, "
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.is_dir())).free
        raise ResourceError(f"{path}: {error.strerror}: {needed}{free:,} free; free some space and resume") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert errors of a full, read-only or removed disk.

    Args:
        path: the file to write.

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


def check_writable(folder: Path, setting: str) -> None:
    """Check that a folder is writable.

    Args:
        folder: an existing folder.
        setting: the user's ``key=value``, for messages.

    Raises:
        RunError: if it is read-only.
        ResourceError: if its disk is full.
    """
    try:
        with storing(folder / "file"):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise RunError(f"{setting}: cannot be written to: {error.strerror}") from error


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file atomically by a rename: it is the old or the new one at any time, also after a crash.

    A link at ``path`` is replaced, not followed.

    Args:
        path: the file.
        data: its new contents.
        durable: whether to fsync the file and its folder.

    Raises:
        ResourceError: if the disk is full; the old file is unchanged.
        RunError: if the path is a directory.
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
                raise RunError(f"{path}: is a directory, not a file") from error
            raise
    if durable:
        sync(path.parent)


def sync(folder: Path) -> None:
    """Fsync a folder, for renames to survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path, *, append: bool = False) -> BinaryIO:
    """Open a regular file for reading, or for reading and appending.

    Raises:
        RunError: for a link, a pipe or a device, and for a hard link opened for appending, which may belong to another owner.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT if append else os.O_RDONLY
    # Never blocks on a pipe nor follows a link, even one created after the check.
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
        if error.errno in FULL:
            raise
        raise RunError(f"{path}: cannot be {verb}: {error.strerror}") from error


_HARD = "is a hard link to a file elsewhere, which would be changed too; copy the run by cp -r"


def _check_regular(path: Path, found: os.stat_result, verb: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise RunError(f"{path}: is not a regular file; links, pipes and devices are not {verb}")


def check_tree(folder: Path, *, links: Container[str] = (), shared: Container[str] = ()) -> None:
    """Check recursively that a folder contains folders and regular files alone.

    Args:
        folder: a directory, which may not exist yet.
        links: relative paths of permitted symbolic links.
        shared: top-level names below which hard links are permitted, since their files are replaced and never modified.

    Raises:
        RunError: naming a symbolic link, a pipe, a device, a socket or a hard link.
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
                            raise RunError(f"{path}: is a link, which a run may not contain")
                    elif entry.is_dir(follow_symlinks=False):
                        left.append(path)
                    elif not entry.is_file(follow_symlinks=False):
                        raise RunError(f"{path}: is neither a file nor a folder")
                    elif name.parts[0] not in shared and entry.stat(follow_symlinks=False).st_nlink > 1:
                        raise RunError(f"{path}: {_HARD}")
    except OSError as error:
        raise RunError(f"{error.filename or folder}: cannot be read: {error.strerror}") from error


def read_file(path: Path, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes.

    Raises:
        RunError: naming the file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise RunError(f"{path}: has {size:,} bytes, more than the limit of {limit:,}")
        try:
            return file.read(size)
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}") from error
