"""Cascades: a video made small, and taken to its size and rate by further passes.

A base pass makes few pixels and few frames, and each stage after it makes them more, with a model,
a noise level and a number of steps of its own (Imagen Video, arXiv 2210.02303). What a stage is
given is brought to the noise level from which it sets out, and the model is told that level: so it
knows how far to trust what it sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from sora_engine.errors import RequestError
from sora_engine.request.checks import finite, integer, shown
from sora_engine.request.facts import KnownMode, ModelFacts, nearest_on_grid
from sora_engine.request.request import Clip, VideoRequest

if TYPE_CHECKING:
    import numpy as np

    from sora_engine.video import Video

SPATIAL_STRENGTH = 0.4
TEMPORAL_STRENGTH = 0.5
"""How far back towards noise a stage takes what it is given, where it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One pass over the video that the pass before it made.

    scale: what each side is multiplied by, 1 or more. frames: by how many frames each one is
        followed, itself included: 2 makes one between each two, and doubles the rate.
    strength: in (0, 1], how far back towards noise it begins. None: as is usual for its kind; and
        where frames are added and a model's latents hold one frame each, the frames that there are
        are known, and stay as they are.
    steps, guidance_scale, sigmas, prompt: as of a `VideoRequest`; None: the base's, but for steps,
        which are the model's own.
    upsampler: a folder or file of a latent upsampler, which makes the latents larger in place of
        pixels.
    engine: the name of the engine that does it, for a checkpoint of its own; None: the base's.
    """

    scale: float = 1.0
    frames: int = 1
    strength: float | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sigmas: tuple[float, ...] | None = None
    prompt: str | None = None
    upsampler: str | PathLike[str] | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        scale = finite("scale", self.scale, 1.0)
        if not 1.0 <= scale <= 8.0:
            raise RequestError(f"scale {shown(self.scale)}: a stage's is from 1 to 8; 2 is twice")
        if not 1 <= integer("frames", self.frames, 1) <= 8:
            raise RequestError(
                f"frames {shown(self.frames)}: a stage makes 1 to 8 of one; 2 doubles the rate"
            )
        if self.strength is not None and not 0 < finite("strength", self.strength, 1.0) <= 1:
            raise RequestError(f"strength {shown(self.strength)} of a stage must lie in (0, 1]")
        if self.upsampler is not None and not isinstance(self.upsampler, str | PathLike):
            raise RequestError(f"upsampler {shown(self.upsampler)} of a stage must be a path")

    @property
    def noise_level(self) -> float:
        """Its strength, or the usual one for its kind."""
        usual = TEMPORAL_STRENGTH if self.frames > 1 else SPATIAL_STRENGTH
        return usual if self.strength is None else self.strength

    @classmethod
    def parse(cls, text: str) -> Stage:
        """A stage as the command line has it: `scale=2,strength=0.4`. Raises RequestError."""
        kinds = {
            "scale": float, "frames": int, "strength": float, "steps": int,
            "guidance_scale": float, "prompt": str,
        }  # fmt: skip
        values: dict[str, Any] = {}
        for part in text.split(","):
            name, given, value = part.strip().partition("=")
            if not given or name not in kinds or name in values:
                raise RequestError(
                    f"stage {text!r}: {part.strip()!r} is none of NAME=VALUE once each, with "
                    f"{', '.join(kinds)}; scale=2,strength=0.4 would work"
                )
            try:
                values[name] = kinds[name](value)
            except ValueError:
                raise RequestError(f"stage {text!r}: {name} {value!r} is no number") from None
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Cascade:
    """A base pass and the stages after it, in order."""

    base: VideoRequest
    stages: tuple[Stage, ...]


def cascade(request: VideoRequest, stages: list[Stage] | tuple[Stage, ...]) -> Cascade:
    """A video by several passes.

    request: the base pass; the result has its size and length times those of all stages.
    Raises RequestError where there is no stage, for one that is none, and for a loop, shots or
    clips, which a stage after the first would not have.
    """
    if not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise RequestError(
            f"stages {shown(stages)}: a cascade has one Stage or more after its base, such as "
            "Stage(scale=2)"
        )
    for name in ("loop", "shots"):
        if getattr(request, name):
            raise RequestError(
                f"{name}: a cascade carries none from stage to stage; leave it out, or make one "
                "pass"
            )
    return Cascade(request, tuple(stages))


def size_after(stage: Stage, size: tuple[int, int, int], model: ModelFacts) -> tuple[int, int, int]:
    """Height, width and frames behind a stage, from those before it: on the model's grid."""
    height, width, frames = size
    rows, columns = model.grid.multiple
    return (
        _near(height * stage.scale, rows),
        _near(width * stage.scale, columns),
        (frames - 1) * stage.frames + 1,
    )


def staged(
    stage: Stage,
    base: VideoRequest,
    made: Video | None,
    size: tuple[int, int, int],
    fps: float,
    model: ModelFacts,
) -> VideoRequest:
    """The request of a stage, over what the stage before made.

    made: None stands for a video of `size` that is not there yet, where memory is planned. size:
        height, width and frames of the stage before; fps: its rate.
    """
    height, width, num_frames = size_after(stage, size, model)
    settings: dict[str, Any] = {
        "height": height, "width": width, "num_frames": num_frames, "fps": fps * stage.frames,
        "num_inference_steps": stage.steps, "sigmas": stage.sigmas, "clips": (), "latents": None,
        "camera": None,  # what it has done is seen in the frames
        "shift": 1.0 if stage.sigmas else base.shift,
    }  # fmt: skip
    if stage.prompt is not None:
        settings["prompt"] = stage.prompt
    if stage.guidance_scale is not None:
        settings["guidance_scale"] = stage.guidance_scale
    if stage.upsampler is not None:  # its latents follow once they are there
        return replace(base, **settings)
    before = _nothing(size) if made is None else made.frames
    frames, known = spread(before, stage.frames) if stage.frames > 1 else (before, None)
    exact = model.grid.time == 1 and model.known_mode in (
        KnownMode.REPLACEMENT, KnownMode.NOISE_LEVEL,
    )  # fmt: skip
    if stage.frames > 1 and stage.scale == 1 and stage.strength is None and exact:
        settings["clips"] = (Clip(frames, at=0, mask=known),)
        return replace(base, **settings)
    # A video brings its own history, by which a file's recipe makes it again.
    start = made if made is not None and stage.frames == 1 else frames
    strength = 1.0 if stage.sigmas else stage.noise_level
    return replace(base, **settings, init=start, strength=strength)


def spread(frames: np.ndarray, times: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 `[n, H, W, 3]` with `times - 1` between each two, which go over from the one to
    the other evenly; and which are the given ones, bool `[m]`."""
    import numpy as np

    count = (len(frames) - 1) * times + 1
    known = np.arange(count) % times == 0
    out = np.empty((count, *frames.shape[1:]), np.uint8)
    out[known] = frames
    for i in range(len(frames) - 1):  # a pair at a time: all of them as floats take twelve times it
        before, after = (frame.astype(np.float32) for frame in frames[i : i + 2])
        for step in range(1, times):
            part = step / times
            out[i * times + step] = ((1 - part) * before + part * after).round()
    return out, known


def _nothing(size: tuple[int, int, int]) -> np.ndarray:
    import numpy as np

    height, width, frames = size
    return np.broadcast_to(np.uint8(0), (frames, height, width, 3))


def _near(value: float, multiple: int) -> int:
    below, above = nearest_on_grid(int(value), multiple)
    return below if value - below <= above - value else above


def upsampler_path(stage: Stage) -> str:
    """The path of a stage's latent upsampler."""
    assert stage.upsampler is not None
    return fspath(stage.upsampler)
