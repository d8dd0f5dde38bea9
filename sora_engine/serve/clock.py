"""The time of the service: it never goes back, and no jump of the machine's clock moves it."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """Seconds since 1970, from the machine's clock at the start and steady from there on.

    A file that is kept for a week is kept for a week, whatever somebody does to the clock.
    """

    def __init__(
        self,
        last_seen: float = 0.0,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """last_seen: when the service was last alive; a clock that stands before that is taken to
        be set back."""
        self._steady = steady
        self._base = max(wall(), last_seen) - steady()

    def now(self) -> float:
        """Seconds since 1970."""
        return self._base + self._steady()
