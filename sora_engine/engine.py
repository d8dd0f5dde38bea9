"""The engine: requests in, videos out. One thread does all model work; callers wait for jobs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from os import PathLike
from types import TracebackType
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from sora_engine.config import Limits
from sora_engine.denoise import decode, denoise_step, prepare
from sora_engine.errors import (
    EngineClosedError,
    JobCancelledError,
    JobFailedError,
    QueueFullError,
    SoraError,
)
from sora_engine.io.provenance import Provenance
from sora_engine.job import Job, JobState
from sora_engine.models.video_model import VideoModel, load_video_model
from sora_engine.packing import Packer
from sora_engine.request import ResolvedRequest, VideoRequest, resolve_request
from sora_engine.samplers import SOLVERS
from sora_engine.scheduler import Scheduler
from sora_engine.version import version
from sora_engine.video import Video

logger = logging.getLogger(__name__)

FrameCallback = Callable[[np.ndarray], None]
LatentsCallback = Callable[[torch.Tensor], None]


class Callbacks(NamedTuple):
    """Whom a job tells of what it has made."""

    on_frames: FrameCallback | None = None
    on_latents: LatentsCallback | None = None


class Engine:
    """Makes videos with one model. A context manager: leaving it cancels what is still running.

    Safe to use from several threads.
    """

    def __init__(self, model: VideoModel, *, limits: Limits | None = None) -> None:
        self.model = model
        self.limits = limits or Limits()
        self._scheduler = Scheduler(self.limits.max_batch_tokens)
        self._packer = Packer(model.grid.patch, model.device)
        self._queue: list[Job] = []
        self._running: list[Job] = []
        self._callbacks: dict[Job, Callbacks] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="sora-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_pretrained(
        cls,
        model: str | PathLike[str] | Sequence[str | PathLike[str]],
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        vae_backend: str = "auto",
        attention_backend: str = "auto",
        components: str | PathLike[str] | None = None,
        limits: Limits | None = None,
    ) -> Engine:
        """Load a checkpoint.

        Args:
            model: a folder in diffusers' layout; a `.safetensors` file under Wan's own names, or
                two of them, the expert for high noise first; or `"sprites"`, the bundled
                checkpoint.
            device: `"auto"` takes the GPU where there is one.
            dtype: of the transformer; `"auto"` is bfloat16 on a GPU and float32 on a CPU.
            vae_backend: `"torch"`, `"onnx"` (exported on loading, into a cache) or `"tensorrt"`
                (engines that `sora export-vae` has built); `"auto"` is torch.
            attention_backend: a backend of `sora_kernels.packed_attention`.
            components: folder with VAE, text encoder and tokenizer for a single-file checkpoint.

        Raises CheckpointError for a checkpoint that cannot be used, BackendError for a device or a
        backend that is not there.
        """
        loaded = load_video_model(
            model,
            device=device,
            dtype=dtype,
            vae_backend=vae_backend,
            attention_backend=attention_backend,
            components=components,
        )
        return cls(loaded, limits=limits)

    @overload
    def generate(self, request: VideoRequest) -> Video: ...

    @overload
    def generate(self, request: Sequence[VideoRequest]) -> list[Video]: ...

    def generate(self, request: VideoRequest | Sequence[VideoRequest]) -> Video | list[Video]:
        """Make a video, or several in company, and wait for them.

        All requests are checked before any work starts. Where one of several fails, the others are
        cancelled and its error is raised.
        """
        single = isinstance(request, VideoRequest)
        requests = [request] if isinstance(request, VideoRequest) else list(request)
        resolved = [self.resolve(r) for r in requests]
        jobs: list[Job] = []
        try:
            jobs += [self._enqueue(r, Callbacks()) for r in resolved]
            videos = [job.result() for job in jobs]
        except BaseException:  # KeyboardInterrupt too: nothing is left running
            for job in jobs:
                job.cancel()
            raise
        return videos[0] if single else videos

    def submit(
        self,
        request: VideoRequest,
        *,
        on_frames: FrameCallback | None = None,
        on_latents: LatentsCallback | None = None,
    ) -> Job:
        """Queue a request and return its job at once.

        `on_latents` gets the finished latents, as `Video.latents`, before they are decoded, and
        `on_frames` uint8 `[n, height, width, 3]` as frames come. Both are called on the engine's
        thread; an exception in one fails the job.

        Raises RequestError for a bad value, QueueFullError, EngineClosedError.
        """
        return self._enqueue(self.resolve(request), Callbacks(on_frames, on_latents))

    def resolve(self, request: VideoRequest) -> ResolvedRequest:
        """The request with the checkpoint's defaults, checked; raises RequestError."""
        return resolve_request(
            request, self.model.defaults, self.model.grid, self.limits, solvers=SOLVERS
        )

    @property
    def num_queued(self) -> int:
        """Jobs that wait to be started."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Jobs that were started and are not done."""
        return len(self._running)

    def close(self) -> None:
        """Cancel what is queued or running, and stop. Further requests raise EngineClosedError."""
        with self._wake:
            self._closed = True
            for job in (*self._queue, *self._running):
                job.cancel()
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _enqueue(self, request: ResolvedRequest, callbacks: Callbacks) -> Job:
        job = Job(request)
        with self._wake:
            if self._closed:
                raise EngineClosedError("the engine is closed; make a new one")
            if len(self._queue) >= self.limits.max_queued_jobs:
                raise QueueFullError(
                    f"{len(self._queue)} jobs are queued, which is Limits.max_queued_jobs",
                    retry_after_s=10.0,
                )
            self._callbacks[job] = callbacks
            self._queue.append(job)
            self._wake.notify_all()
        return job

    # The engine's thread.

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._queue or self._running or self._closed):
                    self._wake.wait()
                if self._closed and not (self._queue or self._running):
                    return
                admitted = self._queue[: self.limits.max_running_jobs - len(self._running)]
                del self._queue[: len(admitted)]
                self._running += admitted
            for job in admitted:
                self._attempt([job], self._prepare)
            self._attempt_cancelled()
            chosen = self._scheduler.next_step(
                self._running, expert_of=self._expert_of, tokens_of=self._tokens_of
            )
            if chosen:
                self._attempt(chosen, self._step)
            for job in [job for job in chosen if not job.done() and job.canvas.finished]:
                self._attempt([job], self._decode)

    def _prepare(self, jobs: list[Job]) -> None:
        (job,) = jobs
        job.check_cancelled()
        job.enter(JobState.ENCODING)
        job.canvas_or_none = prepare(job.request, self.model)
        job.enter(JobState.DENOISING)

    def _step(self, jobs: list[Job]) -> None:
        denoise_step(jobs, self.model, self._packer, self.limits.max_batch_tokens)

    def _decode(self, jobs: list[Job]) -> None:
        (job,) = jobs
        job.enter(JobState.DECODING)
        # Kept on the job from here on: a decode that fails does not lose them.
        latents = self.model.vae.denormalise(job.canvas.latents[None])[0].float().cpu()
        job.latents = latents
        on_frames, on_latents = self._callbacks[job]
        if on_latents is not None:
            on_latents(latents)
        decoded = []
        for chunk in decode(job.canvas.latents, self.model, wraps=job.canvas.wraps):
            job.check_cancelled()
            frames = chunk.numpy()
            if on_frames is not None:
                on_frames(frames)
            decoded.append(frames)
            job.count_frames(len(frames))
        video = Video(
            frames=np.concatenate(decoded),
            latents=latents,
            fps=job.request.fps,
            seed=job.request.seed,
            timings_s=job.timings_s,
            provenance=provenance_of(job.request, self.model),
        )
        self._retire(job)
        job.complete(video)

    def _attempt(self, jobs: list[Job], stage: Callable[[list[Job]], None]) -> None:
        """Run a stage of some jobs; an error in it is theirs, not the engine's."""
        try:
            stage(jobs)
        except SoraError as error:
            self._fail(jobs, error)
        except Exception as error:
            logger.exception("a job failed")
            failure = JobFailedError(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            self._fail(jobs, failure)

    def _attempt_cancelled(self) -> None:
        for job in [job for job in self._running if job.cancel_requested]:
            self._fail([job], JobCancelledError(f"the job was cancelled while {job.state}"))

    def _fail(self, jobs: list[Job], error: SoraError) -> None:
        for job in jobs:
            self._retire(job)
            job.fail(error)

    def _retire(self, job: Job) -> None:
        with self._wake:
            if job in self._running:
                self._running.remove(job)
            self._callbacks.pop(job, None)
        if not self._running:
            self._packer.clear()

    def _expert_of(self, job: Job) -> int:
        return self.model.expert_at(job.canvas.timestep)

    def _tokens_of(self, job: Job) -> int:
        return job.canvas.num_tokens


def provenance_of(request: ResolvedRequest, model: VideoModel) -> Provenance:
    """What made a video, for its file's metadata."""
    settings: dict[str, Any] = {
        name: value
        for name, value in asdict_shallow(request).items()
        if isinstance(value, (bool, int, float, str)) and name not in ("prompt", "seed")
    }
    if request.sigmas is not None:
        settings["sigmas"] = list(request.sigmas)
    if request.shots:
        settings["shots"] = [asdict(shot) for shot in request.shots]
    return Provenance(
        prompt=request.prompt,
        seed=request.seed,
        model=model.name,
        version=version(),
        settings=settings,
    )


def asdict_shallow(request: ResolvedRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__}
