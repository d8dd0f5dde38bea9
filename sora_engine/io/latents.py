"""Finished latents in a file: what is left to do of a video is its decoding."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from sora_engine.errors import MediaError
from sora_engine.io.atomic import write_atomically
from sora_engine.io.file_kind import kind_of
from sora_engine.io.provenance import Provenance
from sora_engine.io.whole_file import read_whole

SUFFIX = ".latents.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class SavedLatents:
    """Latents float32 `[channels, latent_frames, latent_height, latent_width]`, as the VAE decoder
    takes them (`Video.latents`), and what a decoder must know beside them.

    model, components: what `Engine.from_pretrained` was given; of two experts both files.
    size: number of frames, height and width of the video, where what the latents hold is larger: it
        is the middle of the first frames.
    """

    latents: Tensor
    fps: float
    loop: bool
    model: str | tuple[str, ...]
    provenance: Provenance | None = None
    components: str | dict[str, str] | None = None
    size: tuple[int, int, int] | None = None

    def write(self, path: str | Path) -> Path:
        """Write the file whole or not at all; MediaError where that cannot be."""
        path = Path(path)
        metadata = {"fps": repr(self.fps), "loop": str(int(self.loop))}
        if _is_text(self.model):
            metadata["model"] = self.model
        else:
            metadata["experts"] = json.dumps(self.model)
        if _is_text(self.components):
            metadata["components"] = self.components
        elif self.components is not None:
            metadata["parts"] = json.dumps(self.components)
        if self.size is not None:
            metadata["size"] = "x".join(map(str, self.size))
        if self.provenance is not None:
            metadata["provenance"] = self.provenance.to_json()
        try:
            write_atomically(path, save({"latents": self.latents.float().contiguous()}, metadata))
        except OSError as error:
            raise MediaError(f"{path} cannot be written: {error.strerror or error}") from error
        return path

    @classmethod
    def read(cls, path: str | Path) -> SavedLatents:
        """Read `write`'s file; MediaError for any other."""
        path = Path(path)
        try:
            tensors, metadata = read_whole(path, partial(_check_kind, path))
            latents = tensors["latents"]
            fps, loop = float(metadata["fps"]), metadata.get("loop") == "1"
            size = None
            if "size" in metadata:
                num_frames, height, width = map(int, metadata["size"].split("x"))
                size = num_frames, height, width
            model: str | tuple[str, ...] = metadata.get("model", "")
            if "experts" in metadata:
                experts = json.loads(metadata["experts"])
                model = experts if isinstance(experts, str) else tuple(map(str, experts))
            components: str | dict[str, str] | None = metadata.get("components")
            if "parts" in metadata:
                parts = json.loads(metadata["parts"])
                named = isinstance(parts, dict)
                components = {str(k): str(v) for k, v in parts.items()} if named else str(parts)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, MediaError):
                raise
            what = kind_of(path)
            reason = error if what is None else f"it is {what}; {_WANTED}"
            raise MediaError(f"{path} cannot be read as latents: {reason}") from error
        if latents.ndim != 4 or latents.dtype != torch.float32 or 0 in latents.shape:
            raise MediaError(
                f"{path}: latents are float32 [channels, latent_frames, latent_height, "
                f"latent_width], got {latents.dtype} {list(latents.shape)}"
            )
        provenance = Provenance.from_json(metadata.get("provenance", ""))
        return cls(latents, fps, loop, model, provenance, components, size)


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it can stand in a header, which is UTF-8. A path in other bytes can as JSON alone,
    which escapes them."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


_WANTED = f"a file of finished latents ends in {SUFFIX}"


def _check_kind(path: Path, names: Sequence[str], metadata: Mapping[str, str]) -> None:
    if list(names) != ["latents"] or "fps" not in metadata:
        raise MediaError(f"{path} {_instead(names, metadata)}")


def _instead(names: Sequence[str], metadata: Mapping[str, str]) -> str:
    """What a safetensors file holds that is no finished latents."""
    if "sora_engine" in metadata:
        return "is a saved job, which has not been denoised to its end: `Engine.resume` goes on"
    some = (
        f"{list(names)}"
        if len(names) < 4
        else f"{len(names)} tensors such as {', '.join(names[:3])}"
    )
    return f"holds {some}: these are no finished latents; {_WANTED}"
