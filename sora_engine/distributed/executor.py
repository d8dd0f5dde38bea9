"""A model that ranks hold, with the face of one that this process holds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from typing import Any, Literal, cast

import torch
from torch import Tensor

from sora_engine.config import ParallelConfig
from sora_engine.denoise.canvas import Canvas, KnownMode
from sora_engine.distributed import torchrun
from sora_engine.distributed.auto_layout import auto_layout
from sora_engine.distributed.layout import check_devices, check_heads, check_world
from sora_engine.distributed.message import Message
from sora_engine.distributed.pool import RankPool
from sora_engine.distributed.wire import request_to_message
from sora_engine.errors import EngineDeadError, JobFailedError, RankFailedError
from sora_engine.models.device import resolve_device, resolve_dtype
from sora_engine.models.loading import find_checkpoint
from sora_engine.models.video_model import VideoModel
from sora_engine.request.request import GenerationDefaults, LatentGrid, ResolvedRequest
from sora_engine.runtime.job import Job
from sora_engine.runtime.savepoint import Savepoint
from sora_engine.vae.coder import latent_statistics
from sora_engine.vae.wan_config import VAEConfig

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class RemoteVAE:
    """What an engine asks a VAE beside its work."""

    config: VAEConfig

    def denormalise(self, latents: Tensor) -> Tensor:
        """As `WanVAE.denormalise`."""
        mean, std = latent_statistics(self.config, latents)
        return latents * std + mean


@dataclass(frozen=True, slots=True, eq=False)
class RemoteModel:
    """What an engine must know of a model that it does not hold: a part of `VideoModel`."""

    name: str
    device: torch.device
    dtype: torch.dtype
    grid: LatentGrid
    defaults: GenerationDefaults
    vae: RemoteVAE
    vae_dtype: torch.dtype
    from_timesteps: tuple[float, ...]
    weights_hash: str
    known_mode: KnownMode

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> RemoteModel:
        """From what rank 0 says of its model."""
        grid = {**fields["grid"], "patch": tuple(fields["grid"]["patch"])}
        return cls(
            name=fields["name"],
            device=torch.device(fields["device"]),
            dtype=getattr(torch, fields["dtype"]),
            grid=LatentGrid(**grid),
            defaults=GenerationDefaults(**fields["defaults"]),
            vae=RemoteVAE(VAEConfig(**fields["vae"])),
            vae_dtype=getattr(torch, fields["vae_dtype"]),
            from_timesteps=tuple(fields["from_timesteps"]),
            weights_hash=fields["weights_hash"],
            known_mode=KnownMode(fields["known_mode"]),
        )

    @property
    def num_experts(self) -> int:
        return len(self.from_timesteps)

    def expert_at(self, timestep: float) -> int:
        """As `VideoModel.expert_at`."""
        for i, start in enumerate(self.from_timesteps):
            if timestep >= start:
                return i
        return self.num_experts - 1


@dataclass(slots=True, eq=False)
class RemoteCanvas:
    """A canvas that ranks hold: a part of `Canvas`.

    number: by which ranks know it. pool: those that have it; no others ever will.
    """

    number: int
    pool: RankPool
    timesteps: tuple[float, ...]
    solver_name: str
    wraps: bool
    step: int = 0
    preview: None = None
    _latents: Tensor | None = None

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @property
    def finished(self) -> bool:
        return self.step >= self.num_steps

    @property
    def timestep(self) -> float:
        return self.timesteps[self.step]

    @property
    def latents(self) -> Tensor:
        """float32 `[C, T, H, W]`, on the host; fetched once they are finished."""
        if self._latents is None or not self.finished:
            reply = self.pool.call(Message("latents", {"job": self.number}))[0]
            self._latents = reply.tensors["latents"]
        return self._latents


@dataclass(slots=True, eq=False)
class RemoteStages:
    """What a worker has done to jobs, done by ranks: `stages.Stages` over a `RankPool`.

    Once a rank has failed, the jobs under way fail with it, each as its turn comes; the next job
    starts fresh ranks.
    """

    start: Callable[[], RankPool]
    pool: RankPool
    numbers: Iterator[int] = field(default_factory=itertools.count)
    sent_bytes: list[dict[str, int]] = field(default_factory=list)
    """What each rank sent to others in the last step, by purpose."""
    waited_s: list[float] = field(default_factory=list)
    """How long each rank waited for others in it."""

    @classmethod
    def started(cls, start: Callable[[], RankPool]) -> RemoteStages:
        return cls(start, start())

    @property
    def model(self) -> VideoModel:
        return cast("VideoModel", RemoteModel.from_fields(self.pool.description))

    def preparing(self, request: ResolvedRequest) -> Generator[None, None, Canvas]:
        """As `denoise.preparing`, at every rank."""
        if self.pool.failure is not None:
            self.pool = self.start()
        message = request_to_message("prepare", request)
        yield
        return self._canvas(message, request)

    def resuming(self, saved: Savepoint) -> Generator[None, None, Canvas]:
        """As `Stages.resuming`: every rank takes the canvas up."""
        if self.pool.failure is not None:
            self.pool = self.start()
        yield
        message = Message("resume", {"told": dict(saved.told)}, dict(saved.tensors))
        return self._canvas(message, saved.request)

    def _canvas(self, message: Message, request: ResolvedRequest) -> Canvas:
        """Have all ranks make a canvas."""
        number = next(self.numbers)
        message.fields["job"] = number
        reply = self.pool.call(message)[0].fields
        canvas = RemoteCanvas(
            number=number,
            pool=self.pool,
            timesteps=tuple(reply["timesteps"]),
            solver_name=reply["solver"],
            wraps=request.loop,
            step=reply["step"],
        )
        return cast("Canvas", canvas)

    def state_of(self, canvas: Canvas) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """As `Stages.state_of`, from rank 0: all ranks hold the same."""
        remote = _remote(canvas)
        reply = remote.pool.call(Message("state", {"job": remote.number}))[0]
        return reply.tensors, tuple(reply.fields["frame_texts"])

    def step(self, jobs: Sequence[Job], max_tokens: int) -> dict[Job, Exception]:
        """As `denoise_step`, by all ranks together."""
        canvases = [_remote(job.canvas) for job in jobs]
        numbers = [canvas.number for canvas in canvases]
        message = Message("step", {"jobs": numbers, "max_tokens": max_tokens})
        replies = _pool_of(canvases).call(message)
        self.sent_bytes = [reply.fields["sent"] for reply in replies]
        self.waited_s = [reply.fields["waited_s"] for reply in replies]
        failed: dict[str, str] = replies[0].fields["failed"]
        failures: dict[Job, Exception] = {}
        for job, canvas in zip(jobs, canvases, strict=True):
            if str(canvas.number) in failed:
                failures[job] = JobFailedError(failed[str(canvas.number)])
            else:
                canvas.step += 1
                job.count_step()
        return failures

    def decoding(self, canvas: Canvas) -> Iterator[Tensor | None]:
        """As `denoise.decoding`; each rank makes some rows of a frame."""
        remote = _remote(canvas)
        while True:
            replies = remote.pool.call(Message("decode", {"job": remote.number}))
            rows = [r.tensors["frames"] for r in replies if "frames" in r.tensors]
            if rows:
                yield torch.cat(rows, dim=1)
            elif replies[0].fields["more"]:
                yield None
            else:
                return

    def pack_limit(self, most: int) -> int:
        """Tokens a batch: nothing is measured across ranks, so that their batches stay the same."""
        return most

    def ops(self) -> dict[str, list[str]]:
        """The backends that served, at rank 0."""
        ops: dict[str, list[str]] = self.pool.call(Message("ops"))[0].fields["ops"]
        return ops

    def forget(self, job: Job) -> None:
        """Let go of a job's canvas."""
        if job.canvas_or_none is None:
            return
        canvas = _remote(job.canvas)
        if canvas.pool.failure is None:
            try:
                canvas.pool.call(Message("retire", {"job": canvas.number}))
            except RankFailedError:
                return  # it is gone with its rank

    def clear(self) -> None:
        """Ranks clear for themselves, when their last job is gone."""

    def close(self) -> None:
        """End all ranks."""
        self.pool.close()


def settle_layout(
    parallel: ParallelConfig | Literal["auto"] | None,
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    components: str | PathLike[str] | None,
    device: str | torch.device,
) -> ParallelConfig | None:
    """The layout to start; None for one rank. `"auto"`: the planner's, over torchrun's ranks or
    all GPUs of this machine (on a CPU: one rank)."""
    if parallel == "auto":
        ranks = 1
        if torchrun.launched():
            ranks = int(os.environ["WORLD_SIZE"])
        elif resolve_device(device).type == "cuda":
            ranks = torch.cuda.device_count()
        parallel = auto_layout(path, components, ranks)
    if torchrun.launched() or (parallel and parallel.num_ranks * parallel.data > 1):
        return parallel or torchrun.default_layout(_heads_of(path, components))
    return None


def _heads_of(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    components: str | PathLike[str] | None,
) -> int:
    return find_checkpoint(path, components)[0].transformer.config.num_attention_heads


def start_replicas(
    path: str | PathLike[str] | Sequence[str | PathLike[str]],
    parallel: ParallelConfig,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    vae_backend: str,
    vae_cuda_graphs: str,
    attention_backend: str,
    components: str | PathLike[str] | None,
) -> list[RemoteStages]:
    """Start `parallel.data` replicas of a model, each over the ranks of one layout.

    Under torchrun: one, over its ranks.

    Raises LayoutError before anything is started; as `load_video_model`; RankFailedError.
    """
    target = resolve_device(device)
    num_heads = _heads_of(path, components)
    check_heads(parallel, num_heads)
    if torchrun.launched():
        check_world(parallel, int(os.environ["WORLD_SIZE"]))
    elif target.type == "cuda":
        check_devices(parallel, torch.cuda.device_count(), "GPUs", num_heads=num_heads)
    paths = [path] if isinstance(path, (str, PathLike)) else list(path)
    model = {
        "path": os.fspath(paths[0]) if len(paths) == 1 else [os.fspath(p) for p in paths],
        "dtype": str(resolve_dtype(dtype, target)).removeprefix("torch."),
        "vae_backend": vae_backend,
        "vae_cuda_graphs": vae_cuda_graphs,
        "attention_backend": attention_backend,
        "components": None if components is None else os.fspath(components),
    }
    layout = replace(parallel, data=1)
    if torchrun.launched():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(1, len(os.sched_getaffinity(0)) // local)
        pool = torchrun.gather(layout, device=target.type, model=model, threads=threads)
        return [RemoteStages(_never_again, pool)]
    replicas: list[RemoteStages] = []
    try:
        for i in range(parallel.data):
            start = partial(
                RankPool.start,
                layout,
                device=target.type,
                model=model,
                first_device=i * layout.num_ranks,
                threads=max(1, len(os.sched_getaffinity(0)) // layout.num_ranks // parallel.data),
            )
            replicas.append(RemoteStages.started(start))
    except BaseException:
        for replica in replicas:
            replica.close()
        raise
    return replicas


def _never_again() -> RankPool:
    raise EngineDeadError("torchrun's ranks have ended, and only torchrun can start others")


def _remote(canvas: Canvas) -> RemoteCanvas:
    assert isinstance(canvas, RemoteCanvas)
    return canvas


def _pool_of(canvases: Sequence[RemoteCanvas]) -> RankPool:
    """Theirs; that of the first whose ranks have failed, where some were made by others."""
    pools = [canvas.pool for canvas in canvases]
    return next((pool for pool in pools if pool.failure is not None), pools[0])
