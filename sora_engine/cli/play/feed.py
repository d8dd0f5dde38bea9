"""Frames on their way to those who watch: each has a time at which it is to be seen."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

KEPT = 64
"""Frames that wait for watchers, the oldest of which go first."""
RATE_FRAMES = 33
"""Frames of which the rate is told."""


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A frame to be seen: its number, from 1, and uint8 `[height, width, 3]`."""

    number: int
    frame: np.ndarray


@dataclass(slots=True)
class Status:
    """What is told beside the picture.

    text: how it goes. message: what happened last. keys: what the keys do.
    """

    text: str = ""
    message: str = ""
    keys: str = ""
    values: dict[str, object] = field(default_factory=dict)


class Feed:
    """What one thread makes and others show. `over` once nothing more comes; `error` says why."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.status = Status()
        self.over = False
        self.error: BaseException | None = None
        self.woken: Callable[[], None] = lambda: None
        """Called where there is something new, in the thread that makes it."""
        self._clock = clock
        self._frames: deque[tuple[int, float, np.ndarray]] = deque(maxlen=KEPT)
        self._number = 0
        self._changed = threading.Condition()

    def put(self, frames: Sequence[np.ndarray] | np.ndarray, fps: float) -> None:
        """Frames to be seen from now on, one after the other."""
        with self._changed:
            now = self._clock()
            for i, frame in enumerate(frames):
                self._number += 1
                self._frames.append((self._number, now + i / fps, frame))
            self._changed.notify_all()
        self.woken()

    def cut(self, frame: np.ndarray) -> None:
        """Another frame, at once, in the place of those that were to be seen yet."""
        with self._changed:
            now = self._clock()
            while self._frames and self._frames[-1][1] > now:
                self._frames.pop()
        self.put([frame], 1.0)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        with self._changed:
            self.error = self.error or error
            self.over = True
            self._changed.notify_all()
        self.woken()

    def seen(self) -> Seen | None:
        """The newest frame that is to be seen by now."""
        with self._changed:
            return self._seen()

    def wait_s(self, after: int) -> float | None:
        """How long until a frame later than number `after` is to be seen; None: none is there."""
        with self._changed:
            return self._wait_s(after)

    def next(self, after: int, timeout_s: float) -> Seen | None:
        """Waits for a frame later than number `after`; None where none came."""
        until = time.monotonic() + timeout_s
        with self._changed:
            while True:
                seen = self._seen()
                if seen is not None and seen.number > after:
                    return seen
                left = until - time.monotonic()
                if left <= 0 or (self.over and self._wait_s(after) is None):
                    return None
                due = self._wait_s(after)
                self._changed.wait(left if due is None else min(left, due))

    def rate(self) -> float:
        """Frames a second, of the last that were made."""
        with self._changed:
            last = list(self._frames)[-RATE_FRAMES:]
        if len(last) < 2 or last[-1][1] <= last[0][1]:
            return 0.0
        return (len(last) - 1) / (last[-1][1] - last[0][1])

    def _seen(self) -> Seen | None:
        now = self._clock()
        for number, due, frame in reversed(self._frames):
            if due <= now:
                return Seen(number, frame)
        return None

    def _wait_s(self, after: int) -> float | None:
        now = self._clock()
        later = [due for number, due, _ in self._frames if number > after]
        return max(0.0, later[0] - now) if later else None
