"""A finished video: frames, latents, and how it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from sora_engine.io.provenance import Provenance
from sora_engine.io.video_writer import write_video

if TYPE_CHECKING:
    from sora_engine.runtime.receipt import Receipt


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """What a request became.

    frames: uint8 `[num_frames, height, width, 3]`.
    latents: float32 `[channels, latent_frames, latent_height, latent_width]` on the host, as the
        VAE decoder takes them (`latents * latents_std + latents_mean` of the denoised sample, which
        is what diffusers' `vae.decode` takes); empty where a hook checks frames, as latents would
        pass it by.
    fps: frames a second.
    seed: of the initial noise.
    timings_s: seconds spent in each stage.
    provenance: prompt, settings, model and version, as `save` writes them into the file.
    receipt: device, backends, dtypes and company: how it was computed.
    """

    frames: np.ndarray
    latents: Tensor
    fps: float
    seed: int
    timings_s: dict[str, float] = field(default_factory=dict)
    provenance: Provenance | None = None
    receipt: Receipt | None = None

    def save(self, path: str | PathLike[str], **options: Any) -> Path:
        """Write the video: `.mp4`, `.gif`, `.webp`, `.png` (one frame), or a folder of PNGs.

        Raises MediaError for a path that cannot be written.
        """
        return write_video(
            Path(path), self.frames, fps=self.fps, provenance=self.provenance, **options
        )
