"""What the operating system, or a container, gives this process: cores and a home directory."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import tempfile
from pathlib import Path

from genzoo.console import log_stderr

MOST_THREADS = 1024  # above which OMP_NUM_THREADS is a slip of the hand


def usable_cores() -> int:
    """Return how many threads this process should compute with.

    ``OMP_NUM_THREADS`` where it is set, as for any program that uses OpenMP. Otherwise the logical cores of the affinity
    mask (Linux; Python 3.13 has it elsewhere too), or those of the machine where there is no such mask (macOS, Windows),
    but no more than the quota of the control group, rounded up.

    References:
        https://www.openmp.org/spec-html/5.2/openmpse57.html (a list gives a number for each level of nesting)
        https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max)
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdecimal() and 0 < int(asked) <= MOST_THREADS:
        return int(asked)
    quota = cpu_quota()
    return _cores() if quota is None else max(1, min(_cores(), math.ceil(quota)))


def _cores() -> int:
    if hasattr(os, "process_cpu_count"):  # from Python 3.13 on
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the cores' worth of time that control groups give this process, None without a limit.

    The limits of all groups above this process's own hold too.

    Args:
        root: of the file system, which a test may make.
    """
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = set(controllers.split(","))
        if not controllers:
            homes = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif "cpu" in names:
            homes = [root / "sys/fs/cgroup" / name for name in dict.fromkeys((controllers, "cpu", "cpu,cpuacct"))]
        else:
            continue
        # In a container the path is often the host's, and its own group stands at the root.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for home in homes:
            for depth in range(len(parts), -1, -1):
                quotas.append(_quota(home.joinpath(*parts[:depth])))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: Path) -> float | None:
    """Read the quota of one group of either version of control groups."""
    words = _read(group / "cpu.max").split() or [
        _read(group / "cpu.cfs_quota_us").strip(),
        _read(group / "cpu.cfs_period_us").strip(),
    ]
    try:
        quota, period = int(words[0]), int(words[1])
    except (ValueError, IndexError):  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def home() -> Path | None:
    """Return the user's home directory; None for a user who has none, as in many containers."""
    try:
        found = Path.home()
    except (RuntimeError, KeyError):
        return None
    return found if found.is_absolute() else None


def ensure_home() -> None:
    """Give this process and its children a home directory where the user has none.

    Libraries look for their own settings there, and matplotlib, wandb and others raise where there is no such directory. It
    is private to this process and removed with it.
    """
    found = home()
    if found is not None and found.is_dir():
        return
    try:
        folder = tempfile.mkdtemp(prefix="genzoo-home-")
    except OSError:  # nothing can be written anywhere, which the first file that is needed tells better
        return
    why = "the user has no home directory" if found is None else f"the home directory {found} does not exist"
    if not os.environ.get("GENZOO_CACHE"):
        log_stderr(f"{why}: caches are kept in {folder} until the command ends; set GENZOO_CACHE to keep them")
    os.environ["HOME"] = folder
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # and not in a process that was forked from it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
