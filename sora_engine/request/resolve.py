"""A request with all defaults filled in, checked against what the model can make."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from sora_engine.config import Limits
from sora_engine.errors import RequestError
from sora_engine.request.camera import CameraPath, resolve_camera
from sora_engine.request.checks import finite, flag, integer, positive, several
from sora_engine.request.facts import (
    GenerationDefaults,
    KnownMode,
    LatentGrid,
    ModelFacts,
    nearest_on_grid,
)
from sora_engine.request.guidance import Guidance, needs_unconditional
from sora_engine.request.labels import resolve_label
from sora_engine.request.ladders import with_ladder
from sora_engine.request.limits import check_canvas, check_text
from sora_engine.request.lora import LoraRecord
from sora_engine.request.request import Clip, Shot, VideoRequest
from sora_engine.request.steps import resolve_steps, steps_taken
from sora_engine.request.windows import SparsePlan, WindowPlan, default_plan

if TYPE_CHECKING:
    import torch

    from sora_engine.request.request import Frames

MAX_SEED = 2**63 - 1
MAX_RESAMPLE = 50
EDIT_STRENGTH = 0.6
"""How far back towards noise a start video is taken where a request does not say."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ResolvedRequest:
    """A request with every default filled in and every value checked.

    height, width, num_frames: of the result. canvas_height, canvas_width, canvas_frames: of what
        the model makes, the next size on its grid; the middle of its first frames is the result.
    ladder: the name of the one whose levels `sigmas` are; "" where they are of none.
    window: what it is denoised in: the caller's choice or, where the video is longer than what the
        checkpoint was trained on, the checkpoint's own windows. None: one attention span.
    """

    prompt: str
    negative_prompt: str
    height: int
    width: int
    num_frames: int
    canvas_height: int
    canvas_width: int
    canvas_frames: int
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
    ladder: str = ""
    loras: tuple[LoraRecord, ...] = ()
    label: int | None = None
    camera: CameraPath | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts that it reads: those of its shots, or its prompt, or its class's number."""
        if self.label is not None:
            return (str(self.label),)
        return tuple(shot.prompt for shot in self.shots) or (self.prompt,)

    @property
    def guided(self) -> bool:
        """Whether any step of any expert may take an unconditional prediction."""
        return any(map(needs_unconditional, (self.guidance_scale, self.guidance_scale_2)))

    @property
    def steps_taken(self) -> int:
        """Of `num_inference_steps`, those that a start video of this strength leaves."""
        return steps_taken(self.num_inference_steps, self.strength)

    @property
    def canvas(self) -> str | None:
        """The canvas in words, where it is larger than the result."""
        size = self.canvas_width, self.canvas_height, self.canvas_frames
        if size == (self.width, self.height, self.num_frames):
            return None
        return "{}x{}, {} frames".format(*size)

    def latent_shape(self, grid: LatentGrid) -> tuple[int, int, int, int]:
        """Of the canvas: `(channels, latent_frames, latent_height, latent_width)`."""
        return grid.shape(self.canvas_height, self.canvas_width, self.canvas_frames, loop=self.loop)

    def memory_key(self) -> tuple[object, ...]:
        """All of the request that its memory depends on: everything but words, seed and pixels."""
        contents = ("prompt", "negative_prompt", "original_prompt", "seed", "fps", "label")
        reduced = {
            "clips": bool(self.clips),
            "init": self.init is not None,
            "latents": self.latents is not None,
            "shots": tuple(shot.num_frames for shot in self.shots),
            "camera": self.camera is not None,
        }
        names = [f.name for f in fields(self) if f.name not in contents]
        return tuple(reduced.get(name, getattr(self, name)) for name in names)


def resolve_request(
    request: VideoRequest, facts: ModelFacts, limits: Limits, *, solvers: Sequence[str] = ()
) -> ResolvedRequest:
    """Fill in defaults and check all; `RequestError` names a bad value and what would work.

    facts: of the model. solvers: the names that `request.solver` may have; empty for any.
    """
    if not isinstance(request, VideoRequest):
        raise RequestError(f"a request must be a VideoRequest, got {type(request).__name__}")
    defaults, grid = facts.defaults, facts.grid
    request, ladder = with_ladder(request, defaults.ladder)
    loop = flag("loop", request.loop)
    _check_texts(request, limits)
    shots = _checked_shots(request.shots, limits)
    height, width, num_frames = _resolve_size(request, shots, defaults, grid)
    canvas_height, canvas_width, canvas_frames = grid.covering(height, width, num_frames, loop=loop)
    check_canvas(canvas_height, canvas_width, canvas_frames, grid, limits, loop=loop)
    latent_shape = grid.shape(canvas_height, canvas_width, canvas_frames, loop=loop)
    sigmas, steps = resolve_steps(request, defaults, limits)
    strength = _resolve_strength(request, steps)
    guidance, guidance_scale, guidance_scale_2 = _resolve_guidance(request, defaults)
    taken = steps_taken(steps, strength)
    if guidance.zero_init_steps >= taken:
        raise RequestError(
            f"zero_init_steps = {guidance.zero_init_steps} of {taken} steps leaves none that moves "
            f"the video; at most {taken - 1}"
        )
    if request.solver is not None and solvers and request.solver not in solvers:
        raise RequestError(f"solver must be one of {list(solvers)}, got {request.solver!r}")
    seed = secrets.randbelow(2**32) if request.seed is None else integer("seed", request.seed, 0)
    if not 0 <= seed <= MAX_SEED:
        raise RequestError(f"seed must be from 0 to 2**63 - 1, got {seed}")
    resample = integer("resample", request.resample, 1)
    if not 1 <= resample <= MAX_RESAMPLE:
        raise RequestError(f"resample must be from 1 to {MAX_RESAMPLE}, got {resample}")
    if request.latents is not None:
        _check_latents(request.latents, latent_shape)
    negative_prompt = (
        defaults.negative_prompt if request.negative_prompt is None else request.negative_prompt
    )
    label = resolve_label(
        request.label, request.prompt, negative_prompt, facts.labels, shots=bool(shots)
    )
    if label is not None and facts.labels is not None and negative_prompt.strip():
        negative_prompt = str(facts.labels.index(negative_prompt))
    return ResolvedRequest(
        prompt=request.prompt,
        negative_prompt=negative_prompt,
        label=label,
        height=height,
        width=width,
        num_frames=num_frames,
        canvas_height=canvas_height,
        canvas_width=canvas_width,
        canvas_frames=canvas_frames,
        fps=positive("fps", defaults.fps if request.fps is None else request.fps),
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        guidance_scale_2=guidance_scale_2,
        guidance=guidance,
        shift=None if request.shift is None else positive("shift", request.shift),
        sigmas=sigmas,
        solver=request.solver or defaults.solver,
        seed=seed,
        clips=_checked_clips(several("clips", request.clips, "Clip(frames, at)"), num_frames),
        init=request.init,
        strength=strength,
        loop=loop,
        shots=shots,
        window=_resolve_window(request, facts, latent_shape[1]),
        latents=request.latents,
        resample=resample,
        original_prompt=request.original_prompt,
        ladder=ladder,
        camera=resolve_camera(request.camera, num_frames),
    )


def check_for_mode(request: ResolvedRequest, mode: KnownMode, takes_camera: bool = False) -> None:
    """Refuse what a checkpoint that is told of known frames in this way, and of the camera or not,
    cannot do."""
    if request.camera is not None and not takes_camera:
        raise RequestError(
            f"camera is {request.camera}, and this checkpoint takes none: those with a control "
            "adapter do, the Control-Camera ones (`sora inspect` tells); leave it out, or say in "
            "the prompt how the camera moves"
        )
    if request.resample > 1 and mode is not KnownMode.REPLACEMENT:
        raise RequestError(
            f"resample is {request.resample}: this checkpoint was trained for known frames, and "
            "takes each step once; 1 would work"
        )
    if mode.animates and not request.clips:
        raise RequestError(
            "this checkpoint animates an image: give one, as Clip(image, at=0) in `clips`"
        )
    if mode.animates and request.loop:
        raise RequestError(
            "this checkpoint takes a video whose first latent frame holds one frame alone, and a "
            "loop has no such frame; loop=False would work"
        )


def check_saved(request: ResolvedRequest, grid: LatentGrid, limits: Limits) -> None:
    """That a request which was settled elsewhere, of a saved job, keeps to these limits. Raises
    RequestError."""
    texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    texts |= {f"the prompt of shot {i + 1}": shot.prompt for i, shot in enumerate(request.shots)}
    if request.original_prompt is not None:
        texts["original_prompt"] = request.original_prompt
    for name, text in texts.items():
        check_text(name, text, limits)
    check_canvas(
        request.canvas_height,
        request.canvas_width,
        request.canvas_frames,
        grid,
        limits,
        loop=request.loop,
    )
    if request.num_inference_steps > limits.max_inference_steps:
        raise RequestError(
            f"num_inference_steps must be from 1 to {limits.max_inference_steps}, got "
            f"{request.num_inference_steps}"
        )


def _check_texts(request: VideoRequest, limits: Limits) -> None:
    for name in ("prompt", "negative_prompt", "original_prompt"):
        text: object = getattr(request, name)
        if name == "prompt" or text is not None:
            check_text(name, text, limits)


def _resolve_size(
    request: VideoRequest, shots: Sequence[Shot], defaults: GenerationDefaults, grid: LatentGrid
) -> tuple[int, int, int]:
    """Height, width and number of frames of the result."""
    nearest = flag("round_to_grid", request.round_to_grid)
    if flag("strict_grid", request.strict_grid) and nearest:
        raise RequestError(
            "round_to_grid takes the nearest size and strict_grid refuses it: give one of them"
        )
    loop = bool(request.loop)
    height = _on_grid("height", request.height, defaults.height, grid.multiple[0], 0, request)
    width = _on_grid("width", request.width, defaults.width, grid.multiple[1], 0, request)
    default_frames = sum(shot.num_frames for shot in shots) or defaults.num_frames
    if loop and request.num_frames is None and not shots:
        default_frames = max(grid.time, default_frames // grid.time * grid.time)
    num_frames = _on_grid(
        "num_frames", request.num_frames, default_frames, grid.time, 0 if loop else 1, request
    )
    if grid.images and num_frames != 1:
        raise RequestError(
            f"num_frames is {num_frames}; this checkpoint makes single pictures, so 1 would work"
        )
    if shots and sum(shot.num_frames for shot in shots) != num_frames:
        raise RequestError(
            f"the shots have {sum(shot.num_frames for shot in shots)} frames together; "
            f"they must fill num_frames = {num_frames}"
        )
    return height, width, num_frames


def _resolve_guidance(
    request: VideoRequest, defaults: GenerationDefaults
) -> tuple[Guidance, float, float]:
    """The rule, and the scales of the first and the second expert."""
    guidance = request.guidance or Guidance()
    if not isinstance(guidance, Guidance):
        raise RequestError(f"guidance must be a Guidance, got {type(guidance).__name__}")
    scale = request.guidance_scale
    if scale is None and request.guidance is not None:
        scale = guidance.scale
    first = finite("guidance_scale", scale, defaults.guidance_scale)
    # As in diffusers, a scale that a caller gives holds for both experts.
    default_2 = first if scale is not None else defaults.guidance_scale_2
    second = finite(
        "guidance_scale_2", request.guidance_scale_2, first if default_2 is None else default_2
    )
    return guidance, first, second


def _resolve_strength(request: VideoRequest, steps: int) -> float | None:
    if request.init is None:
        if request.strength is not None:
            raise RequestError(
                "strength says how far back `init` is taken: give an `init` video too"
            )
        return None
    strength = finite("strength", request.strength, EDIT_STRENGTH)
    if not 0 < strength <= 1:
        raise RequestError(f"strength must lie in (0, 1], got {strength}")
    if int(steps * strength) == 0:
        raise RequestError(
            f"strength = {strength} of {steps} steps leaves no step; the least that does is "
            f"{math.ceil(1e4 / steps) / 1e4:g}"
        )
    return strength


def _resolve_window(
    request: VideoRequest, facts: ModelFacts, latent_frames: int
) -> WindowPlan | SparsePlan | None:
    """The request's windows, or those of the model's trained length where the video is longer."""
    window: Any = request.window
    if window is None:
        return _default_window(request, facts.defaults, latent_frames)
    if not isinstance(window, (WindowPlan, SparsePlan)):
        raise RequestError(
            f"window must be a WindowPlan or a SparsePlan, got {type(window).__name__} {window!r}"
        )
    if isinstance(window, WindowPlan) and window.schedule == "chained":
        if facts.known_mode is not KnownMode.NOISE_LEVEL:
            raise RequestError(
                "window schedule 'chained' needs a checkpoint that takes known frames at noise "
                f"level 0; this one takes them by {facts.known_mode.value}: 'static' or 'moving' "
                "would work"
            )
        if request.init is not None:
            raise RequestError(
                "window schedule 'chained' starts every window from noise; with a start video "
                "'static' or 'moving' would work"
            )
    return window


def _default_window(
    request: VideoRequest, defaults: GenerationDefaults, latent_frames: int
) -> WindowPlan | None:
    if defaults.max_window is None or latent_frames <= defaults.max_window:
        return None
    schedule = defaults.window_schedule
    if schedule == "chained" and (request.init is not None or request.shots):
        # What a start video shows is there in every window; and a shot that knew the one before it
        # would go on with that one's scene.
        schedule = "static"
    return default_plan(defaults, schedule)


def _on_grid(
    name: str, value: object, default: int, multiple: int, remainder: int, request: VideoRequest
) -> int:
    """A size or a length as it was asked for, or on the grid where the request wants it there.

    A loop's length is always there: cut, it would not close.
    """
    number = integer(name, value, default)
    closes = name == "num_frames" and bool(request.loop)
    exact = not (request.round_to_grid or request.strict_grid or closes)
    least = 1 if exact else remainder or multiple
    if number < 1:
        raise RequestError(f"{name} must be at least {least}, got {number}")
    below, above = nearest_on_grid(number, multiple, remainder)
    if exact or number in (below, above):
        return number
    if request.round_to_grid:
        return below if number - below <= above - number else above
    rule = f"a multiple of {multiple}" + (f" plus {remainder}" if remainder else "")
    choice = f"{below} or {above}" if below < number else f"{below}"
    raise RequestError(f"{name} must be {rule}, got {number}; the nearest are {choice}")


def _checked_shots(given: object, limits: Limits) -> tuple[Shot, ...]:
    shots = []
    for shot in several("shots", given, "Shot(prompt, num_frames)"):
        if not isinstance(shot, Shot):
            raise RequestError(f"shots must be Shot objects, got {type(shot).__name__}")
        check_text("a shot's prompt", shot.prompt, limits)
        frames = integer("a shot's num_frames", shot.num_frames, 0)
        if frames < 1:
            raise RequestError(f"a shot's num_frames must be at least 1, got {frames}")
        shots.append(Shot(shot.prompt, frames))
    return tuple(shots)


def _checked_clips(clips: Sequence[Clip], num_frames: int) -> tuple[Clip, ...]:
    """Types and starts; lengths and overlaps are known once the frames are read."""
    checked = []
    for clip in clips:
        if not isinstance(clip, Clip):
            raise RequestError(f"clips must be Clip objects, got {type(clip).__name__}")
        at = integer("a clip's `at`", clip.at, 0)
        if not 0 <= at < num_frames:
            raise RequestError(
                f"a clip begins at frame {at}; frames run from 0 to {num_frames - 1}"
            )
        checked.append(clip if type(clip.at) is int else replace(clip, at=at))
    return tuple(sorted(checked, key=lambda clip: clip.at))


def _check_latents(latents: object, shape: tuple[int, ...]) -> None:
    import torch

    if isinstance(latents, torch.Tensor):
        dense = latents.layout is torch.strided and not latents.is_meta
        if tuple(latents.shape) == shape and latents.is_floating_point() and dense:
            return
        got = f"{latents.dtype} {tuple(latents.shape)} on {latents.device}, {latents.layout}"
    else:
        got = type(latents).__name__
    raise RequestError(
        f"latents must be a float32 tensor [channels, latent_frames, latent_height, "
        f"latent_width] = {shape} for this request, got {got}"
    )
