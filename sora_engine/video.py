"""A finished video: frames, latents, and the receipt that says how it was computed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sora_engine.io.provenance import Provenance
from sora_engine.io.video_writer import write_video


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """How a video was computed: enough to compute it again, or to see why two computers differ.

    ops: which backends served each op of `sora_kernels`.
    most_in_company: the most jobs that shared a batch with this one, itself included.
    largest_batch_tokens: tokens of the largest pass that it took part in, others' included.
    noise: `"seed"`, or `"given"` where the request brought its own.
    canvas: what the model made, where that is larger than the video, whose frames are its middle.
    vae_tiles: the tiles in which frames were coded because they did not fit whole, by "decode" and
        "encode"; empty where they did. Frames in tiles are an approximation: edges are blended.
    resumed_at: the step at which it was taken up from a file; None where it ran in one go.
    promised_bytes: the peak of memory that was computed before work began.
    cut_prompts: a line for each text of which the text encoder did not read the end.
    texts_reused: how many of its texts had been encoded for an earlier request, and were kept.
    loras: the adapters that it was made with, as `--lora` has them.
    camera: how the camera was told to move: the moves, or the name of the pose file.
    chosen: on a CPU, why settings that were "auto" have become what they have: `dtype`,
        `vae_dtype`, and attention over long sequences, with the measured rates.
    quantised: by format, which of the transformer's layers have weights that stay quantised.
    lossy: options that trade accuracy, each with its measured relative error; empty unless asked
        for.
    watermark: the payload of the mark that the file's pixels carry, where they were changed for
        one; None where they are what the model made.
    stages: of a cascade, the receipts of the passes before, in order.
    """

    device: str
    dtype: str
    vae: str
    vae_dtype: str
    ops: dict[str, list[str]]
    solver: str
    seed: int
    noise: str
    most_in_company: int
    largest_batch_tokens: int
    canvas: str | None = None
    vae_tiles: dict[str, str] = field(default_factory=dict)
    resumed_at: int | None = None
    promised_bytes: int | None = None
    cut_prompts: list[str] = field(default_factory=list)
    texts_reused: int = 0
    loras: list[str] = field(default_factory=list)
    camera: str | None = None
    chosen: dict[str, str] = field(default_factory=dict)
    quantised: dict[str, str] = field(default_factory=dict)
    lossy: dict[str, float] = field(default_factory=dict)
    watermark: str | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def packed(self) -> bool:
        """Whether any of its steps shared a batch with other jobs."""
        return self.most_in_company > 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "packed": self.packed}


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
        """Write the video, with its provenance in the file's metadata. Returns the path.

        path: `.mp4` (H.264), `.gif`, `.webp`, `.png` (one frame), or a folder of PNGs without a
            suffix. A file that stands there is replaced once the new one is whole.
        options: of `io.video_writer.write_video`.
        Raises MediaError for a path that cannot be written.
        """
        return write_video(path, self.frames, fps=self.fps, provenance=self.provenance, **options)
