"""One rank of a parallel engine: it does what the engine says, as all other ranks do.

The main thread works; a second one listens, so that a rank that waits for others can be told to
end, and tells the engine every second how far the first one is. Every rank gets the same commands
in the same order, and no rank decides anything by itself: so none leaves an exchange that another
enters.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sora_engine.config import NO_LIMIT, ParallelConfig
from sora_engine.denoise.canvas import Canvas
from sora_engine.denoise.canvas_state import CanvasState
from sora_engine.denoise.denoise import denoise_step, prepare
from sora_engine.denoise.packing import Packer
from sora_engine.distributed.comm import exchange_error, exchanging
from sora_engine.distributed.mesh import Mesh
from sora_engine.distributed.message import Connection, Message
from sora_engine.distributed.step_sharing import RankSharing
from sora_engine.distributed.vae import SplitVAE, shared_copy
from sora_engine.distributed.wire import (
    request_from_message,
    state_from_message,
    state_to_message,
)
from sora_engine.errors import JobFailedError, NonFiniteError, RankFailedError, SoraError
from sora_engine.models.adapter_store import LoadedAdapter
from sora_engine.models.loading import load_video_model
from sora_engine.models.video_model import VideoModel
from sora_engine.request.lora import Lora
from sora_engine.vae.coder import ChunkCoder
from sora_engine.vae.decoding import as_kept, decoding

BEAT_S = 1.0
STORE_TIMEOUT = timedelta(minutes=10)  # ranks of several nodes may start minutes apart
# The engine's watch ends a wait that is too long; this bound is for an engine that is gone too.
EXCHANGE_TIMEOUT = timedelta(minutes=30)


@dataclass(slots=True, eq=False)
class RankJob:
    """A job as a rank knows it."""

    canvas: Canvas
    frames: Iterator[Tensor | None] | None = None


def run_rank(rank: int, size: int, sock: socket.socket, settings: dict[str, Any]) -> int:
    """Serve an engine until it closes the socket; returns the process's exit code."""
    connection = Connection(sock)
    control = Control(connection, rank)
    try:
        control.work(lambda: _Rank.start(rank, size, settings, control))
    except RankFailedError:
        return 1
    return 0


class Control:
    """The engine's voice at a rank: commands for the main thread, and reports of its progress."""

    def __init__(self, connection: Connection, rank: int) -> None:
        self.rank = rank
        self.mesh: Mesh | None = None
        self._connection = connection
        self._commands: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._busy = True
        threading.Thread(target=self._listen, name="sora-rank", daemon=True).start()

    def work(self, start: Callable[[], _Rank]) -> None:
        """Start the rank, then carry out commands; an unexpected error ends it, and says so."""
        try:
            served: _Rank | None = None
            command = Message("start")
            while True:
                try:
                    if served is None:
                        served = start()
                        reply = Message("ready", served.describe())
                    else:
                        reply = served.carry_out(command)
                except SoraError as error:
                    # The request's fault (or the checkpoint's), and the same at all ranks.
                    reply = Message("refused", error.to_fields())
                self._connection.send(reply)
                self._busy = False
                command = self._commands.get()
                self._busy = True
        except Exception as error:
            lost = exchange_error(error)
            if lost is None:
                traceback.print_exc()
                why = f"raised {type(error).__name__}: {error}"
                self._connection.send(Message("failed", {"why": why}))
            else:
                why = str(lost)
                self._connection.send(Message("lost", {"why": why}))
            # The engine names the rank that is at fault and then ends this one.
            threading.Event().wait(60)
            raise RankFailedError(self.rank, why) from error

    def _listen(self) -> None:
        try:
            while True:
                if select.select([self._connection], [], [], BEAT_S)[0]:
                    message = self._connection.receive()
                    if message.kind == "abort":
                        self._abort(message)
                    self._commands.put(message)
                elif self._busy:
                    self._connection.send(Message("beat", self._progress()))
        except (OSError, EOFError):
            os._exit(0)  # the engine is gone or has closed

    def _progress(self) -> dict[str, Any]:
        if self.mesh is None:
            return {"exchanges": 0, "waiting_s": None}
        traffic = self.mesh.traffic
        return {"exchanges": traffic.exchanges, "waiting_s": traffic.waiting_s()}

    def _abort(self, message: Message) -> None:
        """Another rank failed. Whatever this one is in the middle of, it ends here."""
        error = RankFailedError(message.fields["rank"], message.fields["reason"])
        self._connection.send(
            Message("aborted", {"error": type(error).__name__, "why": str(error)})
        )
        print(f"sora: rank {self.rank} ends: {error}", file=sys.stderr, flush=True)
        # Not its failure: torchrun would end the engine for it, before that has said what it was.
        os._exit(0)


class _Rank:
    """A model at one place of a mesh, and the canvases under way."""

    def __init__(self, model: VideoModel, mesh: Mesh) -> None:
        self.model = model
        self.mesh = mesh
        self._sharing = RankSharing(mesh)
        self._packer = Packer(model.grid.patch, model.device)
        self._jobs: dict[int, RankJob] = {}
        self._adapters: dict[str, LoadedAdapter] = {}
        self._split: SplitVAE | None = None
        model.preview = None  # no picture of a rank's is asked for
        model.vae.limit(NO_LIMIT)  # ranks code whole frames, or rows of them, and never tiles
        layers = model.vae.layers
        if mesh.replica.size > 1 and layers is not None and layers.splits_rows:
            # The hooks must not be in the way of one rank that decodes alone: a copy, same weights.
            self._split = SplitVAE(shared_copy(layers), mesh.replica)
        self._does = {
            "prepare": self._prepare,
            "resume": self._resume,
            "state": self._state,
            "step": self._step,
            "latents": self._latents,
            "decode": self._decode,
            "ops": self._ops,
            "retire": self._retire,
        }

    @classmethod
    def start(cls, rank: int, size: int, settings: dict[str, Any], control: Control) -> _Rank:
        """Join the others, and load the model onto this rank's device."""
        torch.set_num_threads(settings["threads"])
        config = ParallelConfig(**settings["parallel"])
        device = torch.device(settings["device"])
        if device.type == "cuda":
            first = settings.get("first_device")
            index = int(os.environ["LOCAL_RANK"]) if first is None else first + rank
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
        with exchanging("could not join the other ranks"):
            if size > 1:
                join(rank, size, device, settings)
            mesh = Mesh.create(config, device.type)
        control.mesh = mesh
        sharder = None
        if config.shard_weights:
            from sora_engine.distributed.weights import WeightShards

            sharder = WeightShards(mesh)
        options = dict(settings["model"])
        options["loras"] = [Lora(**lora) for lora in options.get("loras", ())]
        model = load_video_model(device=device, sharder=sharder, alone=False, **options)
        return cls(model, mesh)

    def describe(self) -> dict[str, Any]:
        """What the engine must know of the model: `RemoteModel.from_fields`."""
        model = self.model
        return {
            "name": model.name,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "grid": asdict(model.grid),
            "defaults": asdict(model.defaults),
            "from_timesteps": [expert.from_timestep for expert in model.experts],
            "weights_hash": model.weights_hash,
            "known_mode": model.known_mode,
            "labels": None if model.labels is None else asdict(model.labels),
            "takes_camera": model.takes_camera,
            "loras": [record.to_json() for record in model.loras],
            "latents_mean": list(model.vae.config.latents_mean),
            "latents_std": list(model.vae.config.latents_std),
            "vae_name": type(model.vae.coder).__name__,
            "chosen": dict(model.chosen),
            "dtype_name": model.dtype_name,
            "quantised": model.quantised,
            "lossy": model.lossy,
            "family": model.family,
            "vae_dtype": str(model.vae_dtype).removeprefix("torch."),
        }

    def carry_out(self, command: Message) -> Message:
        """One command of the engine, and the answer to it."""
        return self._does[command.kind](command)

    def _hold_adapters(self, command: Message) -> None:
        """Read what a job needs, and let go of what the engine has forgotten."""
        keep = set(command.fields.get("keep", ()))
        self._adapters = {k: adapter for k, adapter in self._adapters.items() if k in keep}
        for sha256, path in command.fields.get("adapters", {}).items():
            assert self.model.adapters is not None
            self._adapters[sha256] = self.model.adapters.hold(path, sha256)

    def _prepare(self, command: Message) -> Message:
        self._hold_adapters(command)
        return self._take(command, prepare(request_from_message(command), self.model))

    def _resume(self, command: Message) -> Message:
        self._hold_adapters(command)
        request = request_from_message(command)
        return self._take(command, state_from_message(command).restore(request, self.model))

    def _take(self, command: Message, canvas: Canvas) -> Message:
        self._jobs[command.fields["job"]] = RankJob(canvas)
        timesteps = [float(t) for t in canvas.solver.schedule.timesteps]
        timesteps *= max(1, len(canvas.chain))
        fields = {
            "solver": canvas.solver_name,
            "timesteps": timesteps,
            "step": canvas.step,
            "cut_prompts": list(canvas.cut_prompts),
        }
        return Message("done", fields)

    def _state(self, command: Message) -> Message:
        if self.mesh.rank > 0:
            return Message("done")
        return state_to_message("done", CanvasState.of(self._jobs[command.fields["job"]].canvas))

    def _step(self, command: Message) -> Message:
        canvases = [self._jobs[number].canvas for number in command.fields["jobs"]]
        before, waited_s = dict(self.mesh.traffic.sent_bytes), self.mesh.traffic.waited_s
        limit = command.fields["max_tokens"]
        failures = denoise_step(canvases, self.model, self._packer, limit, self._sharing)
        for error in failures.values():
            if exchange_error(error) is not None:  # no job's fault
                raise error
        failed = {str(i): _typed(error).to_fields() for i, error in failures.items()}
        sent = {k: n - before.get(k, 0) for k, n in self.mesh.traffic.sent_bytes.items()}
        waited_s = self.mesh.traffic.waited_s - waited_s
        return Message("done", {"sent": sent, "waited_s": waited_s, "failed": failed})

    def _latents(self, command: Message) -> Message:
        if self.mesh.rank > 0:
            return Message("done")
        return Message(
            "done", tensors={"latents": self._jobs[command.fields["job"]].canvas.latents}
        )

    def _decode(self, command: Message) -> Message:
        """This rank's rows of a job's next frames; no tensor at the end, or where it has none."""
        job = self._jobs[command.fields["job"]]
        rows = job.canvas.latents.shape[2]
        active = 1 if self._split is None else self._split.num_active(rows)
        if self.mesh.rank >= active:
            return Message("done")
        if job.frames is None:
            vae: ChunkCoder[Any] = self.model.vae
            if self._split is not None and active > 1:
                vae = self._split
            job.frames = decoding(
                as_kept(job.canvas.latents, self.model.vae),
                vae,
                dtype=self.model.vae_dtype,
                device=self.model.device,
                wraps=job.canvas.wraps,
            )
        try:
            frames = next(job.frames)
        except StopIteration:
            return Message("done", {"more": False})
        except NonFiniteError as error:  # maybe in this rank's rows alone: no refusal of all ranks
            return Message("done", {"more": False, "failed": error.to_fields()})
        return Message("done", {"more": True}, {} if frames is None else {"frames": frames})

    def _ops(self, command: Message) -> Message:
        return Message("done", {"ops": self.model.ops()})

    def _retire(self, command: Message) -> Message:
        self._jobs.pop(command.fields["job"], None)
        if not self._jobs:
            self._packer.clear()
            self._sharing.clear()
        return Message("done")


def _typed(error: Exception) -> SoraError:
    """The error of a job, as it can cross to the engine."""
    if isinstance(error, SoraError):
        return error
    return JobFailedError(f"{type(error).__name__}: {error}")


def join(rank: int, size: int, device: torch.device, settings: dict[str, Any]) -> None:
    """Make the default process group: of ranks that an engine started, by a store whose listener
    it bound; of torchrun's, by torchrun's own."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if settings.get("store_port") is None:
        dist.init_process_group(backend, timeout=EXCHANGE_TIMEOUT, device_id=device_id)
        return
    # Nothing but the loopback: gloo would take the address of the host's name.
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    store = dist.TCPStore(
        "127.0.0.1",
        settings["store_port"],
        size,
        is_master=rank == 0,
        timeout=STORE_TIMEOUT,
        master_listen_fd=settings["store_fd"] if rank == 0 else None,
    )
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=EXCHANGE_TIMEOUT,
        device_id=device_id,
    )
