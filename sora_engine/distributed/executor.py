"""A model that ranks hold, with the face of one that this process holds.

`RankExecutor` is a `runtime.executor.Executor`: a worker cannot tell it from a local one.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor

from sora_engine.config import ParallelConfig
from sora_engine.denoise.canvas_state import CanvasState
from sora_engine.distributed import torchrun
from sora_engine.distributed.auto_layout import auto_layout, check_tokens
from sora_engine.distributed.layout import check_devices, check_heads, check_world
from sora_engine.distributed.message import Message
from sora_engine.distributed.pool import RankPool
from sora_engine.distributed.wire import request_to_message, state_from_message, state_to_message
from sora_engine.errors import EngineDeadError, LayoutError, RankFailedError, error_from_fields
from sora_engine.io.system import usable_cores
from sora_engine.models.adapter_store import AdapterStore
from sora_engine.models.device import resolve_device
from sora_engine.models.loading import hollow_transformer
from sora_engine.models.precision import settle_precision
from sora_engine.models.quantised import check_kind, split_dtype
from sora_engine.models.registry import (
    Components,
    ModelPath,
    family_named,
    open_checkpoint,
    plain_components,
)
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid, ResolvedRequest
from sora_engine.request.labels import Labels
from sora_engine.request.lora import EXPERTS, Lora, LoraRecord, checked_loras


@dataclass(frozen=True, slots=True, eq=False)
class RemoteVAE:
    """What an engine asks of a VAE beside its work: the scale of its latents, by channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def denormalise(self, latents: Tensor) -> Tensor:
        """Normalised latents `[B, z, ...]` to raw ones."""
        shape = (-1, *([1] * (latents.dim() - 2)))
        std, mean = latents.new_tensor(self.std), latents.new_tensor(self.mean)
        return latents * std.reshape(shape) + mean.reshape(shape)


@dataclass(frozen=True, slots=True, eq=False)
class RemoteModel:
    """What an engine must know of a model that it does not hold: a
    `runtime.executor.ServedModel`."""

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
    labels: Labels | None = None
    takes_camera: bool = False
    loras: tuple[LoraRecord, ...] = ()
    chosen: Mapping[str, str] = field(default_factory=dict)
    dtype_name: str = ""
    quantised: Mapping[str, str] = field(default_factory=dict)
    lossy: Mapping[str, float] = field(default_factory=dict)
    family: str = ""

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
            vae=RemoteVAE(tuple(fields["latents_mean"]), tuple(fields["latents_std"])),
            vae_dtype=getattr(torch, fields["vae_dtype"]),
            from_timesteps=tuple(fields["from_timesteps"]),
            weights_hash=fields["weights_hash"],
            known_mode=KnownMode(fields["known_mode"]),
            labels=Labels.from_json(fields["labels"]),
            takes_camera=fields["takes_camera"],
            loras=tuple(LoraRecord(**record) for record in fields["loras"]),
            chosen=fields["chosen"],
            dtype_name=fields["dtype_name"],
            quantised=fields["quantised"],
            lossy=fields["lossy"],
            family=fields["family"],
        )

    @property
    def num_experts(self) -> int:
        return len(self.from_timesteps)

    def expert_at(self, timestep: float) -> int:
        """The index of the expert for this timestep."""
        for i, start in enumerate(self.from_timesteps):
            if timestep >= start:
                return i
        return self.num_experts - 1


@dataclass(slots=True, eq=False)
class RemoteCanvas:
    """A canvas that ranks hold: a `runtime.executor.ServedCanvas`.

    number: by which ranks know it. pool: those that have it; no others ever will.
    """

    number: int
    pool: RankPool
    timesteps: tuple[float, ...]
    solver_name: str
    step: int = 0
    cut_prompts: tuple[str, ...] = ()
    texts_reused: int = 0  # ranks keep no texts
    preview: None = None
    num_windows: int = 1  # ranks share windows out by themselves
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

    def keep_latents_alone(self) -> None:
        """Ranks keep theirs as they are."""


@dataclass(slots=True, eq=False)
class RankExecutor:
    """Jobs' model work, done by ranks.

    Once a rank has failed, the jobs under way fail with it, each as its turn comes; the next job
    starts fresh ranks.
    """

    start: Callable[[], RankPool]
    pool: RankPool
    adapters: AdapterStore | None = None
    """Those that are loaded, without their values: ranks read the files when a job comes."""
    numbers: Iterator[int] = field(default_factory=itertools.count)
    sent_bytes: list[dict[str, int]] = field(default_factory=list)
    """What each rank sent to others in the last step, by purpose."""
    waited_s: list[float] = field(default_factory=list)
    """How long each rank waited for others in it."""

    @classmethod
    def started(
        cls, start: Callable[[], RankPool], adapters: AdapterStore | None = None
    ) -> RankExecutor:
        return cls(start, start(), adapters)

    @property
    def model(self) -> RemoteModel:
        return RemoteModel.from_fields(self.pool.description)

    @property
    def vae_name(self) -> str:
        name: str = self.pool.description["vae_name"]
        return name

    def make_current(self) -> None:
        """Nothing: the devices are the ranks', and this process touches none of them."""

    def preparing(self, request: ResolvedRequest) -> Generator[None, None, RemoteCanvas]:
        """As `denoise.preparing`, at every rank."""
        self._restart()
        message = request_to_message("prepare", request)
        yield
        return self._canvas(message, request)

    def resuming(
        self, request: ResolvedRequest, state: CanvasState
    ) -> Generator[None, None, RemoteCanvas]:
        """As `preparing`, of a job that was saved: every rank takes the canvas up."""
        self._restart()
        yield
        return self._canvas(state_to_message("resume", state, request), request)

    def _restart(self) -> None:
        """Start fresh ranks where a rank has failed."""
        if self.pool.failure is not None:
            self.pool = self.start()

    def _canvas(self, message: Message, request: ResolvedRequest) -> RemoteCanvas:
        """Have all ranks make a canvas, and read what adapters it needs that they have not."""
        if self.adapters is not None:
            held = self.adapters.held(request.loras)
            message.fields["adapters"] = {each.sha256: str(each.path) for each in held}
            message.fields["keep"] = self.adapters.hashes
        number = next(self.numbers)
        message.fields["job"] = number
        reply = self.pool.call(message)[0].fields
        return RemoteCanvas(
            number=number,
            pool=self.pool,
            timesteps=tuple(reply["timesteps"]),
            solver_name=reply["solver"],
            step=reply["step"],
            cut_prompts=tuple(reply["cut_prompts"]),
        )

    def state_of(self, canvas: RemoteCanvas) -> CanvasState:
        """What is saved of a canvas, from rank 0: all ranks hold the same."""
        return state_from_message(canvas.pool.call(Message("state", {"job": canvas.number}))[0])

    def step(self, canvases: Sequence[RemoteCanvas], max_tokens: int) -> dict[int, Exception]:
        """As `denoise_step`, by all ranks together."""
        numbers = [canvas.number for canvas in canvases]
        message = Message("step", {"jobs": numbers, "max_tokens": max_tokens})
        replies = _pool_of(canvases).call(message)
        self.sent_bytes = [reply.fields["sent"] for reply in replies]
        self.waited_s = [reply.fields["waited_s"] for reply in replies]
        failed: dict[str, dict[str, Any]] = replies[0].fields["failed"]
        failures: dict[int, Exception] = {}
        for i, canvas in enumerate(canvases):
            if str(i) in failed:
                failures[i] = error_from_fields(failed[str(i)])
            else:
                canvas.step += 1
        return failures

    def decoding(self, canvas: RemoteCanvas, raw: Tensor) -> Iterator[Tensor | None]:
        """As `vae.decoding.decoding`; each rank makes some rows of a frame, of its own latents."""
        while True:
            replies = canvas.pool.call(Message("decode", {"job": canvas.number}))
            failed = [r.fields["failed"] for r in replies if "failed" in r.fields]
            if failed:
                raise error_from_fields(failed[0])
            rows = [r.tensors["frames"] for r in replies if "frames" in r.tensors]
            if rows:
                yield torch.cat(rows, dim=1)
            elif replies[0].fields["more"]:
                yield None
            else:
                return

    def tiles_used(self, height: int, width: int) -> dict[str, str]:
        """None: ranks code whole frames, or rows of them."""
        return {}

    def pack_limit(self, limit: int) -> int:
        """Tokens a batch: nothing is measured across ranks, so that their batches stay the same."""
        return limit

    def ops(self) -> dict[str, list[str]]:
        """The backends that served, at rank 0."""
        ops: dict[str, list[str]] = self.pool.call(Message("ops"))[0].fields["ops"]
        return ops

    def forget(self, canvas: RemoteCanvas) -> None:
        """Let go of a canvas."""
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
    path: ModelPath,
    components: Components | None,
    device: str | torch.device,
) -> ParallelConfig | None:
    """The layout to start; None for one rank. `"auto"`: the planner's, over torchrun's ranks or
    all GPUs of this machine (on a CPU: one rank)."""
    if parallel is not None and parallel != "auto" and not isinstance(parallel, ParallelConfig):
        raise LayoutError(
            f"parallel must be 'auto' or a ParallelConfig, such as ParallelConfig(ulysses=2), got "
            f"{parallel!r}"
        )
    if parallel == "auto":
        ranks = 1
        if torchrun.launched():
            ranks = int(os.environ["WORLD_SIZE"])
        elif resolve_device(device).type == "cuda":
            ranks = torch.cuda.device_count()
        parallel = auto_layout(path, components, ranks)
    if torchrun.launched() or (parallel and parallel.num_ranks * parallel.data > 1):
        return parallel or torchrun.default_layout(
            open_checkpoint(path, components)[0].shape.num_heads
        )
    return None


def start_replicas(
    path: ModelPath,
    parallel: ParallelConfig,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    vae_backend: str,
    vae_dtype: str | torch.dtype,
    cuda_graphs: str,
    attention_backend: str,
    exact: bool,
    components: Components | None,
    loras: Sequence[Lora] = (),
) -> list[RankExecutor]:
    """Start `parallel.data` replicas of a model, each over the ranks of one layout.

    Under torchrun: one, over its ranks.

    Raises LayoutError before anything is started; as `load_video_model`; RankFailedError.
    """
    if not hasattr(os, "fork"):
        raise LayoutError(f"{parallel} needs os.fork, which Windows has not; one rank would work")
    target = resolve_device(device)
    checkpoint, _ = open_checkpoint(path, components)
    num_heads = checkpoint.shape.num_heads
    check_heads(parallel, num_heads)
    check_tokens(parallel, checkpoint)
    if torchrun.launched():
        check_world(parallel, int(os.environ["WORLD_SIZE"]))
    elif target.type == "cuda":
        check_devices(parallel, torch.cuda.device_count(), "GPUs", num_heads=num_heads)
    paths = [path] if isinstance(path, (str, PathLike)) else list(path)
    kind, dtype = split_dtype(dtype)
    check_kind(kind, target)
    if kind and parallel.shard_weights:
        raise LayoutError(
            f"dtype {kind!r} and shard_weights: quantised weights are not shared out over ranks; "
            "one of the two would work"
        )
    precision = settle_precision(  # once: ranks that measure for themselves might differ
        dtype,
        vae_dtype,
        target,
        weights=[expert.path for expert in checkpoint.experts],
        vae_backend=vae_backend,
        exact=exact,
    )
    own_dtype = str(precision.dtype).removeprefix("torch.")
    model = {
        "path": os.fspath(paths[0]) if len(paths) == 1 else [os.fspath(p) for p in paths],
        "dtype": f"{kind}:{own_dtype}" if kind else own_dtype,
        "vae_backend": vae_backend,
        "vae_dtype": str(precision.vae_dtype).removeprefix("torch."),
        "cuda_graphs": cuda_graphs,
        "attention_backend": attention_backend,
        "exact": exact,
        "components": plain_components(components),
        "loras": [lora.to_json() for lora in checked_loras(loras, len(EXPERTS))],
    }
    adapters = AdapterStore(
        family_named(checkpoint.family),
        partial(hollow_transformer, checkpoint.experts[0], precision.dtype, "auto"),
        len(checkpoint.experts),
        torch.device("meta"),
        precision.dtype,
    )
    layout = replace(parallel, data=1)
    if torchrun.launched():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(1, usable_cores() // local)
        pool = torchrun.gather(layout, device=target.type, model=model, threads=threads)
        return [RankExecutor(_never_again, pool, adapters)]
    replicas: list[RankExecutor] = []
    try:
        for i in range(parallel.data):
            start = partial(
                RankPool.start,
                layout,
                device=target.type,
                model=model,
                first_device=i * layout.num_ranks,
                threads=max(1, usable_cores() // layout.num_ranks // parallel.data),
            )
            replicas.append(RankExecutor.started(start, adapters))
    except BaseException:
        for replica in replicas:
            replica.close()
        raise
    return replicas


def _never_again() -> RankPool:
    raise EngineDeadError("torchrun's ranks have ended, and only torchrun can start others")


def _pool_of(canvases: Sequence[RemoteCanvas]) -> RankPool:
    """Theirs; that of the first whose ranks have failed, where some were made by others."""
    pools = [canvas.pool for canvas in canvases]
    return next((pool for pool in pools if pool.failure is not None), pools[0])
