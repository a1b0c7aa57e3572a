"""Tuning of glibc's allocator for training on a CPU.

Each training step allocates and frees the same large blocks. By default glibc maps and unmaps each of them, and the kernel
zeroes every page every time. High thresholds keep the blocks in the process: results are bit-identical, and steps take .83 to
.99 of the time.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # as in malloc.h
_OTHERS = ("tcmalloc", "jemalloc", "mimalloc")


def tune() -> str:
    """Set glibc's allocator to keep freed memory; call it before torch allocates.

    Other allocators, preloaded as by ``LD_PRELOAD=libtcmalloc_minimal.so.4``, are unchanged.

    Returns:
        The allocator: "glibc, keeping freed blocks", the name of another one, or "system".
    """
    try:
        loaded = Path("/proc/self/maps").read_text()
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not Linux, or not glibc
        return "system"
    for name in _OTHERS:
        if name in loaded:
            return name
    # 32 MiB is glibc's largest threshold.
    done = [mallopt(_MMAP_THRESHOLD, 32 << 20), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 64 << 20)]
    return "glibc, keeping freed blocks" if all(done) else "system"
