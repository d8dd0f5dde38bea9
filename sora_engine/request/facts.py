"""What requests and tasks must know of a checkpoint: its grid of sizes, its defaults, and how it
takes known frames."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from sora_engine.request.labels import Labels


class KnownMode(StrEnum):
    """How a checkpoint takes known content."""

    NOISE_LEVEL = "noise_level"
    """Known tokens stand in the sample at noise level 0 (Wan 2.2 TI2V-5B)."""
    CHANNELS = "channels"
    """A mask and the known latents come as further input channels (Wan I2V)."""
    FIRST_FRAME = "first_frame"
    """The latents of the first frame come as further input channels, zeros behind them, and no mask
    (Wan 2.1 Fun-Control-Camera)."""
    CHANNELS_AND_LEVEL = "channels_and_level"
    """As CHANNELS, and the first frame stands in the sample at noise level 0 too (Wan 2.2
    Fun-5B-Control-Camera)."""
    VACE = "vace"
    """Control latents come as further input channels: known content, unknown content, and a mask
    (arXiv 2503.07598)."""
    REPLACEMENT = "replacement"
    """The model knows nothing of it: the known part of the sample is replaced by the known content
    at the step's noise level (arXiv 2201.09865)."""

    @property
    def animates(self) -> bool:
        """Whether a checkpoint makes nothing without a picture to begin with."""
        return self in (KnownMode.CHANNELS, KnownMode.FIRST_FRAME, KnownMode.CHANNELS_AND_LEVEL)

    @property
    def by_level(self) -> bool:
        """Whether the noise level tells a model what of its sample is known."""
        return self in (KnownMode.NOISE_LEVEL, KnownMode.CHANNELS_AND_LEVEL)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a checkpoint sets where a request is silent."""

    height: int
    width: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    negative_prompt: str = ""
    max_window: int | None = None
    """Latent frames that the model was trained on; longer videos are denoised in windows."""
    window_schedule: str = "static"
    """How those follow each other: see `WindowPlan`."""
    window_overlap: int | None = None
    """The latent frames that neighbours share then; None: as many as `default_overlap` says."""
    window_anchors: int = 0
    """Where they are chained, the latent frames of the first one that all others see."""
    solver: str | None = None
    """None is the checkpoint's scheduler."""
    ladder: str | None = None
    """The levels of a few-step checkpoint; its number of steps is `num_inference_steps`."""
    example_prompt: str | None = None
    """A prompt of the kind that it was trained on, for who has none yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGrid:
    """How pixels map to latents: the sizes that a model can make.

    channels: of a latent. vae_spatial: pixels to a latent, each way. patch: latents to a token, in
    frames, rows and columns. time: frames to a latent frame. images: whether it makes single
        pictures and nothing else.
    """

    channels: int
    vae_spatial: int
    patch: tuple[int, int, int]
    time: int
    images: bool = False

    @property
    def multiple(self) -> tuple[int, int]:
        """What heights and widths are multiples of: the pixels of one token."""
        return self.vae_spatial * self.patch[1], self.vae_spatial * self.patch[2]

    def latent_frames(self, num_frames: int, *, loop: bool) -> int:
        """How many latent frames hold so many frames."""
        return num_frames // self.time if loop else (num_frames - 1) // self.time + 1

    def shape(
        self, height: int, width: int, num_frames: int, *, loop: bool
    ) -> tuple[int, int, int, int]:
        """`(channels, latent_frames, latent_height, latent_width)`."""
        frames = self.latent_frames(num_frames, loop=loop)
        return self.channels, frames, height // self.vae_spatial, width // self.vae_spatial

    def covering(
        self, height: int, width: int, num_frames: int, *, loop: bool
    ) -> tuple[int, int, int]:
        """The smallest height, width and number of frames on the grid that hold these."""
        rows, columns = self.multiple
        return (
            nearest_on_grid(height, rows)[1],
            nearest_on_grid(width, columns)[1],
            nearest_on_grid(num_frames, self.time, 0 if loop else 1)[1],
        )

    def frames_of(self, latent_frame: int, *, loop: bool) -> range:
        """The video frames that a latent frame holds: one for the first (unless in a loop)."""
        if loop:
            return range(latent_frame * self.time, (latent_frame + 1) * self.time)
        return range(max(0, (latent_frame - 1) * self.time + 1), latent_frame * self.time + 1)


class ModelFacts(Protocol):
    """What is known of a checkpoint without its weights; `engine.model` is one."""

    @property
    def grid(self) -> LatentGrid: ...
    @property
    def defaults(self) -> GenerationDefaults: ...
    @property
    def known_mode(self) -> KnownMode: ...
    @property
    def labels(self) -> Labels | None:
        """Its classes, where it makes pictures of classes in place of texts."""
        ...


def nearest_on_grid(value: int, multiple: int, remainder: int = 0) -> tuple[int, int]:
    """The values below and above `value` (itself twice, if it fits) that leave `remainder`."""
    smallest = remainder if remainder > 0 else multiple
    below = max(smallest, (value - remainder) // multiple * multiple + remainder)
    above = below if below >= value else below + multiple
    return below, above
