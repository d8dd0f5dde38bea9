"""What limits leave of a machine's memory: those of a container, and of the shell's `ulimit -v`.

The kernel ends a process that passes the first, and refuses memory to one that passes the second,
however much of it is free. `/proc/meminfo` of a container is the machine's.

Sources: the kernel's documentation of cgroup v2 ("Memory") and of v1 ("Memory Resource
Controller"); getrlimit(2), proc(5).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_FILES = {  # by version: the limit, what is used, and what of that the kernel drops first
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
_NONE = 1 << 60
"""Version 1 writes no limit as a very large one."""


def left_under_limits(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take; None where nothing limits it.

    root: of the file system, for tests.
    """
    left = [*_left_in_cgroups(root), *_left_of_addresses(root)]
    return max(0, min(left)) if left else None


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """What each cgroup that holds this process leaves: its own, and those round it."""
    for version, folder, top in _cgroups(root):
        limit_file, used_file, dropped = _FILES[version]
        while True:
            try:
                limit = int((folder / limit_file).read_text(encoding="ascii"))
                used = int((folder / used_file).read_text(encoding="ascii"))
                if limit < _NONE:
                    yield limit - used + _stat(folder / "memory.stat", dropped)
            except (OSError, ValueError):  # the root has no such files, and "max" is no number
                pass
            if folder == top:
                break
            folder = folder.parent


def _cgroups(root: Path) -> Iterator[tuple[int, Path, Path]]:
    """(version, this process's folder, the topmost one), by proc(5)'s `/proc/self/cgroup`."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            version, top = 2, root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            version, top = 1, root / "sys/fs/cgroup/memory"
        else:
            continue
        folder = top / path.strip("/")
        # A container sees its own folder as the topmost one, and may be told the machine's path.
        yield version, folder if folder.is_dir() and ".." not in folder.parts else top, top


def _stat(path: Path, name: str) -> int:
    for line in path.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _left_of_addresses(root: Path) -> Iterator[int]:
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            pages = int((root / "proc/self/statm").read_text(encoding="ascii").split()[0])
            yield limit - pages * resource.getpagesize()
    except (ImportError, OSError, ValueError, LookupError):  # Windows, or no /proc
        pass
