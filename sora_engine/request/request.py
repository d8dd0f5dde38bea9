"""What a caller asks for, and its check against what the model can make."""

from __future__ import annotations

import itertools
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import TYPE_CHECKING, TypeAlias

from sora_engine.config import Limits
from sora_engine.denoise.guidance import Guidance
from sora_engine.errors import RequestError
from sora_engine.request.checks import finite, integer, positive, several

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch

    from sora_engine.denoise.windows import SparsePlan, WindowPlan
    from sora_engine.video import Video

    WholeFrames: TypeAlias = np.ndarray | PIL.Image.Image | str | PathLike[str] | Video
    Frames: TypeAlias = "WholeFrames | Footage"

MAX_SEED = 2**63 - 1
MAX_RESAMPLE = 50


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
        negative_prompt: what guidance steers away from.
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
    negative_prompt: str = ""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGrid:
    """How pixels map to latents: the sizes that a model can make.

    spatial: (height, width) multiple in pixels of one token; time: frames to a latent frame;
    vae_spatial: pixels to a latent, each way.
    """

    channels: int
    vae_spatial: int
    patch: tuple[int, int, int]
    time: int

    @property
    def multiple(self) -> tuple[int, int]:
        return self.vae_spatial * self.patch[1], self.vae_spatial * self.patch[2]

    def latent_frames(self, num_frames: int, *, loop: bool) -> int:
        return num_frames // self.time if loop else (num_frames - 1) // self.time + 1

    def shape(
        self, height: int, width: int, num_frames: int, *, loop: bool
    ) -> tuple[int, int, int, int]:
        """`(channels, latent_frames, latent_height, latent_width)`."""
        frames = self.latent_frames(num_frames, loop=loop)
        return self.channels, frames, height // self.vae_spatial, width // self.vae_spatial

    def frames_of(self, latent_frame: int, *, loop: bool) -> range:
        """The video frames that a latent frame holds: one for the first (unless in a loop)."""
        if loop:
            return range(latent_frame * self.time, (latent_frame + 1) * self.time)
        return range(max(0, (latent_frame - 1) * self.time + 1), latent_frame * self.time + 1)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ResolvedRequest:
    """A request with every default filled in and every value checked."""

    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float
    shift: float | None
    sigmas: tuple[float, ...] | None
    solver: str | None
    seed: int
    clips: tuple[Clip, ...]
    init: Frames | None
    strength: float | None
    loop: bool
    shots: tuple[Shot, ...]
    guidance: Guidance
    window: WindowPlan | SparsePlan | None
    latents: torch.Tensor | None
    resample: int = 1
    original_prompt: str | None = None


def resolve_request(
    request: VideoRequest,
    defaults: GenerationDefaults,
    grid: LatentGrid,
    limits: Limits,
    *,
    solvers: Sequence[str] = (),
) -> ResolvedRequest:
    """Fill in defaults and check all; `RequestError` names a bad value and what would work."""
    if not isinstance(request, VideoRequest):
        raise RequestError(f"a request must be a VideoRequest, got {type(request).__name__}")
    given = {f.name: getattr(request, f.name) for f in fields(request)}
    for name in ("prompt", "negative_prompt"):
        if not isinstance(given[name], str):
            raise RequestError(f"{name} must be a string, got {type(given[name]).__name__}")
        if len(given[name]) > limits.max_prompt_chars:
            raise RequestError(
                f"{name} has {len(given[name])} characters; at most {limits.max_prompt_chars}"
            )
    loop = bool(request.loop)
    nearest = bool(request.round_to_grid)
    height = _on_grid("height", given["height"], defaults.height, grid.multiple[0], 0, nearest)
    width = _on_grid("width", given["width"], defaults.width, grid.multiple[1], 0, nearest)
    shots: tuple[Shot, ...] = several("shots", request.shots, "Shot(prompt, num_frames)")
    default_frames = sum(_shot_frames(shot) for shot in shots) or defaults.num_frames
    if loop and given["num_frames"] is None and not shots:
        default_frames = max(grid.time, default_frames // grid.time * grid.time)
    num_frames = _on_grid(
        "num_frames", given["num_frames"], default_frames, grid.time, 0 if loop else 1, nearest
    )
    if height * width > limits.max_pixels:
        raise RequestError(
            f"{width}x{height} is {height * width} pixels; at most {limits.max_pixels}, so "
            f"{_size_within(limits.max_pixels, height, width, grid)} would work"
        )
    if num_frames > limits.max_frames:
        time = math.lcm(grid.time, 4)
        longest, _ = nearest_on_grid(limits.max_frames, time, 0 if loop else 1)
        raise RequestError(
            f"num_frames is {num_frames}; at most {limits.max_frames}, so {longest} would work"
        )
    if shots and sum(shot.num_frames for shot in shots) != num_frames:
        raise RequestError(
            f"the shots have {sum(shot.num_frames for shot in shots)} frames together; "
            f"they must fill num_frames = {num_frames}"
        )
    steps = integer(
        "num_inference_steps", given["num_inference_steps"], defaults.num_inference_steps
    )
    if not 1 <= steps <= limits.max_inference_steps:
        raise RequestError(
            f"num_inference_steps must be from 1 to {limits.max_inference_steps}, got {steps}"
        )
    sigmas = None
    if request.sigmas is not None:
        levels = several("sigmas", request.sigmas, "noise levels")
        sigmas = tuple(finite("sigmas", s, None) for s in levels)
        falling = all(a > b for a, b in itertools.pairwise(sigmas))
        if not sigmas or not falling or not all(0 < s <= 1 for s in sigmas):
            raise RequestError(f"sigmas must fall strictly, within (0, 1], got {list(sigmas)}")
        steps = len(sigmas)
    guidance = request.guidance or Guidance()
    if not isinstance(guidance, Guidance):
        raise RequestError(f"guidance must be a Guidance, got {type(guidance).__name__}")
    scale = given["guidance_scale"]
    if scale is None and request.guidance is not None:
        scale = guidance.scale
    guidance_scale = finite("guidance_scale", scale, defaults.guidance_scale)
    # As in diffusers, a scale that a caller gives holds for both experts.
    second = guidance_scale if scale is not None else defaults.guidance_scale_2
    guidance_scale_2 = finite(
        "guidance_scale_2",
        given["guidance_scale_2"],
        guidance_scale if second is None else second,
    )
    shift = None if request.shift is None else positive("shift", request.shift)
    fps = positive("fps", defaults.fps if request.fps is None else request.fps)
    if request.solver is not None and solvers and request.solver not in solvers:
        raise RequestError(f"solver must be one of {list(solvers)}, got {request.solver!r}")
    seed = secrets.randbelow(2**32) if request.seed is None else integer("seed", request.seed, 0)
    if not 0 <= seed <= MAX_SEED:
        raise RequestError(f"seed must be from 0 to 2**63 - 1, got {seed}")
    strength = None
    if request.init is None and request.strength is not None:
        raise RequestError("strength says how far back `init` is taken: give an `init` video too")
    if request.init is not None:
        strength = finite("strength", request.strength, 0.6)
        if not 0 < strength <= 1:
            raise RequestError(f"strength must lie in (0, 1], got {strength}")
    window = request.window
    if window is not None and not callable(getattr(window, "holds", None)):  # it needs torch
        raise RequestError(
            f"window must be a WindowPlan or a SparsePlan, got {type(window).__name__} {window!r}"
        )
    resample = integer("resample", request.resample, 1)
    if not 1 <= resample <= MAX_RESAMPLE:
        raise RequestError(f"resample must be from 1 to {MAX_RESAMPLE}, got {resample}")
    if request.latents is not None:
        _check_latents(request.latents, grid.shape(height, width, num_frames, loop=loop))
    return ResolvedRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt or defaults.negative_prompt,
        height=height,
        width=width,
        num_frames=num_frames,
        fps=fps,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        guidance_scale_2=guidance_scale_2,
        guidance=guidance,
        shift=shift,
        sigmas=sigmas,
        solver=request.solver or defaults.solver,
        seed=seed,
        clips=_checked_clips(several("clips", request.clips, "Clip(frames, at)"), num_frames),
        init=request.init,
        strength=strength,
        loop=loop,
        shots=shots,
        window=window,
        latents=request.latents,
        resample=resample,
        original_prompt=request.original_prompt,
    )


def nearest_on_grid(value: int, multiple: int, remainder: int = 0) -> tuple[int, int]:
    """The values below and above `value` (itself twice, if it fits) that leave `remainder`."""
    smallest = remainder if remainder > 0 else multiple
    below = max(smallest, (value - remainder) // multiple * multiple + remainder)
    above = below if below >= value else below + multiple
    return below, above


def _on_grid(
    name: str, value: object, default: int, multiple: int, remainder: int, nearest: bool
) -> int:
    number = integer(name, value, default)
    if number < 1:
        raise RequestError(f"{name} must be at least {remainder or multiple}, got {number}")
    below, above = nearest_on_grid(number, multiple, remainder)
    if number in (below, above):
        return number
    if nearest:
        return below if number - below <= above - number else above
    rule = f"a multiple of {multiple}" + (f" plus {remainder}" if remainder else "")
    choice = f"{below} or {above}" if below < number else f"{below}"
    raise RequestError(f"{name} must be {rule}, got {number}; the nearest are {choice}")


def _size_within(max_pixels: int, height: int, width: int, grid: LatentGrid) -> str:
    """About the largest WIDTHxHEIGHT of this shape that the model and the limit allow.

    Of the coarsest grid of all models, for checks that are made before the model is known.
    """
    rows, columns = (math.lcm(multiple, 32) for multiple in grid.multiple)
    shorter = math.isqrt(max_pixels * height // width)
    height = max(rows, shorter // rows * rows)
    return f"{max(columns, max_pixels // height // columns * columns)}x{height}"


def _shot_frames(shot: Shot) -> int:
    if not isinstance(shot, Shot):
        raise RequestError(f"shots must be Shot objects, got {type(shot).__name__}")
    if not isinstance(shot.prompt, str):
        raise RequestError(f"a shot's prompt must be a string, got {type(shot.prompt).__name__}")
    frames = integer("a shot's num_frames", shot.num_frames, 0)
    if frames < 1:
        raise RequestError(f"a shot's num_frames must be at least 1, got {frames}")
    return frames


def _checked_clips(clips: Sequence[Clip], num_frames: int) -> tuple[Clip, ...]:
    """Types and starts; lengths and overlaps are known once the frames are read."""
    for clip in clips:
        if not isinstance(clip, Clip):
            raise RequestError(f"clips must be Clip objects, got {type(clip).__name__}")
        at = integer("a clip's `at`", clip.at, 0)
        if not 0 <= at < num_frames:
            raise RequestError(
                f"a clip begins at frame {at}; frames run from 0 to {num_frames - 1}"
            )
    return tuple(sorted(clips, key=lambda clip: clip.at))


def _check_latents(latents: object, shape: tuple[int, ...]) -> None:
    actual = getattr(latents, "shape", None)
    if actual is None or tuple(actual) != shape:
        got = type(latents).__name__ if actual is None else tuple(actual)
        raise RequestError(
            f"latents must be a float32 tensor [channels, latent_frames, latent_height, "
            f"latent_width] = {shape} for this request, got {got}"
        )
