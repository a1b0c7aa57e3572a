"""Resources of this process: usable cores and a home directory."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import tempfile
from pathlib import Path

from genzoo.console import log_stderr

MOST_THREADS = 1024  # OMP_NUM_THREADS above it is ignored


def usable_cores() -> int:
    """Number of threads for this process.

    ``OMP_NUM_THREADS`` if set, else the logical cores in the affinity mask (or of the machine, without a mask), limited by the
    CPU quota of the control group, rounded up.

    References:
        https://www.openmp.org/spec-html/5.2/openmpse57.html (a list has one number per nesting level)
        https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max)
    """
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if threads.isdecimal() and 0 < int(threads) <= MOST_THREADS:
        return int(threads)
    quota = cpu_quota()
    return _cores() if quota is None else max(1, min(_cores(), math.ceil(quota)))


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    fallback = os.cpu_count if affinity is None else lambda: len(affinity(0))
    return getattr(os, "process_cpu_count", fallback)() or 1  # since Python 3.13


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPU quota of this process in cores, the minimum over its control groups; None without a limit.

    Args:
        root: of the file system, for tests.
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
        # In a container the path is often the host's, and the container's own group is at the root.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for home in homes:
            for depth in range(len(parts), -1, -1):
                quotas.append(_quota(home.joinpath(*parts[:depth])))
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(group: Path) -> float | None:
    """Read the quota of a control group, version 1 or 2."""
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
    """The user's home directory; None if undefined, as in many containers."""
    try:
        found = Path.home()
    except (RuntimeError, KeyError):
        return None
    return found if found.is_absolute() else None


def ensure_home() -> None:
    """Set ``HOME`` to a temporary directory if the user has none.

    Libraries such as matplotlib and wandb raise without a home directory. It is private to this process and removed at exit.
    """
    found = home()
    if found is not None and found.is_dir():
        return
    try:
        folder = tempfile.mkdtemp(prefix="genzoo-home-")
    except OSError:  # the first file to be written raises a better message
        return
    why = "the user has no home directory" if found is None else f"the home directory {found} does not exist"
    if not os.environ.get("GENZOO_CACHE"):
        log_stderr(f"{why}: caches are kept in {folder} until the command ends; set GENZOO_CACHE to keep them")
    os.environ["HOME"] = folder
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in forked children
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
