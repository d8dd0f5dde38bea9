"""A video autoencoder as a set of graphs: what an export writes and what a runtime runs.

A graph takes one latent frame's worth and the caches, all as inputs and outputs, so that a runtime
needs no state of its own. The decoder has three: *first* (no caches yet), *second* (the temporal
upsamplers have none yet) and *steady*. The encoder has two: its second frame is already steady.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_engine.errors import CheckpointError, RequestError
from sora_engine.vae.coder import ChunkCoder
from sora_engine.vae.registry import read_vae_config
from sora_engine.vae.shapes import VAEConfig, check_frames, check_latents
from sora_engine.vae.state import VAEState

SPEC_FILE = "graphs.json"
_VERSION = 1
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: `[1, channels, frames, scale * h, scale * w]` for h x w latents."""

    name: str
    channels: int
    frames: int
    scale: int

    def shape(self, height: int, width: int) -> tuple[int, int, int, int, int]:
        return (1, self.channels, self.frames, self.scale * height, self.scale * width)


@dataclass(frozen=True)
class GraphSpec:
    """One graph: its file, and its tensors. The first input and output are the video's, the others
    are caches; the cache outputs of a graph are the cache inputs of the one after it, in order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class GraphSet:
    """All graphs of one autoencoder and the folder they lie in."""

    folder: Path
    config: VAEConfig
    dtype: torch.dtype
    graphs: dict[str, GraphSpec]

    def save(self) -> None:
        """Write `graphs.json`."""
        record = {
            "version": _VERSION,
            "dtype": str(self.dtype).removeprefix("torch."),
            "config": self.config.to_dict(),
            "graphs": {name: asdict(spec) for name, spec in self.graphs.items()},
        }
        text = json.dumps(record, indent=1)
        (self.folder / SPEC_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> GraphSet:
        """The set that an export wrote. Raises CheckpointError."""
        folder = Path(folder)
        path = folder / SPEC_FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from error
        except ValueError as error:
            raise CheckpointError(f"is not JSON: {error}", path=path) from error
        try:
            if record["version"] != _VERSION:
                raise CheckpointError(
                    f"version {record['version']!r}; this engine reads {_VERSION}: export again",
                    path=path,
                )
            dtype = _DTYPES[record["dtype"]]
            graphs = {name: _graph(values) for name, values in record["graphs"].items()}
            config = read_vae_config(record["config"], path=path)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"does not describe a set of graphs: {error!r}", path=path
            ) from error
        for spec in graphs.values():
            # The name comes from a file: it must not lead out of the folder.
            if Path(spec.file).name != spec.file or not (folder / spec.file).is_file():
                raise CheckpointError(f"graph file {spec.file!r} is missing", path=path)
        return cls(folder, config, dtype, graphs)


def _graph(values: dict[str, Any]) -> GraphSpec:
    tensors = {
        side: tuple(TensorSpec(**tensor) for tensor in values[side])
        for side in ("inputs", "outputs")
    }
    return GraphSpec(values["file"], tensors["inputs"], tensors["outputs"])


class GraphCoder(ChunkCoder[VAEState]):
    """A `VideoCoder` that runs a `GraphSet`; subclasses say how one graph is run."""

    def __init__(self, graphs: GraphSet, device: torch.device):
        self.graphs, self.device = graphs, device

    @property
    def config(self) -> VAEConfig:
        return self.graphs.config

    @abstractmethod
    def run_graph(self, name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Run graph `name` on contiguous tensors of the set's dtype, writing into `outputs`."""

    def decode_chunk(
        self, latents: Tensor, state: VAEState | None = None, *, consume: bool = False
    ) -> tuple[Tensor, VAEState]:
        """As `VideoCoder.decode_chunk`, for a batch of one; frames in the dtype of `latents`."""
        check_latents(self.config, latents)
        return self._chunk("decoder", latents, state, consume)

    def encode_chunk(
        self, frames: Tensor, state: VAEState | None = None, *, consume: bool = False
    ) -> tuple[Tensor, VAEState]:
        """As `VideoCoder.encode_chunk`, for a batch of one."""
        check_frames(self.config, frames, first=state is None)
        return self._chunk("encoder", frames, state, consume)

    def _chunk(
        self, side: str, x: Tensor, state: VAEState | None, consume: bool
    ) -> tuple[Tensor, VAEState]:
        if x.shape[0] != 1:
            raise RequestError(f"exported graphs take one video at a time, not {x.shape[0]}")
        scale = self.graphs.graphs[f"{side}_first"].inputs[0].scale
        for name, size in (("height", x.shape[3]), ("width", x.shape[4])):
            if size % scale:
                raise RequestError(
                    f"a {name} of {size} pixels does not fit the exported VAE; "
                    f"{max(size // scale, 1) * scale} or {(size // scale + 1) * scale} would"
                )
        height, width = x.shape[3] // scale, x.shape[4] // scale
        done = 0 if state is None else state.latent_frames
        caches: list[Tensor] = []
        if state is not None:
            held = state.release() if consume else list(state.caches)
            caches = [cache for cache in held if cache is not None]
        parts, at = [], 0
        while at < x.shape[2]:
            name = self._graph_for(side, done)
            spec = self.graphs.graphs[name]
            take = spec.inputs[0].frames
            piece = x[:, :, at : at + take].to(self.device, self.graphs.dtype).contiguous()
            values = [piece, *caches]
            inputs = {t.name: v for t, v in zip(spec.inputs, values, strict=True)}
            outputs = {
                t.name: torch.empty(
                    t.shape(height, width), dtype=self.graphs.dtype, device=self.device
                )
                for t in spec.outputs
            }
            self.run_graph(name, inputs, outputs)
            produced = list(outputs.values())
            parts.append(produced[0].to(x.dtype))
            caches = produced[1:]
            done, at = done + 1, at + take
        joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return joined, VAEState(tuple(caches), done)

    def _graph_for(self, side: str, done: int) -> str:
        if done == 0:
            return f"{side}_first"
        second = f"{side}_second"
        return second if done == 1 and second in self.graphs.graphs else f"{side}_steady"
