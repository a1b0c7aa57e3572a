"""Files of a run: written atomically, read without following links, and never larger than they may be."""

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
LOGS = ("csv", "tensorboard", "wandb", ".wandb")  # folders in which loggers of other packages write
WANDB_LINKS = (
    "latest-run",
    "debug.log",
    "debug-internal.log",
)  # in wandb/: removed and made anew by wandb, never followed


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
        if error.errno not in FULL:
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


def open_regular(path: Path, *, append: bool = False) -> BinaryIO:
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
        if error.errno in FULL:
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
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise RunError(f"{path}: has {size:,} bytes, more than the {limit:,} that such a file may have")
        try:
            return file.read(size)
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}") from error
