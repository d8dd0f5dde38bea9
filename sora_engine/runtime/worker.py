"""The engine's thread: one turn of work after another, for all jobs.

A turn is a denoising step of a batch, or a latent frame through the VAE of one job, or the texts of
one job: between any two of them jobs come, are cancelled, or pass their deadlines. Encoding and
decoding of one job lie between the steps of others. One thread and one turn at a time: what two
jobs hold adds up, but never what two of them compute with.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable

import torch

from sora_engine.config import Limits
from sora_engine.errors import (
    DeviceError,
    EngineClosedError,
    EngineDeadError,
    JobCancelledError,
    JobFailedError,
    QueueFullError,
    SoraError,
)
from sora_engine.io.media_limits import MediaLimits, set_media_limits
from sora_engine.request.recipe import provenance_of
from sora_engine.runtime.executor import AnyExecutor
from sora_engine.runtime.failures import failure_of, is_device_error, is_out_of_memory
from sora_engine.runtime.hooks import Hooks
from sora_engine.runtime.job import Job, JobState
from sora_engine.runtime.memory import MemoryPlanner
from sora_engine.runtime.saving import carry_out_orders, is_due, keep_state
from sora_engine.runtime.scheduler import Scheduler
from sora_engine.video import Video

logger = logging.getLogger(__name__)

DECODE_STEPS = 4
"""Decoding a latent frame counts as this many steps of its tokens. It orders jobs, no more."""


class Worker:
    """Runs jobs until it is closed. `enqueue` and `close` are for any thread."""

    def __init__(
        self,
        executor: AnyExecutor,
        limits: Limits,
        hooks: Hooks,
        planner: MemoryPlanner | None = None,
    ) -> None:
        self.executor = executor
        self.model = executor.model
        self.limits = limits
        self.hooks = hooks
        self._planner = planner
        self._scheduler = Scheduler()
        self._pack_tokens = limits.pack_tokens
        self._queue: list[Job] = []
        self._running: list[Job] = []
        self._wake = threading.Condition()
        self._closed = False
        self._let_go = False
        self._idle = False
        self._untidy = False
        self._dead: EngineDeadError | None = None
        self._seconds_a_pixel: float | None = None
        self._ends: list[float] = []
        self._thread = threading.Thread(target=self._work, name="sora-engine", daemon=True)
        self._thread.start()

    # For any thread.

    @property
    def error(self) -> EngineDeadError | None:
        """Why it can do no more work, once it cannot."""
        return self._dead

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Those that wait, and those that are under way."""
        with self._wake:
            return (*self._queue, *self._running)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def enqueue(self, job: Job, work_steps: int) -> None:
        """Queue a job of `job.tokens` a step and this many steps, decoding included.

        Raises QueueFullError, EngineClosedError, EngineDeadError.
        """
        with self._wake:
            if self._dead is not None:
                raise self._dead
            if self._closed:
                raise EngineClosedError("the engine is closed; make a new one")
            if len(self._queue) >= self.limits.max_queued_jobs:
                raise QueueFullError(
                    f"{len(self._queue)} jobs are queued, which is Limits.max_queued_jobs; "
                    f"try again in {self._retry_after_s():.0f} s",
                    retry_after_s=self._retry_after_s(),
                )
            job.ticket = self._scheduler.enter(job.tokens * work_steps, job.options.priority)
            self._queue.append(job)
            self._wake.notify_all()

    def close(self) -> None:
        """Cancel all jobs, and end the thread."""
        self.cancel()
        self.join()
        self.executor.close()

    def cancel(self) -> None:
        """Cancel all jobs, and have the thread end."""
        with self._wake:
            self._closed = True
            for job in (*self._queue, *self._running):
                job.cancel()
            self._wake.notify_all()

    def let_go(self) -> None:
        """Nobody can ask for more: end once all jobs are done, which is now where there are none.

        Called by the garbage collector, in whichever thread that runs.
        """
        with self._wake:
            self._closed = self._let_go = True
            idle = self._idle and not (self._queue or self._running)
            self._wake.notify_all()
        if idle:  # no caller's code is on its way there, so this cannot wait for itself
            self.join()

    def tidy(self) -> None:
        """A session has ended: forget what its steps laid out, once nothing runs. Called by the
        garbage collector too."""
        with self._wake:
            self._untidy = True
            self._wake.notify_all()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the thread's end, unless this is it."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def _retry_after_s(self) -> float:
        """When a place may be free: the mean time between the last jobs' ends, or a job's ETA."""
        if len(self._ends) > 1:
            return max(1.0, (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1))
        etas = [eta for job in self._running if (eta := job.progress.eta_s) is not None]
        return max(1.0, min(etas, default=10.0))

    # The engine's thread.

    def _work(self) -> None:
        self.executor.make_current()
        set_media_limits(MediaLimits(self.limits.max_clip_pixels, self.limits.max_clip_bytes))
        while True:
            with self._wake:
                while not (self._queue or self._running or self._closed or self._untidy):
                    self._idle = True
                    self._wake.wait()
                    self._idle = False
                if self._untidy and not self._running:
                    self._untidy = False
                    self.executor.clear()
                if self._closed and not (self._queue or self._running):
                    break
            try:
                self.turn()
            except Exception as error:
                # No job's fault but the engine's own, and nobody waits for ever because of it.
                logger.exception("the engine failed")
                self._fail([*self._queue, *self._running], failure_of(error))
        if self._let_go:
            self.executor.close()

    def turn(self) -> None:
        """One turn: stop who is to be stopped, admit, encode, then a step or a latent frame."""
        for job in (*self._queue, *self._running):
            reason = job.reason_to_stop()
            if reason is not None:
                self._fail([job], reason)
        self._admit()
        self._fits(self._running, [])  # what is kept for later jobs gives way
        for job in [job for job in self._running if job.state is JobState.ENCODING]:
            self._attempt(job, self._encode)
        for job in [job for job in self._running if job.save_orders and job.canvas_or_none]:
            self._attempt(job, lambda job: carry_out_orders(job, self.executor))
        ready = [job for job in self._running if job.state is not JobState.ENCODING]
        ordered = self._scheduler.in_order(ready)
        if not ordered:
            return
        if ordered[0].state is JobState.DECODING:
            self._attempt(ordered[0], self._decode)
            return
        batch = self._scheduler.batch(
            [job for job in ordered if job.state is JobState.DENOISING],
            self._pack_limit() if len(ordered) > 1 else 0,
            tokens_of=lambda job: job.tokens,
            alone=lambda job: job.stages.alone,
            expert_of=lambda job: self.model.expert_at(job.canvas.timestep),
        )
        while len(batch) > 1 and not self._fits(self._running, batch):
            batch.pop()
        self._step(batch)
        for job in batch:
            if not job.done() and job.canvas.finished:
                self._attempt(job, self._finish_denoising)

    def _admit(self) -> None:
        """Start queued jobs: those whose turn has come, and those who would share its batch."""
        if not self._queue:
            return
        limit = self._pack_limit() if self.num_queued + self.num_running > 1 else 0
        with self._wake:
            tokens = 0
            for job in self._scheduler.in_order((*self._queue, *self._running)):
                joins = not tokens or self._scheduler.may_join(job.tokens, tokens, limit)
                if job.state is JobState.DECODING or not joins:
                    continue
                if job.state is JobState.QUEUED:
                    if self._is_full(job):
                        return
                    if self._running and not self._fits([*self._running, job], []):
                        return  # it waits for memory, and those behind it with it
                    self._queue.remove(job)
                    self._running.append(job)
                    job.preparing = job.stages.preparing(job, self.executor)
                    job.enter(JobState.ENCODING)
                tokens += job.tokens

    def _is_full(self, job: Job) -> bool:
        """Whether a job must wait for a place. Sessions' steps do not: `Limits.max_sessions` bounds
        them, and a player does not wait for whole videos."""
        places = [other for other in self._running if not other.stages.brief]
        return not job.stages.brief and len(places) >= self.limits.max_running_jobs

    def _pack_limit(self) -> int:
        if self._pack_tokens is None:
            self._pack_tokens = self.executor.pack_limit(self.limits.max_batch_tokens)
        return min(self._pack_tokens, self.limits.max_batch_tokens)

    def _fits(self, held: list[Job], batch: list[Job]) -> bool:
        """As `MemoryPlanner.fits`, of the jobs that were planned."""
        if self._planner is None:
            return True
        plans = [job.plan for job in held if job.plan is not None]
        return self._planner.fits(plans, [job.plan for job in batch if job.plan is not None])

    def _encode(self, job: Job) -> None:
        assert job.preparing is not None
        canvas = None
        try:
            next(job.preparing)
        except StopIteration as prepared:
            canvas = prepared.value
        if job.provenance is None:  # its clips have just been read, and may be gone at the end
            job.provenance = provenance_of(job.request, self.model)
        if canvas is None:
            return
        job.preparing = None
        if self._seconds_a_pixel is not None:
            job.seconds_a_frame = self._seconds_a_pixel * job.request.height * job.request.width
        job.begin(canvas)
        for cut in job.canvas.cut_prompts:
            logger.warning("%s", cut)
        self._attempt(job, Job.tell_progress)
        if job.done():
            return
        if job.canvas.finished:  # it was saved after its last step
            self._finish_denoising(job)

    def _step(self, jobs: list[Job]) -> None:
        """One step of a batch. Where that fails, each job takes it alone: the fault is one's own.

        Out of memory, a job goes on in ever smaller batches of its own windows and branches.
        """
        limit = min(job.batch_tokens for job in jobs)
        canvases = [job.canvas for job in jobs]
        if any(canvas.num_windows > 1 for canvas in canvases):
            # More windows at a time than saturate the device cost memory and save no time: a long
            # video takes no more of it than a short one.
            limit = min(limit, self._pack_limit())
        started = time.monotonic()
        try:
            failures = self.executor.step(canvases, limit)
        except Exception as error:
            if is_device_error(error):
                self._device_failed(error)
            elif len(jobs) > 1:
                if is_out_of_memory(error):
                    self._pack_tokens = max(1, self._pack_limit() // 2)
                    logger.warning("out of memory: packing %d tokens from here", self._pack_tokens)
                    self._free_memory()
                for job in jobs:
                    self._step([job])
            elif is_out_of_memory(error) and limit > 1:
                jobs[0].batch_tokens = min(limit, jobs[0].tokens) // 2 or 1
                self._free_memory()
                self._step(jobs)
            else:
                self._fail(jobs, failure_of(error))
            return
        all_tokens = sum(job.tokens for job in jobs)
        self._scheduler_serve(all_tokens)
        seconds_a_token = (time.monotonic() - started) / all_tokens
        tokens = sum(min(job.tokens, limit) for job in jobs)
        for i, job in enumerate(jobs):
            job.most_in_company = max(job.most_in_company, len(jobs))
            job.largest_batch_tokens = max(job.largest_batch_tokens, min(tokens, limit))
            if i in failures:
                self._failed(job, failures[i])
            else:
                job.unkept_s += seconds_a_token * job.tokens
                job.count_step()
                self._attempt(job, self._after_step)

    def _after_step(self, job: Job) -> None:
        job.preview = self.hooks.pass_preview(job.canvas.preview, job.request)
        options = job.options
        if options.save_to is not None and is_due(job):
            keep_state(job, options.save_to, self.executor)
        job.tell_progress()

    def _finish_denoising(self, job: Job) -> None:
        job.enter(JobState.DECODING)
        job.canvas.keep_latents_alone()
        if not job.stages.brief:
            self.executor.clear()  # layouts hold the texts' keys
        job.decoding = job.stages.decoding(job, self.executor, self.hooks)

    def _decode(self, job: Job) -> None:
        assert job.decoding is not None
        started = time.monotonic()
        made = next(job.decoding)
        # The last turn's too: what a job was entered with and is never served would stay, and slow
        # the virtual time down for all that come, the more the longer the engine lives.
        self._scheduler_serve(
            DECODE_STEPS * job.tokens / max(1, -(-job.request.num_frames // self.model.grid.time))
        )
        if isinstance(made, Video):
            self._retire(job)
            job.complete(made)
        elif made:
            pixels = made * job.request.height * job.request.width
            self._seconds_a_pixel = (time.monotonic() - started) / pixels

    # When things go wrong.

    def _attempt(self, job: Job, stage: Callable[[Job], None]) -> None:
        """Run a stage of one job; an error in it is the job's, not the engine's."""
        try:
            stage(job)
        except Exception as error:
            if is_device_error(error):
                self._device_failed(error)
            else:
                self._failed(job, error)

    def _failed(self, job: Job, error: Exception) -> None:
        if is_out_of_memory(error):
            self._free_memory()
        self._fail([job], failure_of(error))

    def _device_failed(self, error: Exception) -> None:
        """Those in flight fail; then the device is asked whether it still works."""
        logger.exception("the device failed")
        failure = DeviceError(f"the device {self.model.device} failed: {error}")
        failure.__cause__ = error
        self._fail(list(self._running), failure)
        try:
            self._free_memory()
            probe = torch.ones(64, 64, dtype=torch.float32, device=self.model.device)
            works = float((probe @ probe).sum()) == 64.0**3
        except Exception:
            works = False
        if not works:
            dead = EngineDeadError(
                f"the device {self.model.device} no longer answers ({error}): this engine takes "
                "no more requests; start a new process"
            )
            with self._wake:
                self._dead = dead
            self._fail(list(self._queue), dead)

    def _fail(self, jobs: list[Job], error: SoraError) -> None:
        for job in jobs:
            with self._wake:
                self._scheduler.leave(job.ticket)
            self._retire(job)
            if not isinstance(error, JobCancelledError):
                # An error and its traceback hold the work's tensors as long as a log record is
                # kept: only those of unexpected errors are in one.
                cause = error.__cause__ if isinstance(error, JobFailedError) else None
                logger.warning("a job failed: %s", str(error), exc_info=cause)
            job.fail(error)

    def _retire(self, job: Job) -> None:
        if job.canvas_or_none is not None:
            self.executor.forget(job.canvas_or_none)
        job.adapters = ()
        with self._wake:
            if job in self._running:
                self._running.remove(job)
                self._ends = [*self._ends[-15:], time.monotonic()]
            if job in self._queue:
                self._queue.remove(job)
        if not (self._running or job.stages.brief):
            self.executor.clear()

    def _scheduler_serve(self, tokens: float) -> None:
        with self._wake:
            self._scheduler.serve(tokens)

    def _free_memory(self) -> None:
        self.executor.clear()
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
