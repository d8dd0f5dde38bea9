"""Servers that are processes of this machine: started, started anew where they end, and stopped."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sora_engine.errors import ServeError

logger = logging.getLogger(__name__)

BACK_OFF_S = (0.5, 30.0)
"""How long a server that ended is left alone: the first time, doubling, and at most."""
SETTLED_S = 60.0
"""After so long a life its earlier ends are forgotten."""
CANNOT_START = (1, 2)
"""Exit codes of a wrong option, model or folder: no restart mends them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one of several servers is. name: the replica in its jobs' ids. data: its folder.
    socket: the Unix socket that it listens on."""

    name: str
    data: Path
    socket: Path


class Process(Protocol):
    """What is asked of a process; `subprocess.Popen` has it."""

    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...


def places_in(root: Path, count: int, sockets: Path) -> list[Place]:
    """The places of this many servers in a folder: `root/0`, `root/1` and so on. Raises ServeError
    where jobs lie in it that none of them would have."""
    root = root.expanduser().absolute()
    names = [str(i) for i in range(count)]
    if (root / "jobs.sqlite").exists():
        raise ServeError(
            f"the data folder {root} is that of one server; another folder would work, or one that "
            f"has it as its folder {root.name}/0"
        )
    strange = [path.parent.name for path in root.glob("*/jobs.sqlite")]
    strange = sorted(name for name in strange if name not in names)
    if strange:
        raise ServeError(
            f"{root} has jobs of a replica {strange[0]}, which none of {count} would do; "
            "as many replicas as before would work"
        )
    return [Place(name, root / name, sockets / name) for name in names]


def wait_until_free(places: Sequence[Place], timeout_s: float = 10.0) -> None:
    """Wait for servers of before, which end when their parent does, to let go of the folders;
    ServeError where one does not."""
    end = time.monotonic() + timeout_s
    for place in places:
        while _is_locked(place.data / "lock"):
            if time.monotonic() > end:
                raise ServeError(
                    f"the data folder {place.data} is in use by another server; stop it, or name "
                    "another folder"
                )
            time.sleep(0.1)


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def share_of(
    index: int, count: int, processors: int, devices: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """What a child's environment has beside its parent's: its share of the threads and the GPUs.

    devices: all of them, by what CUDA_VISIBLE_DEVICES calls them. Where there are fewer than
    servers, some are shared. What the operator set for threads stays.
    """
    own: dict[str, str] = {}
    if "OMP_NUM_THREADS" not in environment:
        own["OMP_NUM_THREADS"] = str(max(1, processors // count))
    if devices:
        mine = devices[index % len(devices) :: count] if len(devices) < count else ()
        mine = mine or devices[index * len(devices) // count : (index + 1) * len(devices) // count]
        own["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return own


def devices_of(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that this process may use, without asking CUDA, which would take memory on each."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    known = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i in range(len(list(known.iterdir())))] if known.is_dir() else []


@dataclass(eq=False)
class _Child:
    place: Place
    process: Process
    began: float
    ends: int = 0
    restarts: int = 0
    due: float | None = None
    code: int | None = None


class Children:
    """The servers of some places. `watch` runs until all have ended."""

    def __init__(self, places: Sequence[Place], spawn: Callable[[Place], Process]) -> None:
        """spawn: starts the server of a place."""
        self._spawn = spawn
        self._stopping = False
        now = time.monotonic()
        self._children = [_Child(place, spawn(place), now) for place in places]

    @property
    def restarts(self) -> dict[str, int]:
        """How often each server was started anew."""
        return {child.place.name: child.restarts for child in self._children}

    @property
    def code(self) -> int:
        """The exit code of all: the first one that is not 0."""
        return next((child.code for child in self._children if child.code), 0)

    async def watch(self) -> None:
        """Start anew what ends, after a pause that doubles; returns once all have ended for good:
        after `stop`, or as one could not start."""
        while any(child.code is None for child in self._children):
            for child in self._children:
                if child.code is None:
                    self._look_after(child)
            await asyncio.sleep(0.05)

    def stop(self, number: int) -> None:
        """Send all a signal; none is started anew."""
        self._stopping = True
        for child in self._children:
            if child.due is not None:
                child.due, child.code = None, 0  # its jobs wait in its folder
            elif child.code is None:
                child.process.send_signal(number)

    def _look_after(self, child: _Child) -> None:
        now = time.monotonic()
        if child.due is not None:
            if now >= child.due:
                child.process, child.began, child.due = self._spawn(child.place), now, None
                child.restarts += 1
            return
        code = child.process.poll()
        if code is None:
            return
        if self._stopping:
            child.code = code
            return
        if code in CANNOT_START and child.restarts == 0 and child.ends == 0:
            logger.error("replica %s could not start", child.place.name)
            child.code = code
            self.stop(15)
            return
        child.ends = 1 if now - child.began > SETTLED_S else child.ends + 1
        pause = min(BACK_OFF_S[1], BACK_OFF_S[0] * 2 ** min(child.ends - 1, 16))
        child.due = now + pause
        logger.error(
            "replica %s ended with %d; it is started anew in %g s", child.place.name, code, pause
        )
