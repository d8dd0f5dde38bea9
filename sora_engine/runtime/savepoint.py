"""A job between two steps, in a file: taken up in another process it ends in the same video.

One safetensors file. Its tensors are the canvas: latents, initial noise, text embeddings, known
content and the solver's history. Its metadata is one JSON text: the request, and the model's hash.
Fresh noise of later steps needs no state, being a function of seed and step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from sora_engine.config import Limits
from sora_engine.denoise.canvas import Canvas
from sora_engine.denoise.canvas_state import CanvasState
from sora_engine.denoise.denoise import num_steps
from sora_engine.denoise.model import DiffusionModel
from sora_engine.errors import CheckpointError
from sora_engine.io.atomic import write_atomically
from sora_engine.io.file_kind import SAFETENSORS, kind_of
from sora_engine.io.provenance import Provenance
from sora_engine.io.whole_file import read_whole
from sora_engine.request import Guidance, LatentGrid, ResolvedRequest, Shot, SparsePlan, WindowPlan
from sora_engine.request.camera import CameraPath
from sora_engine.request.lora import LoraRecord
from sora_engine.request.recipe import Maker
from sora_engine.request.resolve import check_saved

FORMAT = 3
_PLAIN = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "canvas_height",
    "canvas_width",
    "canvas_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "shift",
    "solver",
    "seed",
    "strength",
    "loop",
    "original_prompt",
    "resample",
)


@dataclass(frozen=True, slots=True, eq=False)
class Savepoint:
    """A saved job: its request, what made it, and its canvas, on the host."""

    request: ResolvedRequest
    provenance: Provenance
    state: CanvasState
    path: Path | None = None

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self.state.step

    def canvas(self, model: DiffusionModel) -> Canvas:
        """The canvas, on the model's device; CheckpointError for one that cannot be."""
        return self.state.restore(self.request, model, self.path)


def save_state(
    path: Path,
    request: ResolvedRequest,
    state: CanvasState,
    model: Maker,
    provenance: Provenance,
) -> None:
    """Write a job's state whole or not at all; raises OSError."""
    metadata = {
        "format": FORMAT,
        "request": {
            **{name: getattr(request, name) for name in _PLAIN},
            "sigmas": request.sigmas,
            "ladder": request.ladder,
            "label": request.label,
            "shots": [asdict(shot) for shot in request.shots],
            "guidance": asdict(request.guidance),
            "window": None if request.window is None else asdict(request.window),
            "sparse": isinstance(request.window, SparsePlan),
            "loras": [record.to_json() for record in request.loras],
            "camera": None if request.camera is None else request.camera.to_json(),
        },
        "noise_given": request.latents is not None,
        "frame_texts": list(state.frame_texts),
        "model": model.weights_hash,
        "dtype": model.dtype_name,
        "loras": [record.to_json() for record in model.loras],
        "provenance": provenance.to_json(),
    }
    # Copies: some tensors share storage, which the format does not allow.
    content = {
        name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.tensors.items()
    }
    write_atomically(path, save(content, {"sora_engine": json.dumps(metadata)}))


class SavedFor(Maker, Protocol):
    """The model of the engine that takes a job up."""

    @property
    def grid(self) -> LatentGrid: ...


def load_state(path: Path, model: SavedFor, limits: Limits) -> Savepoint:
    """Read `save_state`'s file; CheckpointError for any other, or another model's, and RequestError
    for a job beyond the limits."""
    try:
        tensors, said = read_whole(path, partial(_check_kind, path, model))
        metadata = json.loads(said["sora_engine"])
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        what = kind_of(path)
        why = error if what in (None, SAFETENSORS) else f"it is {what}"
        raise CheckpointError(f"cannot be read as a saved job: {why}", path=path) from error
    try:
        request = _request_of(metadata, tensors)
        provenance = Provenance.from_json(metadata["provenance"])
        state = CanvasState(tensors, tuple(metadata["frame_texts"]))
        steps = num_steps(request, model.grid)
        if provenance is None or steps < state.step:
            raise ValueError(f"{state.step} steps of {steps}")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"is damaged as a saved job: {error!r}", path=path) from error
    check_saved(request, model.grid, limits)
    return Savepoint(request, provenance, state, path)


def _check_kind(path: Path, model: SavedFor, names: Sequence[str], said: Mapping[str, str]) -> None:
    """CheckpointError for a file that is no saved job, or another model's."""
    metadata = json.loads(said.get("sora_engine", "null"))
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        if isinstance(metadata, dict):
            what = f"its format is {metadata.get('format')}, this version reads {FORMAT}"
        elif list(names) == ["latents"] and "fps" in said:
            what = "it holds finished latents, of which `sora decode` makes the video"
        else:
            what = f"it holds {len(names)} tensors, and nothing about a job"
        raise CheckpointError(f"this is no saved job of this version: {what}", path=path)
    weights, dtype = str(metadata.get("model")), metadata.get("dtype")
    if weights != model.weights_hash:
        raise CheckpointError(
            f"the job was saved from another model: weights {weights[:12]}, these are "
            f"{model.weights_hash[:12]}",
            path=path,
        )
    mine = [record.to_json() for record in model.loras]
    saved = metadata.get("loras", [])
    if saved != mine:
        raise CheckpointError(
            f"the job was saved with {_told(saved)} merged in, and this engine has {_told(mine)}",
            path=path,
        )
    if dtype != model.dtype_name:
        raise CheckpointError(
            f"the job was saved with dtype {dtype}, this engine has {model.dtype_name}", path=path
        )


def _told(loras: Any) -> str:
    """Adapters for people, out of a file or not."""
    try:
        return ", ".join(str(LoraRecord(**record)) for record in loras) or "no adapters"
    except (TypeError, ValueError):
        return "adapters that cannot be read"


def _request_of(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ResolvedRequest:
    plain = metadata["request"]
    plan = SparsePlan if plain["sparse"] else WindowPlan
    return ResolvedRequest(
        **{name: plain[name] for name in _PLAIN},
        sigmas=None if plain["sigmas"] is None else tuple(plain["sigmas"]),
        ladder=plain.get("ladder", ""),  # files of version 0.2.0 have none
        label=plain.get("label"),  # and no label
        shots=tuple(Shot(**shot) for shot in plain["shots"]),
        guidance=Guidance(**plain["guidance"]),
        window=None if plain["window"] is None else plan(**plain["window"]),
        clips=(),
        init=None,
        latents=tensors["noise"] if metadata["noise_given"] else None,
        loras=tuple(LoraRecord(**record) for record in plain.get("loras", ())),
        camera=CameraPath.from_json(plain.get("camera")),
    )
