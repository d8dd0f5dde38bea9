"""How long a job will take, by what those before it took."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sora_engine.request import ResolvedRequest

SHARE = 0.3
"""The weight of the last job."""


class Pace:
    """Seconds a pixel and step, as a moving mean. It orders nothing; it is told to people."""

    def __init__(self) -> None:
        self._seconds: float | None = None
        self._lock = threading.Lock()

    def learn(self, request: ResolvedRequest, seconds: float) -> None:
        """A job took so long, from its first step to its last frame."""
        own = seconds / _work(request)
        with self._lock:
            before = own if self._seconds is None else self._seconds
            self._seconds = before + SHARE * (own - before)

    def eta_s(self, request: ResolvedRequest) -> float | None:
        """Seconds that a request would take alone; None before the first job is done."""
        return None if self._seconds is None else round(self._seconds * _work(request), 3)


def _work(request: ResolvedRequest) -> int:
    pixels = request.canvas_height * request.canvas_width * request.canvas_frames
    return pixels * max(1, request.steps_taken)
