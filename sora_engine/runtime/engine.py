"""The engine: requests in, videos out. One thread does all model work; callers wait for jobs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

import numpy as np
import torch

from sora_engine.config import Limits, ParallelConfig
from sora_engine.distributed.executor import settle_layout, start_replicas
from sora_engine.errors import EngineDeadError, LayoutError, RequestError
from sora_engine.models.device import own_device
from sora_engine.models.loading import USABLE, load_video_model
from sora_engine.models.registry import Components, ModelPath
from sora_engine.models.video_model import VideoModel
from sora_engine.request import ResolvedRequest, SessionRequest, VideoRequest
from sora_engine.request.checks import shown
from sora_engine.request.lora import Lora
from sora_engine.runtime.executor import AnyExecutor, LocalExecutor, ServedModel
from sora_engine.runtime.hooks import Hooks
from sora_engine.runtime.intake import Intake
from sora_engine.runtime.job import (
    FramesCallback,
    Job,
    JobOptions,
    LatentsCallback,
    ProgressCallback,
)
from sora_engine.runtime.lifetime import Origin, stop_when_dropped
from sora_engine.runtime.memory import MemoryPlan, MemoryPlanner, default_peak
from sora_engine.runtime.options import check_types, path_of
from sora_engine.runtime.recall import Memory
from sora_engine.runtime.savepoint import load_state
from sora_engine.runtime.session import Session
from sora_engine.runtime.sessions import Sessions
from sora_engine.runtime.warming import compile_kernels
from sora_engine.runtime.worker import Worker
from sora_engine.vae.free_memory import free_bytes
from sora_engine.video import Video


class Engine:
    """Makes videos with one model. A context manager: leaving it cancels what is still running.

    Safe to use from several threads, and in the process that made it. One that nobody holds any
    more finishes its jobs, and then its thread and its memory go.
    """

    @own_device()
    def __init__(
        self,
        model: VideoModel | None = None,
        *,
        limits: Limits | None = None,
        hooks: Hooks | None = None,
        replicas: Sequence[AnyExecutor] = (),
    ) -> None:
        """model: loaded in this process. replicas: what does the work where the model is elsewhere:
        each serves its own jobs."""
        check_types(limits, hooks)
        self._origin = Origin()
        self.limits = limits or Limits()
        self.hooks = hooks or Hooks()
        # What ranks need is not rehearsed: their model is not here.
        self._planner: MemoryPlanner | None = None
        if model is not None:
            model.vae.limit(self.limits.vae_memory_bytes)
            model.prompt_encoder.kept.bound(self.limits.text_cache_bytes)
            limit = self.limits.memory_bytes
            if limit is None:
                limit = int(USABLE * free_bytes(model.device))
            self._planner = MemoryPlanner(
                model, self.limits.max_batch_tokens, limit, self.limits.pack_tokens
            )
            if model.adapters is not None:
                model.adapters.tell(self._planner.reserve)
            replicas = [LocalExecutor(model)]
            if model.device.type == "cuda":
                compile_kernels(model, self._planner, self.limits)
        if not replicas:
            raise ValueError("an engine takes a model, or replicas that have one")
        self.model: ServedModel = replicas[0].model if model is None else model
        self._workers = [
            Worker(replica, self.limits, self.hooks, self._planner) for replica in replicas
        ]
        self._intake = Intake(
            self.model, self.limits, self.hooks, self._planner, self._workers, self._origin
        )
        self._sessions = Sessions(self._intake)
        stop_when_dropped(self, self._workers)

    @classmethod
    def from_pretrained(
        cls,
        model: ModelPath,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        vae_backend: str = "auto",
        vae_dtype: str | torch.dtype = "auto",
        cuda_graphs: str = "auto",
        attention_backend: str = "auto",
        exact: bool = False,
        components: Components | None = None,
        offload: str = "auto",
        loras: Sequence[Lora] = (),
        parallel: ParallelConfig | Literal["auto"] | None = None,
        limits: Limits | None = None,
        hooks: Hooks | None = None,
    ) -> Engine:
        """Load a checkpoint.

        Args:
            model: a folder in diffusers' or ComfyUI's layout; a `.safetensors` or `.gguf` file with
                a transformer under the names that it was published with, or two of them, the
                expert for high noise first; or `"sprites"`, the bundled checkpoint.
            device: `"auto"` takes the GPU where there is one.
            dtype: of the transformer; `"auto"` is bfloat16 on a GPU. On a CPU it is bfloat16 where
                products are about twice as fast in it and the weights are in it or quantised, else
                float32. `"as-stored"` keeps quantised weights so in memory; `"int8"` quantises what
                layers read, too, on a CPU (`"as-stored:bfloat16"` names the dtype of the rest).
            vae_backend: `"torch"`, `"onnx"` (exported on loading, into a cache), `"tensorrt"`
                (engines that `sora export-vae` has built) or `"tiny"` (TAEHV, an approximation);
                `"auto"` is torch.
            vae_dtype: of the autoencoder; `"auto"` is `dtype`, on a CPU where convolutions are
                about twice as fast in bfloat16, else float32 there.
            cuda_graphs: `"on"`, `"off"` or `"auto"`: whether torch's VAE replays its steady step
                as a CUDA graph, and the transformer its small passes, where its weights stay on one
                GPU. `"auto"` does so on a GPU, and logs where it cannot; `"on"` replays passes of
                any size, and raises where it cannot.
            attention_backend: a backend of `sora_kernels.packed_attention`.
            exact: results whose bits do not depend on what is packed beside them: linear layers
                have fixed tiles then, and are slower.
            components: what a transformer file lacks: a folder in diffusers' or ComfyUI's layout,
                or a mapping from `vae`, `text_encoder`, `tokenizer`, `image_encoder`,
                `image_processor`, `scheduler` and `transformer_2` to a file or a folder of each.
                Of every model `tiny_vae`, for previews and for `vae_backend="tiny"`.
            offload: which weights wait in host memory and cross when they are needed: `"none"`;
                `"text"`, the text and image encoders' layers; `"blocks"`, the transformers' too.
                `"auto"`, on a GPU: the first of these with which a request of the checkpoint's
                default size fits. The results are the same.
            loras: adapters that are merged into the transformers' weights as these are read; all
                requests have them, and they take no memory of their own.
            parallel: over how many ranks; the engine starts and owns them, on this machine.
                `"auto"`: over all GPUs, as the planner would.
            limits: bounds on requests and on what is done at a time.
            hooks: what a service checks of requests and frames.

        Raises CheckpointError for a checkpoint or an adapter that cannot be used, BackendError for
        a device or a backend that is not there, LayoutError for a `parallel` that cannot be,
        RankFailedError where a rank does not start.
        """
        check_types(limits, hooks)
        layout = settle_layout(parallel, model, components, device)
        if layout is not None:
            if offload not in ("auto", "none"):
                raise LayoutError(
                    f"offload={offload!r} is of one rank; over several, "
                    "ParallelConfig.shard_weights shares the weights out"
                )
            replicas = start_replicas(
                model,
                layout,
                device=device,
                dtype=dtype,
                vae_backend=vae_backend,
                vae_dtype=vae_dtype,
                cuda_graphs=cuda_graphs,
                attention_backend=attention_backend,
                exact=exact,
                components=components,
                loras=loras,
            )
            return cls(limits=limits, hooks=hooks, replicas=replicas)
        loaded = load_video_model(
            model,
            device=device,
            dtype=dtype,
            vae_backend=vae_backend,
            vae_dtype=vae_dtype,
            cuda_graphs=cuda_graphs,
            attention_backend=attention_backend,
            exact=exact,
            components=components,
            offload=offload,
            loras=loras,
            needed=lambda hollow: default_peak(hollow, limits or Limits()),
        )
        return cls(loaded, limits=limits, hooks=hooks)

    @overload
    def generate(self, request: VideoRequest) -> Video: ...

    @overload
    def generate(self, request: Sequence[VideoRequest]) -> list[Video]: ...

    def generate(self, request: VideoRequest | Sequence[VideoRequest]) -> Video | list[Video]:
        """Make a video, or several in company, and wait for them.

        request: one, which gives a `Video`, or several, which give a list in their order.

        All requests are checked before any work starts. Where one of several fails, the others are
        cancelled and its error is raised. Raises RequestError for what the checkpoint cannot make,
        MemoryLimitError for what does not fit, and what `submit` and `Job.result` raise.
        """
        single = isinstance(request, VideoRequest)
        if not single and (isinstance(request, str) or not isinstance(request, Iterable)):
            raise RequestError(
                f"a request must be a VideoRequest, or several of them, got {shown(request)}"
            )
        requests = [request] if isinstance(request, VideoRequest) else list(request)
        taken = [self._intake.taken(r) for r in requests]
        jobs: list[Job] = []
        try:
            jobs += [self._intake.enqueue(r, JobOptions(), held) for r, held in taken]
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
        priority: int = 0,
        deadline_s: float | None = None,
        on_frames: FramesCallback | None = None,
        on_latents: LatentsCallback | None = None,
        on_progress: ProgressCallback | None = None,
        save_to: str | PathLike[str] | None = None,
        save_every: int = 1,
        save_every_s: float | None = None,
        save_last_s: float = 0.0,
        keep_frames: bool = True,
    ) -> Job:
        """Queue a request and return its job at once.

        Args:
            priority: from -8 to 8; one more is twice the share of the machine.
            deadline_s: seconds from now after which the job fails with DeadlineExceededError. It
                bounds the job and does not hurry it.
            on_frames: gets uint8 `[n, height, width, 3]` as frames come.
            on_latents: gets the finished latents, as `Video.latents`, before they are decoded.
            on_progress: gets the `Progress` as denoising begins, after each step and after each
                latent frame that is decoded.
            save_to: a file that holds the job's state after every `save_every` steps, for `resume`,
                and after the last. No other job that is not done has it.
            save_every_s: seconds between two of these, at least, but for the last step's.
            save_last_s: the last step's is left out where this job's share of the time of its steps
                since the last file is less: so little work is sooner done again.
            keep_frames: False where `on_frames` has them all: `Video.frames` is empty then.

        The callbacks are called on the engine's thread; an exception in one fails the job. Raises
        RequestError for a bad value, MemoryLimitError, RefusedError, QueueFullError,
        EngineClosedError, EngineDeadError (see `error`).
        """
        options = JobOptions(
            priority=priority,
            deadline_s=deadline_s,
            on_frames=on_frames,
            on_latents=on_latents,
            on_progress=on_progress,
            save_to=None if save_to is None else path_of("save_to", save_to),
            save_every=save_every,
            save_every_s=save_every_s,
            save_last_s=save_last_s,
            keep_frames=keep_frames,
        )
        resolved, held = self._intake.taken(request)
        return self._intake.enqueue(resolved, options, held)

    @own_device()
    def resume(self, path: str | PathLike[str], **options: Any) -> Job:
        """Go on with a job that `Job.save` or `save_to` left in a file; its result is the same.

        Over how many ranks it was saved, and is resumed, makes no difference.

        options: those of `submit`. Raises CheckpointError for a file that is none, or that another
        model or dtype left; and as `submit`, for a job beyond this engine's limits too.
        """
        self._origin.check()
        if options.get("save_to") is not None:
            options["save_to"] = path_of("save_to", options["save_to"])
        saved = load_state(path_of("a saved job", path), self.model, self.limits)
        records = saved.request.loras
        held = self._intake.adapters.held(records) if records else []
        if self._planner is not None:
            saved.canvas(self._planner.model)  # what is damaged is told here; ranks tell it later
        return self._intake.enqueue(saved.request, JobOptions(**options), held, saved)

    def resolve(self, request: VideoRequest) -> ResolvedRequest:
        """The request with the checkpoint's defaults, checked; raises RequestError."""
        return self._intake.resolved(request)[0]

    @own_device()
    def open_session(self, request: SessionRequest, *, memory: Memory | None = None) -> Session:
        """Open a world that is driven while it is made, with its first frame.

        memory: another session's `Session.memory`, to share: what one paints the other sees.

        Raises SessionError for a checkpoint that takes no actions, and over ranks; RequestError for
        a bad value; SessionLimitError where `Limits.max_sessions` are open or no memory is left;
        MemoryLimitError; RefusedError; EngineClosedError, EngineDeadError.
        """
        return self._sessions.open(self, request, memory)

    @own_device()
    def reopen_session(self, path: str | PathLike[str]) -> Session:
        """Go on with a session that `Session.save` left in a file: the same actions make the same
        frames. Raises CheckpointError for a file that is none, or that another model or dtype left;
        and as `open_session`."""
        return self._sessions.reopen(self, path_of("a saved session", path))

    @own_device()
    def replay(
        self, path: str | PathLike[str], *, record: str | PathLike[str] | None = None
    ) -> Iterator[np.ndarray]:
        """The frames of a recording (`Session.record`) once more, from its seed and actions: uint8
        `[n, height, width, 3]`, a step's at a time, as they are made.

        record: a file that takes them. Of a recording whose steps were packed with nobody they are
        the same, byte for byte; in company they were within rounding of them, at each step.
        Raises MediaError for a file that is no recording, CheckpointError for another model's,
        SessionError for one that followed from another session's steps too, and as `open_session`.
        """
        to = None if record is None else path_of("record", record)
        return self._sessions.replay(self, path_of("a recording", path), to)

    @own_device()
    def plan(self, request: VideoRequest | SessionRequest) -> MemoryPlan:
        """The memory that a request would take, stage by stage; raises as `submit`. A session's
        `held` is what it takes for as long as it is open.

        RequestError for an engine over several ranks, whose memory is not planned.
        """
        self._origin.check()
        if isinstance(request, SessionRequest):
            return self._sessions.plan(request)
        if self._planner is None:
            raise RequestError("the memory of several ranks is not planned")
        resolved, _held = self._intake.resolved(request)
        return self._planner.plan(resolved)

    @own_device()
    def load_lora(self, path: str | PathLike[str], name: str | None = None) -> str:
        """Load an adapter beside the model, for requests that name it; returns its name.

        name: by default the file's, without its suffix. Raises CheckpointError for an adapter that
        cannot be used by requests, RequestError for a name that is taken, MemoryLimitError.
        """
        own = Path(path_of("the file of an adapter", path)).stem if name is None else name
        if not isinstance(own, str) or not own:
            raise RequestError(f"the name of an adapter must be a text, got {shown(name)}")
        self._intake.adapters.load(path, own)
        return own

    def unload_lora(self, name: str) -> None:
        """Forget an adapter; its memory is free once no job has it. RequestError for no name."""
        self._intake.adapters.unload(name)

    @property
    def loras(self) -> tuple[str, ...]:
        """The names of the adapters that are loaded."""
        return self._intake.adapters.names

    @property
    def plans_memory(self) -> bool:
        """Whether `plan` tells what a request takes: where the model is this process's own."""
        return self._planner is not None

    @property
    def loaded_model(self) -> VideoModel:
        """The model, where it is this process's own; RequestError where ranks hold it."""
        if self._planner is None:
            raise RequestError("the model is at ranks; an engine without `parallel` has it here")
        return self._planner.model

    @property
    def error(self) -> EngineDeadError | None:
        """Whether the engine is dead, and why; None for one that serves, or was closed.

        Dead is an engine whose device does not answer any more, at all of its replicas, and one in
        a process that was forked after it was made (EngineForkedError). It is asked without waiting
        and without submitting, so a health check may ask it.
        """
        if (forked := self._origin.error) is not None:
            return forked
        errors = [worker.error for worker in self._workers]
        return errors[0] if all(errors) else None

    @property
    def num_queued(self) -> int:
        """Jobs that wait to be started."""
        return sum(worker.num_queued for worker in self._workers)

    @property
    def num_running(self) -> int:
        """Jobs that were started and are not done."""
        return sum(worker.num_running for worker in self._workers)

    def close(self) -> None:
        """Cancel what is queued or running, and stop. Further requests raise EngineClosedError.

        In a forked process it does nothing: what would be stopped is the parent's.
        """
        if not self._origin.here:
            return
        for worker in self._workers:
            worker.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Engine has a thread and a device and cannot be copied or pickled; make one in each "
            "process"
        )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()
