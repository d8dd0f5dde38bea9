"""A cascade as one job: its passes one after the other, each on the engine that has its model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from sora_engine.denoise.canvas import solver_of
from sora_engine.errors import JobCancelledError, RequestError, SoraError
from sora_engine.request import VideoRequest
from sora_engine.request.cascade import (
    Cascade,
    Stage,
    staged,
    upsampler_path,
)
from sora_engine.runtime.engine import Engine
from sora_engine.runtime.job import Job, JobState, Progress
from sora_engine.runtime.memory import MemoryPlan
from sora_engine.samplers.noise import initial_noise
from sora_engine.vae.latent_upsampler import open_latent_upsampler, upsampled
from sora_engine.video import Video

CascadeCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class CascadePlan:
    """What a cascade will take: the plan of each pass, and the bytes of the video that each is
    handed, which goes as soon as it is encoded. Weights are loaded already, and count for
    nothing."""

    passes: tuple[MemoryPlan, ...]
    handed: tuple[int, ...]

    @property
    def peak(self) -> int:
        """Bytes at most, at any time."""
        each = zip(self.passes, self.handed, strict=True)
        return max(max(plan.encode + video, plan.denoise, plan.decode) for plan, video in each)

    def __str__(self) -> str:
        each = "; ".join(f"pass {i + 1}: {plan}" for i, plan in enumerate(self.passes))
        return f"{self.peak / 2**20:.1f} MiB ({each})"


class CascadeJob:
    """A cascade on its way. Safe to use from any thread."""

    def __init__(
        self,
        cascade: Cascade,
        engines: Mapping[str | None, Engine],
        *,
        on_progress: CascadeCallback | None = None,
    ) -> None:
        self.cascade, self._engines, self._on_progress = cascade, engines, on_progress
        self.requests: list[VideoRequest] = []
        """What each pass will make, with nothing for the videos that are not there yet."""
        self._sizes: list[tuple[int, int, int]] = []
        self._rates: list[float] = []
        self._plans: list[MemoryPlan] = []
        self._steps: list[int] = []
        self._check()
        self._videos: list[Video] = []
        self._job: Job | None = None
        self._cancelled, self._done = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="sora cascade", daemon=True)
        self._thread.start()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a CascadeJob is of the process of its engines and cannot be pickled")

    @property
    def plan(self) -> CascadePlan | None:
        """The memory that it takes; None where a pass runs over ranks, whose memory is not
        planned."""
        if len(self._plans) < len(self.requests):
            return None
        handed = [0]
        for stage, (height, width, frames) in zip(self.cascade.stages, self._sizes, strict=False):
            given = frames if stage.frames == 1 else (frames - 1) * stage.frames + 1
            # The video made before, and where frames stand between its own, those of both.
            handed.append(height * width * 3 * (frames + (given if stage.frames > 1 else 0)))
        return CascadePlan(tuple(self._plans), tuple(handed))

    @property
    def progress(self) -> Progress:
        """Over all passes: steps, and the frames of the last one."""
        with self._lock:
            done, job = len(self._videos), self._job
        now = None if job is None else job.progress
        last = done == len(self.requests) - 1
        state = self.state
        finished = state is JobState.COMPLETED
        return Progress(
            state=state,
            steps_done=sum(self._steps[:done]) + (0 if now is None or finished else now.steps_done),
            num_steps=sum(self._steps),
            frames_decoded=self._sizes[-1][2]
            if finished
            else (now.frames_decoded if last and now is not None else 0),
            num_frames=self._sizes[-1][2],
        )

    @property
    def state(self) -> JobState:
        """Of the pass that is under way, until the last one is done."""
        if self._done.is_set():
            if self._error is None:
                return JobState.COMPLETED
            stopped = isinstance(self._error, JobCancelledError)
            return JobState.CANCELLED if stopped else JobState.FAILED
        job = self._job
        if job is None:
            return JobState.QUEUED
        return JobState.DENOISING if job.done() else job.state

    def cancel(self) -> None:
        """Ask it to stop, as `Job.cancel`."""
        with self._lock:
            self._cancelled.set()
            job = self._job
        if job is not None:
            job.cancel()

    def done(self) -> bool:
        """Whether it completed, failed or was cancelled."""
        return self._done.is_set()

    def result(self, timeout_s: float | None = None) -> Video:
        """The last pass's video, whose receipt has those of the passes before under `stages`.

        Raises TimeoutError after `timeout_s` (it goes on), JobCancelledError, or the error that
        failed a pass.
        """
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"the cascade is still {self.state} after {timeout_s} s")
        if self._error is not None:
            raise self._error
        return self._videos[-1]

    # What is known before work begins.

    def _check(self) -> None:
        """Resolve and plan all passes: RequestError and MemoryLimitError come before any work."""
        base, engine = self.cascade.base, self._engines[None]
        resolved = engine.resolve(base)
        self.cascade = replace(self.cascade, base=replace(base, seed=resolved.seed))
        self._add(engine, self.cascade.base)
        for number, stage in enumerate(self.cascade.stages, start=1):
            engine = self._engine(stage)
            request = staged(
                stage, self.cascade.base, None, self._sizes[-1], self._rates[-1], engine.model
            )
            try:
                self._add(engine, request)
                if stage.upsampler is not None and not stage.sigmas:
                    self._steps[-1] = int(self._steps[-1] * stage.noise_level)
            except SoraError as error:
                error.args = (f"stage {number} of the cascade: {error}", *error.args[1:])
                raise

    def _add(self, engine: Engine, request: VideoRequest) -> None:
        resolved = engine.resolve(request)
        self._sizes.append((resolved.height, resolved.width, resolved.num_frames))
        self._rates.append(resolved.fps)
        self._steps.append(resolved.steps_taken)
        if engine.plans_memory:
            self._plans.append(engine.plan(request))
        self.requests.append(request)

    def _engine(self, stage: Stage) -> Engine:
        if stage.engine not in self._engines:
            known = ", ".join(repr(name) for name in self._engines if name is not None) or "none"
            raise RequestError(
                f"a stage names the engine {stage.engine!r}; those that were given: {known}"
            )
        return self._engines[stage.engine]

    # The thread.

    def _run(self) -> None:
        try:
            self._pass(self._engines[None], [self.cascade.base])
            for i, stage in enumerate(self.cascade.stages):
                engine = self._engine(stage)
                self._pass(engine, [self._next(i, stage, engine)])
            self._videos[-1] = self._summed()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()
            self._tell(None)

    def _next(self, number: int, stage: Stage, engine: Engine) -> VideoRequest:
        """The request over the last pass's video, which it alone holds from here on."""
        made, size, fps = self._videos[-1], self._sizes[number], self._rates[number]
        request = staged(stage, self.cascade.base, made, size, fps, engine.model)
        if stage.upsampler is not None:
            request = self._from_latents(stage, request, made, engine)
        # Only its receipt is wanted; views would keep all of it.
        nothing = made.frames[:0].copy(), made.latents[:0].clone()
        self._videos[-1] = replace(made, frames=nothing[0], latents=nothing[1])
        return request

    def _pass(self, engine: Engine, request: list[VideoRequest]) -> None:
        """request: the one, which is taken from the list, so that nobody but its job holds what it
        was given. The job lets go of that once it is encoded."""
        with self._lock:
            if self._cancelled.is_set():
                raise JobCancelledError("the cascade was cancelled between two passes")
            self._job = engine.submit(request.pop(), on_progress=self._tell)
        video = self._job.result()
        with self._lock:
            self._videos.append(video)

    def _tell(self, _: Progress | None) -> None:
        if self._on_progress is not None:
            self._on_progress(self.progress)

    def _from_latents(
        self, stage: Stage, request: VideoRequest, made: Video, engine: Engine
    ) -> VideoRequest:
        """The request that sets out from the upsampled latents at the stage's noise level."""
        model = engine.loaded_model
        upsampler = open_latent_upsampler(upsampler_path(stage), model.device, model.vae_dtype)
        larger = upsampled(upsampler, made.latents.to(model.device))
        del upsampler
        clean = model.vae.normalise(larger[None])[0].cpu()
        resolved = engine.resolve(request)
        shape = resolved.latent_shape(model.grid)
        if clean.shape != shape:
            raise RequestError(
                f"the latent upsampler makes latents of {list(clean.shape)} and the stage's video "
                f"has {list(shape)}; its scale and frames must be the upsampler's"
            )
        schedule = solver_of(resolved, model).schedule
        if schedule.space != "flow":
            raise RequestError("a stage with an upsampler needs a model of a rectified flow")
        if not stage.sigmas:
            schedule = schedule.from_strength(stage.noise_level)
        noise = initial_noise(resolved.seed, tuple(clean.shape))
        start = schedule.add_noise(clean, noise, 0).to(torch.float32)
        return replace(
            request,
            latents=start,
            sigmas=schedule.sigmas[:-1],
            num_inference_steps=None,
            shift=1.0,
        )

    def _summed(self) -> Video:
        """The last video, with the receipts and times of all passes."""
        last = self._videos[-1]
        if last.receipt is None:
            return last
        stages = [v.receipt.to_dict() for v in self._videos[:-1] if v.receipt is not None]
        plan = self.plan
        promised = last.receipt.promised_bytes if plan is None else plan.peak
        times: dict[str, float] = {}
        for video in self._videos:
            for name, seconds in video.timings_s.items():
                times[name] = times.get(name, 0.0) + seconds
        receipt = replace(last.receipt, stages=stages, promised_bytes=promised)
        return replace(last, receipt=receipt, timings_s=times)


def submit_cascade(
    cascade: Cascade,
    engine: Engine,
    engines: Mapping[str, Engine] | None = None,
    *,
    on_progress: CascadeCallback | None = None,
) -> CascadeJob:
    """Begin a cascade and return it at once.

    engine: of the base pass, and of stages that name no other; engines: by name those of stages
    with a checkpoint of their own. on_progress: gets the `Progress` over all passes; it is called
    on the engines' threads.
    Raises, before any work begins, RequestError and MemoryLimitError for a pass that cannot be.
    """
    every: dict[str | None, Engine] = {None: engine}
    every.update(engines or {})
    return CascadeJob(cascade, every, on_progress=on_progress)
