"""What a caller asks for: one video, with the clips and the words that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, TypeAlias

from sora_engine.request.guidance import Guidance
from sora_engine.request.windows import SparsePlan, WindowPlan

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch

    from sora_engine.video import Video

    WholeFrames: TypeAlias = np.ndarray | PIL.Image.Image | str | PathLike[str] | Video
    Frames: TypeAlias = "WholeFrames | Footage"


@dataclass(frozen=True, slots=True, eq=False)
class Footage:
    """A part of a clip: its frames `start` to `stop`, counted at the request's frame rate.

    frames: as `Clip.frames`. stop: None stands for the end.
    """

    frames: WholeFrames
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Known frames on the time line of a request.

    frames: uint8 `[n, height, width, 3]`, a PIL image, the path of an image or a video, a `Video`
        that an engine has made, or `Footage`, a part of any of these.
    at: the frame of the time line at which they begin.
    mask: bool `[n, height, width]`, `[height, width]` or `[n]`, True where known; None: everywhere.
    """

    frames: Frames
    at: int = 0
    mask: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Shot:
    """A stretch of the video that reads a text of its own."""

    prompt: str
    num_frames: int


@dataclass(frozen=True, slots=True, eq=False)
class VideoRequest:
    """One video (or, with one frame, one image) to be made.

    None stands for the checkpoint's own default everywhere.

    Args:
        prompt: what the video shows.
        negative_prompt: what guidance steers away from; "" for nothing, whatever the checkpoint's
            own is.
        height, width: pixels; multiples of the VAE's factor times the patch (16 for Wan).
        num_frames: one more than a multiple of the VAE's time factor; in a loop, a multiple of it.
        fps: frames a second of the file that is written.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance (arXiv 2207.12598); 1 and less means none.
        guidance_scale_2: the same for the low-noise expert of a two-expert checkpoint.
        shift: shift of the flow schedule, `s' = k s / (1 + (k - 1) s)`.
        sigmas: explicit noise levels, decreasing, in place of the schedule's.
        solver: `"euler"`, `"unipc"`, ...; by default the checkpoint's own.
        seed: of the initial noise; drawn at random where it is None, and told with the result.
        clips: known frames.
        init: a start video of `num_frames` frames (SDEdit, arXiv 2108.01073), as `Clip.frames`.
        strength: in (0, 1], how far back towards noise `init` is taken.
        loop: the video's end joins its beginning.
        shots: stretches with prompts of their own, which fill `num_frames`.
        window: `WindowPlan` for videos longer than the model's trained length, or `SparsePlan`:
            better where the model bears the whole length, and dearer.
        latents: the initial noise, float32, `LatentGrid.shape`:
            `[channels, latent_frames, latent_height, latent_width]`.
        round_to_grid: take the nearest size and length that the model can make.
        guidance: the kind of guidance and the part of the steps that it covers; its own scale
            counts where `guidance_scale` is None.
        resample: how often each step is taken where a checkpoint was not trained for known frames
            and they are put into its sample (RePaint, arXiv 2201.09865): more make the rest agree
            with them better, at as many times the cost.
        original_prompt: what the prompt was before a prompt upsampler rewrote it; kept with the
            result, and nothing else.
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    shift: float | None = None
    sigmas: Sequence[float] | None = None
    solver: str | None = None
    seed: int | None = None
    clips: Sequence[Clip] = ()
    init: Frames | None = None
    strength: float | None = None
    loop: bool = False
    shots: Sequence[Shot] = ()
    window: WindowPlan | SparsePlan | None = None
    latents: torch.Tensor | None = None
    round_to_grid: bool = False
    guidance: Guidance | None = None
    resample: int = 1
    original_prompt: str | None = None
