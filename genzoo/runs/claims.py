"""Claims of jobs by file locks, so that concurrent sweeps never run a job twice.

A claim is a file ``<outputs>/.claim-<job>``, locked with ``flock`` while the owner, or a child that inherited the descriptor,
is alive; the kernel releases it however the process ends. Its text (process, host, time) is informational: the lock alone
decides, independently of reused process ids and clocks.

Locks work between processes of one machine on any local file system, and between machines on file systems that support them
(NFS 4, or 3 with lockd; Lustre mounted with ``flock``). Without locks (some file systems, Windows) a message is logged and jobs
are not claimed: two concurrent sweeps may then train a job twice, into separate runs.

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

CLAIM = ".claim-"  # prefix of claim files
SCRATCH = ".sweep-"  # prefix of the working folders of sweeps
_TAKEN = (errno.EACCES, errno.EAGAIN)
ATTEMPTS = 1000  # to lock a file that other processes remove concurrently


class Claim:
    """A lock, held until ``release`` or the end of this process and of those that inherited it.

    Args:
        path: the locked file; None without locks.
        descriptor: of the open file.
        made: folders created for it, innermost first; removed with it if empty.
    """

    def __init__(self, path: Path | None = None, descriptor: int | None = None, made: Sequence[Path] = ()):
        self.path, self.descriptor, self.made = path, descriptor, made

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock and remove the file."""
        if self.path is None or self.descriptor is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()  # before releasing the lock, so that no other process's file is removed
        os.close(self.descriptor)
        self.descriptor = None
        with contextlib.suppress(OSError):
            for folder in self.made:
                folder.rmdir()


def try_lock(path: Path) -> Claim | None:
    """Lock a file, creating it if missing, without blocking.

    Args:
        path: the file.

    Returns:
        The claim; None if another process holds it.
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
        except FileNotFoundError:  # the previous owner has just removed the folder
            continue
        except OSError:  # read-only; the next write raises with the key to change
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
        os.close(descriptor)  # the previous owner removed the file
    else:  # no folder can be created here, as in /proc; the next write raises with the key to change
        return Claim()
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = f"process {os.getpid()} on {socket.gethostname()} since {time}\n"
    with contextlib.suppress(OSError):  # on a full disk
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)
    return Claim(path, descriptor, made)


@functools.cache
def _without_locks(place: str) -> None:
    log_stderr(f"{place} does not support locks: concurrent sweeps may train the same job twice")


def path_of(outputs: str | os.PathLike[str], job: str) -> Path:
    """Path of the claim of a job.

    Args:
        outputs: folder of run directories.
        job: job id, see ``genzoo.runs.job_id``.
    """
    return Path(outputs, f"{CLAIM}{job}")


def owner(path: Path) -> str:
    """Description of the owner of a claim, for messages."""
    try:
        return path.read_text(errors="replace")[:200].strip() or "another process"
    except OSError:
        return "another process"


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Create a temporary folder for one sweep, after removing those of killed sweeps.

    Args:
        parent: folder to create it in.

    Raises:
        ResourceError: if it cannot be created.
    """
    remove_abandoned(parent)
    try:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=SCRATCH))
    except OSError as error:
        raise ResourceError(f"{parent.absolute()}: cannot create the folder of a sweep: {error.strerror}") from error
    claim = try_lock(folder / ".lock")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if claim:
            claim.release()


def remove_abandoned(parent: Path) -> None:
    """Remove the unlocked folders of killed sweeps, except those with SLURM jobs, which may still run."""
    for folder in parent.glob(f"{SCRATCH}*"):
        lock = folder / ".lock"
        if folder.is_symlink() or (folder / "hydra" / ".submitit").exists() or not _written(lock):
            continue
        if (claim := try_lock(lock)) and claim.path:
            shutil.rmtree(folder, ignore_errors=True)
            claim.release()


def remove_abandoned_claims(outputs: str | os.PathLike[str]) -> None:
    """Remove claims of ended processes."""
    for path in Path(outputs).glob(f"{CLAIM}*"):
        if claim := try_lock(path):
            claim.release()


def _written(lock: Path) -> bool:
    """Whether a lock file has content, so that it is not just being created."""
    try:
        return not lock.is_symlink() and lock.stat().st_size > 0
    except OSError:
        return False
