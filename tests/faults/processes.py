"""What the kernel says of processes: whose children there are, and where they listen."""

from __future__ import annotations

import os
import time
from pathlib import Path


def parents() -> dict[int, int]:
    """The parent of each process that is alive (a zombie is not)."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                found[int(entry.name)] = int(parent)
    return found


def descendants(of: int | None = None) -> list[int]:
    """The launchers and ranks below this process (or another): each before those it has started,
    which stand in the order in which it did. Their numbers tell no order: they wrap round."""
    alive, found = parents(), []

    def walk(pid: int) -> None:
        for child in children(pid):
            if child in alive and is_rank(child):
                found.append(child)
            walk(child)

    walk(os.getpid() if of is None else of)
    return found


def children(pid: int) -> list[int]:
    """A process's own, in the order in which they were started (of one thread; see proc(5))."""
    started: list[int] = []
    try:
        for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda entry: int(entry.name)):
            started += map(int, (task / "children").read_text().split())
    except OSError:  # it has ended
        pass
    return started


def is_rank(pid: int) -> bool:
    try:
        return b"sora_engine.distributed.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait_gone(pids, timeout_s: float) -> bool:
    """Whether all of them end in time."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if not set(pids) & set(parents()):
            return True
        time.sleep(0.05)
    return False


def listeners(pids) -> list[str]:
    """Addresses on which these processes listen."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(fd)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(_address(fields[1].split(":")[0]))
    return found


def _address(text: str) -> str:
    raw = bytes.fromhex(text)
    if len(raw) == 4:
        return ".".join(str(b) for b in reversed(raw))
    return text
