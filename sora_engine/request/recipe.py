"""How a result was made, as plain values in its file, and from there the same request again.

A clip is remembered by its name and the hash of its bytes, or, if it was itself made by the
engine, by its own recipe. Its folder is not: results go to others, and where things lie on a server
is none of their business. Frames, noise and images that were only in memory are remembered by their
hash: that is enough to say what is missing.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import asdict, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sora_engine.errors import MediaError, RequestError
from sora_engine.io.provenance import Provenance
from sora_engine.request.checks import integer
from sora_engine.request.frames import as_array
from sora_engine.request.guidance import Guidance
from sora_engine.request.lora import Lora, LoraRecord
from sora_engine.request.request import Clip, Footage, Shot, VideoRequest
from sora_engine.request.resolve import ResolvedRequest
from sora_engine.request.windows import SparsePlan, WindowPlan
from sora_engine.version import version
from sora_engine.video import Video

if TYPE_CHECKING:
    import torch

    from sora_engine.request.request import Frames, WholeFrames


class Maker(Protocol):
    """The model that made a video, as its results name it."""

    @property
    def name(self) -> str: ...
    @property
    def weights_hash(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def dtype_name(self) -> str: ...
    @property
    def vae_dtype(self) -> torch.dtype: ...
    @property
    def loras(self) -> tuple[LoraRecord, ...]: ...


Make = Callable[[VideoRequest], Video]

_PLAIN = (
    "height",
    "width",
    "num_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "negative_prompt",
    "shift",
    "solver",
    "ladder",
    "strength",
    "loop",
    "resample",
    "original_prompt",
    "label",
)


def provenance_of(request: ResolvedRequest, model: Maker) -> Provenance:
    """What made a video, for its file's metadata."""
    settings: dict[str, Any] = {
        name: value for name in _PLAIN if (value := getattr(request, name)) is not None
    }
    if request.sigmas is not None:
        settings["sigmas"] = list(request.sigmas)
    if request.shots:
        settings["shots"] = [asdict(shot) for shot in request.shots]
    if request.guidance != Guidance():
        settings["guidance"] = asdict(request.guidance)
    if request.window is not None:
        settings["window"] = asdict(request.window)
    if request.clips:
        settings["clips"] = [_clip_to_json(clip) for clip in request.clips]
    if request.init is not None:
        settings["init"] = _frames_to_json(request.init)
    if request.camera is not None:
        settings["camera"] = {"told": request.camera.told, "sha256": request.camera.sha256}
    if request.latents is not None:
        noise = request.latents.detach().float().cpu().contiguous().numpy()
        settings["latents"] = {"sha256": _hash(noise.tobytes())}
    if model.loras or request.loras:
        settings["loras"] = [record.to_json() for record in (*model.loras, *request.loras)]
    settings["model_hash"] = model.weights_hash
    settings["device"] = model.device.type
    settings["dtype"] = model.dtype_name
    coded, own = (str(d).removeprefix("torch.") for d in (model.vae_dtype, model.dtype))
    if coded != ("float32" if model.device.type == "cpu" else own):
        settings["vae_dtype"] = coded  # it was asked for: else it follows from the device
    return Provenance(
        prompt=request.prompt,
        seed=request.seed,
        model=model.name,
        version=version(),
        settings=settings,
    )


def request_of(provenance: Provenance, make: Make, *, folder: Path | None = None) -> VideoRequest:
    """The request that made a result.

    make: makes the videos that the request started from, where it started from some. folder: that
    of the result; clips are looked for there, and in the current folder. Adapters are left out:
    `loras_of` has them, for a request or for loading.
    Raises RequestError or MediaError for a clip that is missing, was changed, or was never a file.
    """
    settings = provenance.settings
    values: dict[str, Any] = {name: settings[name] for name in _PLAIN if name in settings}
    if "latents" in settings:
        raise RequestError(
            "it was made from initial noise given in memory, which its file does not hold; pass "
            f"`latents` with sha256 {settings['latents']['sha256'][:12]} in a request of your own"
        )
    try:
        if "sigmas" in settings:
            values["sigmas"] = tuple(settings["sigmas"])
        if "shots" in settings:
            values["shots"] = tuple(Shot(**shot) for shot in settings["shots"])
        if "guidance" in settings:
            values["guidance"] = Guidance(**settings["guidance"])
        if "window" in settings:
            kind = SparsePlan if "reach" in settings["window"] else WindowPlan
            values["window"] = kind(**settings["window"])
        if "clips" in settings:
            values["clips"] = tuple(
                _clip_from_json(clip, make, folder) for clip in settings["clips"]
            )
        if "camera" in settings:
            values["camera"] = _camera_from_json(settings["camera"], folder)
        if "init" in settings:
            values["init"] = _frames_from_json(settings["init"], make, folder)
    except (TypeError, KeyError, AttributeError) as error:
        raise RequestError(f"its metadata are not this engine's: {error}") from error
    return VideoRequest(provenance.prompt, seed=provenance.seed, **values)


def loras_of(provenance: Provenance, *, folder: Path | None = None) -> tuple[Lora, ...]:
    """The adapters that a result was made with, found as its clips are; raises likewise."""
    try:
        records = [LoraRecord(**record) for record in provenance.settings.get("loras", ())]
    except TypeError as error:
        raise RequestError(f"its metadata are not this engine's: {error}") from error
    return tuple(
        Lora(
            _find(Path(Path(r.name).name), r.sha256, folder, "adapter"),
            r.strength,
            r.expert,
        )
        for r in records
    )


def _camera_from_json(record: dict[str, Any], folder: Path | None) -> str | Path:
    """Moves as they were told, or the pose file."""
    if not record["sha256"]:
        return str(record["told"])
    if not record["told"]:
        raise RequestError(
            f"it was made from camera poses given in memory (sha256 {record['sha256'][:12]}), not "
            "from a file; give them in a request of your own"
        )
    return _find(Path(Path(record["told"]).name), record["sha256"], folder, "pose file")


def _clip_to_json(clip: Clip) -> dict[str, Any]:
    record: dict[str, Any] = {"at": int(clip.at), "frames": _frames_to_json(clip.frames)}
    if clip.mask is not None:
        mask = np.asarray(clip.mask, dtype=bool)
        bits = zlib.compress(np.packbits(mask).tobytes(), 9)
        record["mask"] = {"shape": list(mask.shape), "bits": base64.b64encode(bits).decode()}
    return record


def _clip_from_json(record: dict[str, Any], make: Make, folder: Path | None) -> Clip:
    mask = None
    if "mask" in record:
        shape = record["mask"]["shape"]
        size = int(np.prod(shape))
        packed = zlib.decompressobj().decompress(
            base64.b64decode(record["mask"]["bits"]), -(-size // 8)
        )
        bits = np.unpackbits(np.frombuffer(packed, np.uint8))
        mask = bits[:size].astype(bool).reshape(shape)
    return Clip(_frames_from_json(record["frames"], make, folder), at=record["at"], mask=mask)


def _frames_to_json(frames: Frames) -> dict[str, Any]:
    if isinstance(frames, Footage):
        inner = _frames_to_json(frames.frames)
        stop = None if frames.stop is None else integer("a clip's stop", frames.stop, 0)
        return {**inner, "start": integer("a clip's start", frames.start, 0), "stop": stop}
    if isinstance(frames, (str, PathLike)):
        path = Path(frames)
        return {"name": path.name or path.resolve().name, "sha256": _hash_path(path)}
    if isinstance(frames, Video) and frames.provenance is not None:
        origin = frames.provenance
        return {"made": {f.name: getattr(origin, f.name) for f in fields(origin)}}
    return {"sha256": frames_hash(frames)}


def frames_hash(frames: WholeFrames) -> str:
    """SHA-256 of a file, of the files of a folder, or of frames in memory, as hex digits."""
    if isinstance(frames, (str, PathLike)):
        return _hash_path(Path(frames))
    return _hash(np.ascontiguousarray(as_array(frames)).tobytes())


def _frames_from_json(record: dict[str, Any], make: Make, folder: Path | None) -> Frames:
    whole: WholeFrames
    if "made" in record:
        whole = make(request_of(Provenance(**record["made"]), make, folder=folder))
    elif "name" in record:
        whole = _find(Path(Path(record["name"]).name), record["sha256"], folder)
    elif "path" in record:  # of version 0.2 and before, which wrote the whole path
        whole = _find(Path(record["path"]), record["sha256"], folder)
    else:
        raise RequestError(
            f"it was made from frames given in memory (sha256 {record['sha256'][:12]}), not from a "
            "file; give them in a request of your own"
        )
    if "start" in record:
        return Footage(whole, record["start"], record["stop"])
    return whole


def _find(path: Path, sha256: str, folder: Path | None, what: str = "clip") -> Path:
    """The file: beside the result or in the current folder, if it is still the same."""
    here = Path.cwd()
    places = [path, here / path.name]
    if folder is not None:
        places[:0] = [folder / path, folder / path.name]
    found = [place for place in places if place.exists()]
    if not found:
        looked = here if folder is None else f"{folder}, and not in {here}"
        raise MediaError(
            f"the {what} {path.name} (sha256 {sha256[:12]}) is not there any more: it is not in "
            f"{looked}; a copy of it, or a link to it, beside the result would work"
        )
    for place in found:
        if (place.is_file() or place.is_dir()) and _hash_path(place) == sha256:
            return place
    raise MediaError(f"the {what} {found[0]} is not the file it was (sha256 {sha256[:12]})")


def _hash_path(path: Path) -> str:
    if path.is_dir():
        names = sorted(p for p in path.iterdir() if p.is_file())
        return _hash("".join(f"{p.name}:{_hash_path(p)}\n" for p in names).encode())
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
