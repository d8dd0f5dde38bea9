"""Finished latents in a file: what is left to do of a video is its decoding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sora_engine.errors import MediaError
from sora_engine.io.atomic import write_atomically
from sora_engine.io.provenance import Provenance

SUFFIX = ".latents.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class SavedLatents:
    """Latents float32 `[channels, latent_frames, latent_height, latent_width]`, as the VAE decoder
    takes them (`Video.latents`), and what a decoder must know beside them.

    model: what `Engine.from_pretrained` was given. size: number of frames, height and width of the
    video, where what the latents hold is larger: it is the middle of the first frames.
    """

    latents: Tensor
    fps: float
    loop: bool
    model: str
    provenance: Provenance | None = None
    size: tuple[int, int, int] | None = None

    def write(self, path: str | Path) -> Path:
        """Write the file whole or not at all; MediaError where that cannot be."""
        path = Path(path)
        metadata = {"fps": repr(self.fps), "loop": str(int(self.loop)), "model": self.model}
        if self.size is not None:
            metadata["size"] = "x".join(map(str, self.size))
        if self.provenance is not None:
            metadata["provenance"] = self.provenance.to_json()
        try:
            write_atomically(path, save({"latents": self.latents.float().contiguous()}, metadata))
        except OSError as error:
            raise MediaError(f"{path} cannot be written: {error.strerror}") from error
        return path

    @classmethod
    def read(cls, path: str | Path) -> SavedLatents:
        """Read `write`'s file; MediaError for any other."""
        path = Path(path)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                names = list(file.keys())
                if names != ["latents"] or "fps" not in metadata:
                    raise MediaError(f"{path} holds {names}: these are no finished latents")
                latents = file.get_tensor("latents")
            fps, loop = float(metadata["fps"]), metadata.get("loop") == "1"
            size = None
            if "size" in metadata:
                num_frames, height, width = map(int, metadata["size"].split("x"))
                size = num_frames, height, width
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, MediaError):
                raise
            raise MediaError(f"{path} cannot be read as latents: {error}") from error
        if latents.ndim != 4 or latents.dtype != torch.float32 or 0 in latents.shape:
            raise MediaError(
                f"{path}: latents are float32 [channels, latent_frames, latent_height, "
                f"latent_width], got {latents.dtype} {list(latents.shape)}"
            )
        provenance = Provenance.from_json(metadata.get("provenance", ""))
        return cls(latents, fps, loop, metadata.get("model", ""), provenance, size)
