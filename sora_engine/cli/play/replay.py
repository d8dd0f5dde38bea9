"""A recording once more, in its time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import numpy as np

from sora_engine.cli.play.feed import Feed


class Replay(Feed):
    """The frames of a recording in their time. `run` in a thread; `stopped` ends it."""

    def __init__(self, steps: Iterable[Sequence[np.ndarray] | np.ndarray], fps: float) -> None:
        super().__init__()
        self.stopped = False
        self._steps, self._fps = steps, fps
        self.status.keys = "q quit"

    def run(self) -> None:
        """Make them, each when it is due and no earlier."""
        count, error = 0, None
        due = self._clock()
        try:
            for frames in self._steps:
                if self.stopped:
                    break
                time.sleep(max(0.0, due - self._clock()))
                self.put(frames, self._fps)
                due = max(due, self._clock()) + len(frames) / self._fps
                count += 1
                self.status.text = f"{self.rate():.1f} fps | step {count}"
        except BaseException as raised:  # the thread that shows it raises it
            error = raised
        self.end(error)
