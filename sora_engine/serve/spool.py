"""Frames on their way from the engine to a file: never waited for, and bounded in memory."""

from __future__ import annotations

import threading
from collections import deque
from pathlib import Path

import numpy as np

MEMORY = 64 << 20
"""Bytes of frames that wait in memory, for each job; what comes beyond that waits on the disk."""
WORTH = 1 << 20
"""Bytes for which whoever takes them is woken before the end: a few small frames at a time would
cost the engine's thread more than they do themselves."""


class Spool:
    """A queue of uint8 arrays `[n, height, width, 3]`. `put` and `end` never wait for `get`."""

    def __init__(self, overflow: Path, memory: int = MEMORY, worth: int = WORTH) -> None:
        """overflow: a file that is there only while more waits than `memory` bytes. worth: bytes,
        of which less is kept until the end, or until more comes."""
        self._path, self._memory, self._worth = overflow, memory, worth
        self._held: deque[np.ndarray | tuple[int, tuple[int, ...]]] = deque()
        self._bytes = 0
        self._on_disk = 0
        self._written = 0
        self._ended = self._flows = False
        self._wake = threading.Condition()

    def put(self, frames: np.ndarray) -> None:
        """Hand frames on; raises OSError where neither memory nor disk has room."""
        with self._wake:
            # Once some wait on the disk, so do those behind them: memory is for what is next.
            if self._on_disk or self._bytes + frames.nbytes > self._memory:
                # From the beginning where none wait there: what an earlier attempt left is no
                # frame of this one.
                with self._path.open("r+b" if self._on_disk else "wb") as file:
                    file.seek(self._written)
                    file.write(np.ascontiguousarray(frames).tobytes())
                self._held.append((self._written, frames.shape))
                self._written += frames.nbytes
                self._on_disk += 1
            else:
                self._held.append(frames)
                self._bytes += frames.nbytes
            if self._on_disk or self._bytes >= self._worth:
                self._flows = True
                self._wake.notify()

    def end(self) -> None:
        """No more will come."""
        with self._wake:
            self._ended = self._flows = True
            self._wake.notify()

    def get(self) -> np.ndarray | None:
        """The next frames, waited for; None at the end."""
        with self._wake:
            while not self._flows:
                self._wake.wait()
            if not self._held:
                return None
            item = self._held.popleft()
            self._flows = self._ended or bool(self._held)
            if isinstance(item, np.ndarray):
                self._bytes -= item.nbytes
                return item
            start, shape = item
            with self._path.open("rb") as file:
                file.seek(start)
                frames = np.fromfile(file, np.uint8, int(np.prod(shape))).reshape(shape)
            self._on_disk -= 1
            if not self._on_disk:
                self._path.unlink()
                self._written = 0
            return frames
