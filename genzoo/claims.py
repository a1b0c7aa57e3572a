"""Who works on a job: locks of the operating system, so that no job is done twice and what a dead process held is free.

A claim is a file under the folder of all runs, ``<outputs>/.claim-<job>``, locked with ``flock`` as long as the process
that holds it, or a child that has inherited it, is alive; how that process ends does not matter. Its text (process, host, time)
is for people. The lock alone decides, so that a recycled process number or a clock that is wrong harms nothing.

What holds where: between processes of one machine on any local file system; between machines where the file system passes
locks on (NFS since version 4, or 3 with lockd; Lustre mounted with ``flock``). Where a file system, or Windows, has no locks,
one line says so and jobs are not claimed: two sweeps may then train one job twice, each into a run of its own.

References:
    https://man7.org/linux/man-pages/man2/flock.2.html (NFS, inheritance)
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from genzoo.console import log_stderr
from genzoo.runs import ResourceError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

CLAIM = ".claim-"  # how the names of claims begin, which lie beside the folders of runs and not among the runs
SCRATCH = ".sweep-"  # how the names of folders begin that a sweep works in
_TAKEN = (errno.EACCES, errno.EAGAIN)
ATTEMPTS = 1000  # to lock a file that other processes remove at the same time


class Claim:
    """A lock that is held until ``release``, or until this process and those that have inherited it have ended.

    Args:
        path: of the locked file; None where there are no locks.
        descriptor: of the open file.
        made: folders that were made for it, the innermost first; they go with it if they are empty.
    """

    def __init__(self, path: Path | None = None, descriptor: int | None = None, made: Sequence[Path] = ()):
        self.path, self.descriptor, self.made = path, descriptor, made

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give it up and remove the file."""
        if self.path is None or self.descriptor is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()  # before the lock ends, so that nobody else's is removed
        os.close(self.descriptor)
        self.descriptor = None
        with contextlib.suppress(OSError):
            for folder in self.made:
                folder.rmdir()


def try_lock(path: Path) -> Claim | None:
    """Lock a file, which is made where there is none.

    Args:
        path: of the file.

    Returns:
        The claim; None where another process holds it.
    """
    if fcntl is None:
        _without_locks("this system")
        return Claim()
    made: list[Path] = []
    for _ in range(ATTEMPTS):
        made += [folder for folder in path.parents if folder not in made and not folder.exists()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the last one has just removed the folder
            continue
        except OSError:  # nothing can be written here, which whoever writes next says with the key to change
            return Claim()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
        except FileNotFoundError:
            current = False
        except OSError as error:
            os.close(descriptor)
            if error.errno in _TAKEN:
                return None
            _without_locks(f"the file system of {path.parent}")
            return Claim()
        if current:
            break
        os.close(descriptor)  # of a file that was removed by whoever held it
    else:  # no folder can be made here, as in /proc; the next write raises with the key to change
        return Claim()
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = f"process {os.getpid()} on {socket.gethostname()} since {time}\n"
    with contextlib.suppress(OSError):  # on a full disk
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    return Claim(path, descriptor, made)


@functools.cache
def _without_locks(place: str) -> None:
    log_stderr(f"{place} has no locks: two sweeps at a time may train the same job twice")


def path_of(outputs: str | os.PathLike[str], job: str) -> Path:
    """Return the file that claims a job.

    Args:
        outputs: the folder of all runs.
        job: its name, as ``genzoo.runs.job_id`` gives it.
    """
    return Path(outputs, f"{CLAIM}{job}")


def owner(path: Path) -> str:
    """Return who holds a claim, for messages."""
    try:
        return path.read_text(errors="replace")[:200].strip() or "another process"
    except OSError:
        return "another process"


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Make a folder for one sweep, which is removed with it; those of sweeps that were killed are removed first.

    Args:
        parent: where it is made.

    Raises:
        ResourceError: where it cannot be made.
    """
    remove_abandoned(parent)
    try:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=SCRATCH))
    except OSError as error:
        raise ResourceError(f"{parent.absolute()}: a sweep needs a folder here: {error.strerror}") from error
    claim = try_lock(folder / ".lock")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if claim:
            claim.release()


def remove_abandoned(parent: Path) -> None:
    """Remove the folders and claims of processes that were killed, as far as locks show that nobody works there.

    Jobs that a killed sweep has handed to SLURM may still run: their folder is left to them.
    """
    for folder in parent.glob(f"{SCRATCH}*"):
        lock = folder / ".lock"
        if folder.is_symlink() or (folder / "hydra" / ".submitit").exists() or not _written(lock):
            continue
        if (claim := try_lock(lock)) and claim.path:
            shutil.rmtree(folder, ignore_errors=True)
            claim.release()


def remove_abandoned_claims(outputs: str | os.PathLike[str]) -> None:
    """Remove claims whose holders have ended."""
    for path in Path(outputs).glob(f"{CLAIM}*"):
        if claim := try_lock(path):
            claim.release()


def _written(lock: Path) -> bool:
    """Return whether a lock has been held, so that it is not one that is being made."""
    try:
        return not lock.is_symlink() and lock.stat().st_size > 0
    except OSError:
        return False
