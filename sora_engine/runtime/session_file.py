"""A session between two steps, in a file: opened again in another process, the same actions make
the same frames.

One safetensors file. Its tensors are the latent frames of the context and of the memory, the
decoder's state and the last frames. Its metadata is one JSON text: the request, the actions so far,
and the model's hash. Noise of later steps needs no state, being a function of seed and step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from sora_engine.errors import CheckpointError, SessionError
from sora_engine.io.atomic import write_atomically
from sora_engine.io.file_kind import SAFETENSORS, kind_of
from sora_engine.io.whole_file import read_whole
from sora_engine.models.video_model import VideoModel
from sora_engine.request import Action, ResolvedSession, SessionRequest
from sora_engine.request.actions import pack_log, unpack_log
from sora_engine.request.checks import shown
from sora_engine.request.session import request_from_json
from sora_engine.runtime.recall import Moment
from sora_engine.runtime.standing import Log, Standing
from sora_engine.vae.state import VAEState
from sora_engine.vae.tiling import TiledState

FORMAT = 1
KEY = "sora_session"


@dataclass(frozen=True, slots=True, eq=False)
class SavedSession:
    """What a file holds: the request, and of a `Standing` what is in it. remembered: the moments of
    the memory, oldest first."""

    request: SessionRequest
    context: tuple[Moment, ...]
    remembered: tuple[Moment, ...]
    decoder: Any
    frames: np.ndarray
    prompt: str
    log: Log | None
    company: int


def save_session(
    path: Path, settings: ResolvedSession, standing: Standing, model: VideoModel
) -> None:
    """Write a session's state whole or not at all. Raises OSError, SessionError."""
    remembered = standing.index.moments
    moments = list({id(m): m for m in (*remembered, *standing.context)}.values())
    number = {id(moment): i for i, moment in enumerate(moments)}
    tensors = {
        "latents": torch.cat([moment.latent for moment in moments], dim=1),
        "frames": torch.from_numpy(standing.frames),
    }
    if settings.first is not None:
        tensors["first"] = torch.from_numpy(settings.first)
    prompts = list(dict.fromkeys(moment.prompt for moment in moments))
    metadata = {
        "format": FORMAT,
        "model": model.weights_hash,
        **_settings_of(model),
        "request": settings.to_json(),
        "prompt": standing.prompt,
        "prompts": prompts,
        "moments": [[m.action, m.place, prompts.index(m.prompt)] for m in moments],
        "remembered": [number[id(moment)] for moment in remembered],
        "context": [number[id(moment)] for moment in standing.context],
        "decoder": _flattened(standing.decoder, "decoder", tensors),
        "log": pack_log(Log.runs(standing.log)),
        "company": standing.company,
    }
    # Copies: some share storage, which the format does not allow.
    content = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    write_atomically(path, save(content, {KEY: json.dumps(metadata)}))


def load_session(path: Path, model: VideoModel) -> SavedSession:
    """Read `save_session`'s file; CheckpointError for any other, or another model's."""
    try:
        tensors, said = read_whole(path, partial(_check_kind, path, model))
        metadata = json.loads(said[KEY])
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        what = kind_of(path)
        why = error if what in (None, SAFETENSORS) else f"it is {what}"
        raise CheckpointError(f"cannot be read as a saved session: {why}", path=path) from error
    try:
        return _session_of(metadata, tensors, model)
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"is damaged as a saved session: {error!r}", path=path) from error


def _check_kind(
    path: Path, model: VideoModel, names: Sequence[str], said: Mapping[str, str]
) -> None:
    """CheckpointError for a file that is no saved session, or another model's."""
    metadata = json.loads(said.get(KEY, "null"))
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        what = f"it holds {len(names)} tensors, and nothing about a session"
        if isinstance(metadata, dict):
            what = f"its format is {metadata.get('format')}, this version reads {FORMAT}"
        raise CheckpointError(f"this is no saved session of this version: {what}", path=path)
    theirs = str(metadata.get("model"))
    if theirs != model.weights_hash:
        raise CheckpointError(
            f"the session was saved from another model: weights {theirs[:12]}, these are "
            f"{model.weights_hash[:12]}",
            path=path,
        )
    for name, value in _settings_of(model).items():
        if metadata.get(name) != value:
            raise CheckpointError(
                f"the session was saved with {name} {shown(metadata.get(name))}, this engine has "
                f"{shown(value)}",
                path=path,
            )


def _settings_of(model: VideoModel) -> dict[str, Any]:
    """What a model was loaded with that its results depend on."""
    return {
        "dtype": model.dtype_name,
        "vae_dtype": str(model.vae_dtype).removeprefix("torch."),
        "loras": [record.to_json() for record in model.loras],
    }


def _session_of(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], model: VideoModel
) -> SavedSession:
    latents, frames = tensors["latents"], tensors["frames"]
    moments = [
        Moment(
            latent.clone(),
            tuple(float(value) for value in action),
            (float(place[0]), float(place[1])),
            str(metadata["prompts"][text]),
        )
        for latent, (action, place, text) in zip(
            latents.split(1, dim=1), metadata["moments"], strict=True
        )
    ]
    context = tuple(moments[i] for i in metadata["context"])
    if latents.dtype != torch.float32 or latents.dim() != 4 or not context:
        raise ValueError(f"latents are {latents.dtype} {list(latents.shape)}")
    if frames.dtype != torch.uint8 or frames.dim() != 4:
        raise ValueError(f"frames are {frames.dtype} {list(frames.shape)}")
    log: Log | None = None
    for action, times in unpack_log(metadata["log"]):
        log = _with_run(log, action, times)
    first = tensors.get("first")
    return SavedSession(
        request=request_from_json(
            dict(metadata["request"]), None if first is None else first.numpy()
        ),
        context=context,
        remembered=tuple(moments[i] for i in metadata["remembered"]),
        decoder=_restored(metadata["decoder"], "decoder", tensors, model.device),
        frames=frames.numpy(),
        prompt=str(metadata["prompt"]),
        log=log,
        company=int(metadata["company"]),
    )


def _with_run(log: Log | None, action: Action, times: int) -> Log:
    return Log(action, times, log, times + (0 if log is None else log.step))


def _flattened(state: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A decoder's state as tensors by name, and the rest of it as JSON."""
    if state is None:
        return None
    if isinstance(state, TiledState):
        return [_flattened(tile, f"{name}.{i}", tensors) for i, tile in enumerate(state.tiles)]
    if not isinstance(state, VAEState):
        raise SessionError(
            f"the decoder's state is a {type(state).__name__}, which no file holds; "
            "vae_backend='torch' would work"
        )
    there = []
    for i, cache in enumerate(state.caches):
        there.append(cache is not None)
        if cache is not None:
            tensors[f"{name}.{i}"] = cache
    return {"latent_frames": state.latent_frames, "caches": there}


def _restored(said: Any, name: str, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """Reads `_flattened` back."""
    if said is None:
        return None
    if isinstance(said, list):
        each = (_restored(tile, f"{name}.{i}", tensors, device) for i, tile in enumerate(said))
        return TiledState(list(each))
    caches = [
        tensors[f"{name}.{i}"].to(device) if there else None
        for i, there in enumerate(said["caches"])
    ]
    return VAEState(tuple(caches), int(said["latent_frames"]))
