"""A request on its way: what state it is in, how far it is, and its cancel switch."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sora_engine.errors import JobCancelledError
from sora_engine.request import ResolvedRequest

if TYPE_CHECKING:
    from torch import Tensor

    from sora_engine.canvas import Canvas
    from sora_engine.video import Video


class JobState(enum.StrEnum):
    QUEUED = "queued"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL_STATES = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is, by work that is finished (never by work that is merely enqueued)."""

    state: JobState
    steps_done: int
    num_steps: int
    frames_decoded: int
    num_frames: int


class Job:
    """One request on its way through the engine. Safe to use from any thread."""

    def __init__(self, request: ResolvedRequest) -> None:
        self.request = request
        self.canvas_or_none: Canvas | None = None
        self.last_ran = 0
        self.latents: Tensor | None = None
        """The finished latents, as `Video.latents`, from the end of denoising on: also where
        decoding fails or is cancelled."""
        self._timings_s: dict[str, float] = {}
        self._state = JobState.QUEUED
        self._steps_done = 0
        self._frames_decoded = 0
        self._cancel = threading.Event()
        self._done = threading.Event()
        self._video: Video | None = None
        self._error: BaseException | None = None
        self._entered = time.monotonic()
        self._callbacks: list[Callable[[Job], None]] = []
        self._lock = threading.Lock()

    # What callers use.

    @property
    def state(self) -> JobState:
        return self._state

    @property
    def progress(self) -> Progress:
        """Finished steps and decoded frames."""
        canvas = self.canvas_or_none
        num_steps = self.request.num_inference_steps if canvas is None else canvas.num_steps
        return Progress(
            state=self._state,
            steps_done=self._steps_done,
            num_steps=num_steps,
            frames_decoded=self._frames_decoded,
            num_frames=self.request.num_frames,
        )

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds spent in each stage, the one that is under way included."""
        elapsed = time.monotonic() - self._entered
        return self._timings_s if self.done() else {**self._timings_s, self._state.value: elapsed}

    def cancel(self) -> None:
        """Ask the job to stop: within one denoising step or one decoded latent frame."""
        self._cancel.set()

    def done(self) -> bool:
        """Whether the job completed, failed or was cancelled."""
        return self._done.is_set()

    def result(self, timeout_s: float | None = None) -> Video:
        """The finished video.

        Raises TimeoutError after `timeout_s` (the job goes on), JobCancelledError, or the error
        that failed the job.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the job is still {self._state} after {timeout_s} s")
        if self._error is not None:
            raise self._error
        assert self._video is not None
        return self._video

    def exception(self) -> BaseException | None:
        """The error of a job that failed or was cancelled; None otherwise."""
        return self._error

    def add_done_callback(self, callback: Callable[[Job], None]) -> None:
        """Call `callback(job)` once the job is done, at once if it is. It must not raise."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    # What the engine uses.

    @property
    def canvas(self) -> Canvas:
        assert self.canvas_or_none is not None, "the canvas is there once the job was encoded"
        return self.canvas_or_none

    @property
    def cancel_requested(self) -> bool:
        return self._cancel.is_set()

    def enter(self, state: JobState) -> None:
        """Go to the next stage, and book the time that the last one took."""
        now = time.monotonic()
        self._timings_s[self._state.value] = now - self._entered
        self._entered = now
        self._state = state

    def count_step(self) -> None:
        self._steps_done += 1

    def count_frames(self, num_frames: int) -> None:
        self._frames_decoded += num_frames

    def complete(self, video: Video) -> None:
        self._video = video
        self._finish(JobState.COMPLETED)

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._finish(
            JobState.CANCELLED if isinstance(error, JobCancelledError) else JobState.FAILED
        )

    def check_cancelled(self) -> None:
        """Raises JobCancelledError once `cancel` was called."""
        if self._cancel.is_set():
            raise JobCancelledError(f"the job was cancelled while {self._state}")

    def _finish(self, state: JobState) -> None:
        with self._lock:
            self.enter(state)
            self.canvas_or_none = None
            callbacks, self._callbacks = self._callbacks, []
            self._done.set()
        for callback in callbacks:
            callback(self)
