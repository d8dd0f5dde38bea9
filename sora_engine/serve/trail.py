"""Where a job is, in a small file that is written over as it goes: a kill leaves the last word.

Nothing is flushed: what was written is in the system's memory when the process dies, and that is
all that is asked. After a power cut it may be an earlier word, or none. The file is mapped: the
engine's thread tells of every step, and a call of the system would let go of the interpreter each
time, for the engine to wait for it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from pathlib import Path

_WIDTH = 32


class Trail:
    """One attempt's. Safe to use from any thread; a disk that takes no more is borne in silence."""

    def __init__(self, path: Path) -> None:
        self._words = ["", ""]
        self._lock = threading.Lock()
        self._file: mmap.mmap | None = None
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # Written, and not only made so long: its page then has its place on the disk.
                if os.pwrite(file, b" " * (2 * _WIDTH), 0) == 2 * _WIDTH:
                    self._file = mmap.mmap(file, 2 * _WIDTH)
            finally:
                os.close(file)

    def starts(self, step: int) -> None:
        """The engine has it, so many steps done; nothing where it has got further meanwhile."""
        with self._lock:
            if not self._words[0]:
                self._words[0] = f"{step} 0"
                self._put()

    def goes(self, steps: int, frames: int) -> None:
        """So many steps are done, and so many frames decoded."""
        with self._lock:
            self._words[0] = f"{steps} {frames}"
            self._put()

    def writes(self, frames: int | str) -> None:
        """So many frames are in its file, or what comes behind them."""
        with self._lock:
            self._words[1] = str(frames)
            self._put()

    def close(self) -> None:
        """The file stays; nothing more is written."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _put(self) -> None:
        if self._file is not None:
            self._file[:] = "".join(w.ljust(_WIDTH) for w in self._words).encode()


def last_word(path: Path) -> str:
    """Where a job was; an empty text where that is not known."""
    try:
        return " ".join(path.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return ""
