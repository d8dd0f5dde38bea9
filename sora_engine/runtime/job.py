"""A request on its way: what state it is in, how far it is, and its cancel switch."""

from __future__ import annotations

import enum
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeAlias

from sora_engine.errors import DeadlineExceededError, JobCancelledError, JobFailedError
from sora_engine.io.provenance import Provenance
from sora_engine.request import ResolvedRequest
from sora_engine.runtime.executor import AnyExecutor, ServedCanvas
from sora_engine.runtime.hooks import Hooks
from sora_engine.runtime.lifetime import Origin
from sora_engine.runtime.memory import MemoryPlan
from sora_engine.runtime.savepoint import Savepoint
from sora_engine.runtime.scheduler import Ticket
from sora_engine.video import Video

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

logger = logging.getLogger(__name__)


class JobState(enum.StrEnum):
    """Where a job is. It goes through the first five in order; any but the last three may end in
    FAILED or CANCELLED.

    QUEUED: not begun. ENCODING: prompts and known clips. DENOISING: steps. DECODING: latents to
    frames. COMPLETED: `Job.result` gives the video. FAILED, CANCELLED: it raises.
    """

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
    """How far a job is, by work that is finished (never by work that is merely enqueued).

    eta_s: seconds to the end at the pace of this stage so far; None before its first step.
    """

    state: JobState
    steps_done: int
    num_steps: int
    frames_decoded: int
    num_frames: int
    eta_s: float | None = field(default=None, compare=False)


FramesCallback = Callable[["np.ndarray"], None]
LatentsCallback = Callable[["Tensor"], None]
ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What a caller says of a job beside its request: `Engine.submit` tells what each means."""

    priority: int = 0
    deadline_s: float | None = None
    on_frames: FramesCallback | None = None
    on_latents: LatentsCallback | None = None
    on_progress: ProgressCallback | None = None
    save_to: Path | None = None
    save_every: int = 1
    save_every_s: float | None = None
    save_last_s: float = 0.0
    keep_frames: bool = True


class SaveOrder:
    """A caller waits for its job's state in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: BaseException | None = None
        self.over = threading.Event()


StageResult: TypeAlias = "int | Video"
"""What a turn of decoding made: so many frames, or at the end the video."""


class Stages(Protocol):
    """How a job begins and ends. Between the two are its steps, which are like any other job's."""

    @property
    def brief(self) -> bool:
        """Whether it is one of many small ones that come one after the other: it waits for no
        place among the jobs that run, and what its steps laid out is kept for the next one's."""
        ...

    @property
    def alone(self) -> bool:
        """Whether its steps are packed with nobody."""
        ...

    def preparing(self, job: Job, executor: AnyExecutor) -> Generator[None, None, ServedCanvas]:
        """As `executor.Executor.preparing`."""
        ...

    def decoding(self, job: Job, executor: AnyExecutor, hooks: Hooks) -> Iterator[StageResult]:
        """From a canvas that is denoised to the video, which comes last."""
        ...


class Job:
    """One request on its way through the engine. Safe to use from any thread."""

    def __init__(
        self, request: ResolvedRequest, options: JobOptions | None, stages: Stages
    ) -> None:
        self.request = request
        self.stages = stages
        self.options = options or JobOptions()
        save_to = self.options.save_to
        self.kept_in = None if save_to is None else os.path.realpath(save_to)
        """The file of `save_to`, by the one name that all its names lead to."""
        self.latents: Tensor | None = None
        """The finished latents, as `Video.latents`, from the end of denoising on: also where
        decoding fails or is cancelled. A service that checks frames withholds them."""
        self.preview: np.ndarray | None = None
        """What the last step makes of the video: uint8 `[latent_frames, latent_height,
        latent_width, 3]`, for checkpoints that bring a projection to colours; in pixels where a
        tiny decoder was given."""
        self.save_error: Exception | None = None
        """Why `save_to` could not be written the last time; the job goes on without it."""
        # What the engine's thread keeps here.
        self._origin = Origin()
        self.canvas_or_none: ServedCanvas | None = None
        self.preparing: Generator[None, None, ServedCanvas] | None = None
        self.saved: Savepoint | None = None
        self.decoding: Iterator[StageResult] | None = None
        self.adapters: Sequence[object] = ()  # they are loaded for as long as it is not done
        self.tokens = 0
        self.planned_steps = request.steps_taken  # the engine counts chained windows in
        self.batch_tokens = 1
        self.plan: MemoryPlan | None = None
        self.seconds_a_frame: float | None = None
        self.most_in_company = 0
        self.largest_batch_tokens = 0
        self.resumed_at: int | None = None
        self.provenance: Provenance | None = None  # from encoding on
        self.save_orders: list[SaveOrder] = []
        self.kept_at = time.monotonic()  # when `save_to` was last written, or would have been first
        self.unkept_s = 0.0  # its share of the time of its steps since then
        self._ticket: Ticket | None = None

        self._cut_prompts: tuple[str, ...] = ()
        self._timings_s: dict[str, float] = {}
        self._state = JobState.QUEUED
        self._steps_done = 0
        self._first_step = 0
        self._frames_decoded = 0
        self._cancel = threading.Event()
        self._done = threading.Event()
        self._video: Video | None = None
        self._error: BaseException | None = None
        self._submitted = self._entered = time.monotonic()
        self._callbacks: list[Callable[[Job], None]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Job is of the process of its engine and cannot be copied or pickled; the Video that "
            "`result` returns can"
        )

    # What callers use.

    @property
    def state(self) -> JobState:
        return self._state

    @property
    def cut_prompts(self) -> tuple[str, ...]:
        """A line for each text that is longer than the text encoder reads, once it is encoded."""
        return self._cut_prompts

    @property
    def progress(self) -> Progress:
        """Finished steps and decoded frames, and how long the rest will take."""
        canvas = self.canvas_or_none
        num_steps = self.planned_steps if canvas is None else canvas.num_steps
        return Progress(
            state=self._state,
            steps_done=self._steps_done,
            num_steps=num_steps,
            frames_decoded=self._frames_decoded,
            num_frames=self.request.num_frames,
            eta_s=self._eta_s(num_steps),
        )

    def _eta_s(self, num_steps: int) -> float | None:
        elapsed = time.monotonic() - self._entered
        frames = self.request.num_frames
        if self.done():
            return 0.0
        if self._state is JobState.DECODING and self._frames_decoded:
            return elapsed / self._frames_decoded * (frames - self._frames_decoded)
        steps = self._steps_done - self._first_step
        if self._state is JobState.DENOISING and steps > 0:
            decoding = (self.seconds_a_frame or 0.0) * frames
            return elapsed / steps * (num_steps - self._steps_done) + decoding
        return None

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds spent in each stage, the one that is under way included."""
        elapsed = time.monotonic() - self._entered
        return self._timings_s if self.done() else {**self._timings_s, self._state.value: elapsed}

    def cancel(self) -> None:
        """Ask the job to stop: within one denoising step or one latent frame of the VAE."""
        self._cancel.set()

    def save(self, path: str | PathLike[str], timeout_s: float | None = None) -> Path:
        """Write the job's state after the step that is under way; `Engine.resume` takes it up.

        A job that is still queued or encoding is saved once it denoises; the job goes on. Raises
        TimeoutError, JobFailedError for a job that ended before, OSError.
        """
        self._origin.check()
        order = SaveOrder(Path(path))
        with self._lock:
            if self._done.is_set():
                raise JobFailedError(f"the job is {self._state}: there is nothing to save")
            self.save_orders.append(order)
        if not order.over.wait(timeout_s):
            raise TimeoutError(f"the job was not saved within {timeout_s} s; it is {self._state}")
        if order.error is not None:
            raise order.error
        return order.path

    def done(self) -> bool:
        """Whether the job completed, failed or was cancelled."""
        return self._done.is_set()

    def result(self, timeout_s: float | None = None) -> Video:
        """The finished video.

        Raises TimeoutError after `timeout_s` (the job goes on), JobCancelledError, or the error
        that failed the job; EngineForkedError in a process that was forked before it was done.
        """
        if not self._done.is_set():
            self._origin.check()
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
        """Call `callback(job)` once the job is done, at once if it is. What it raises is logged."""
        with self._lock:
            if not self._done.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    # What the engine uses.

    @property
    def canvas(self) -> ServedCanvas:
        assert self.canvas_or_none is not None, "the canvas is there once the job was encoded"
        return self.canvas_or_none

    @property
    def ticket(self) -> Ticket:
        assert self._ticket is not None, "the scheduler gives a ticket on submission"
        return self._ticket

    @ticket.setter
    def ticket(self, ticket: Ticket) -> None:
        self._ticket = ticket

    def enter(self, state: JobState) -> None:
        """Go to the next stage, and book the time that the last one took."""
        now = time.monotonic()
        self._timings_s[self._state.value] = now - self._entered
        self._entered = now
        self._state = state

    def begin(self, canvas: ServedCanvas) -> None:
        """Denoising begins: at the first step, or where a saved job was left. What was given as
        frames is in the canvas by now, and nobody reads it again."""
        self.request = replace(self.request, clips=(), init=None)
        self._steps_done = self._first_step = canvas.step
        self.kept_at = time.monotonic()
        self.canvas_or_none = canvas
        self._cut_prompts = canvas.cut_prompts
        self.enter(JobState.DENOISING)

    def count_step(self) -> None:
        self._steps_done += 1

    def count_frames(self, num_frames: int) -> None:
        self._frames_decoded += num_frames

    def tell_progress(self) -> None:
        """Call the caller's `on_progress`; what it raises is the job's failure."""
        if self.options.on_progress is not None:
            self.options.on_progress(self.progress)

    def complete(self, video: Video) -> None:
        self._video = video
        self._finish(JobState.COMPLETED)

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._finish(
            JobState.CANCELLED if isinstance(error, JobCancelledError) else JobState.FAILED
        )

    def reason_to_stop(self) -> JobCancelledError | DeadlineExceededError | None:
        """The error to end the job with, once it was cancelled or its deadline has passed."""
        if self._cancel.is_set():
            return JobCancelledError(f"the job was cancelled while {self._state}")
        deadline_s = self.options.deadline_s
        if deadline_s is not None and time.monotonic() - self._submitted > deadline_s:
            return DeadlineExceededError(
                f"the job was {self._state} when its deadline of {deadline_s} s passed"
            )
        return None

    def _finish(self, state: JobState) -> None:
        with self._lock:
            self.enter(state)
            # A caller may keep the job: what the work held goes now.
            self.canvas_or_none = self.preparing = self.decoding = None
            self.options = JobOptions(priority=self.options.priority)
            callbacks, self._callbacks = self._callbacks, []
            orders, self.save_orders = self.save_orders, []
            self._done.set()
        for order in orders:
            order.error = JobFailedError(f"the job was {state} before it could be saved")
            order.over.set()
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                logger.exception("a done callback raised")
