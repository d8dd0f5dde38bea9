"""What the machine has, asked in a way that works on every system."""

from __future__ import annotations

import ctypes
import os
import sys


def usable_cores() -> int:
    """The CPU cores that this process may use; all of them where the system does not say."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory_bytes() -> int | None:
    """The machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def keep_memory() -> bool:
    """Have the C library keep what is freed for the next allocation, in place of giving it back.

    A step allocates what the one before it did, and finds its pages anew each time they were given
    back: 9,000 to 26,000 of them for one wide block. At most a GiB of what lies free at the end is
    kept, and larger blocks than that are given back as ever. Threads share one heap, since each
    would keep its own. glibc alone has these settings (`mallopt(3)`); whatever the environment says
    of them stands. Returns whether they are set.
    """
    named = [name for name in os.environ if name.startswith("MALLOC_")]
    if named or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        settings = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, 2**30))
        return all(libc.mallopt(name, value) == 1 for name, value in settings)
    except (OSError, AttributeError):  # another C library
        return False


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Of glibc's malloc.h."""
