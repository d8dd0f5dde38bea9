"""What a caller asks of a world that is driven while it is made, and the same checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

from sora_engine.config import Limits
from sora_engine.errors import RequestError, SessionError
from sora_engine.request.checks import finite, flag, integer, positive, shown
from sora_engine.request.driving import Driving
from sora_engine.request.facts import KnownMode, LatentGrid, ModelFacts
from sora_engine.request.request import VideoRequest
from sora_engine.request.resolve import ResolvedRequest, resolve_request
from sora_engine.request.steps import levels

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch

MEMORY_BYTES = 64 * 2**20
"""What a session's memory of places may take where a request does not say."""
REWIND = 16
"""Steps that a session can go back by, without a mark, where a request does not say."""
MOST_FRAMES = 256
"""The most latent frames that a session's step may see."""


@dataclass(frozen=True, slots=True, eq=False)
class SessionRequest:
    """A world that is driven while it is made, a latent frame at a time.

    None stands for the checkpoint's own default everywhere. Making a request checks nothing:
    `Engine.open_session` raises RequestError for a bad value.

    Args:
        prompt: what the world is; `Action.prompt` changes it on the way.
        first: the picture that it begins with, uint8 `[height, width, 3]`, a PIL image or a file,
            of the session's size; None: the prompt makes one.
        height, width: pixels of a frame.
        fps: frames a second, for `Session.stream` and recordings.
        num_inference_steps: denoising steps of each latent frame.
        sigmas: their noise levels, as of `VideoRequest`. Without them they fall evenly from 1,
            through the checkpoint's shift.
        first_steps: those of the first one, where the prompt makes it.
        guidance_scale: classifier-free guidance; 1, which is the default, means none.
        negative_prompt: what guidance steers away from.
        solver: `"euler"`, `"renoise"`, ...
        seed: of all noise. Drawn at random where it is None; `Session.seed` tells it.
        context: latent frames just before the new one that the model sees, at least 1.
        recall: at most so many earlier ones that it sees, because they show what comes into view
            again; 0: none.
        place: where the session begins, in pixels down and right of the world's origin. It matters
            where two sessions share a memory.
        memory_bytes: what the memory of places may take. What was seen longest ago goes first.
        rewind: how many steps `Session.rewind(steps=...)` can go back at most. Each of them keeps
            the state of the decoder.
        exact: its steps are packed with nobody, so that they are the same bytes in any company.
    """

    prompt: str = ""
    first: np.ndarray | torch.Tensor | PIL.Image.Image | str | PathLike[str] | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    sigmas: Sequence[float] | None = None
    first_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    solver: str | None = None
    seed: int | None = None
    context: int | None = None
    recall: int | None = None
    place: tuple[float, float] = (0.0, 0.0)
    memory_bytes: int | None = None
    rewind: int | None = None
    exact: bool = False


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ResolvedSession:
    """A request with every default filled in and every value checked.

    video: of a single frame: texts, size, seed, solver, guidance.
    first: uint8 `[height, width, 3]`, or None.
    """

    video: ResolvedRequest
    driving: Driving
    first: np.ndarray | None
    place: tuple[float, float]
    memory_bytes: int
    rewind: int
    exact: bool

    def of_step(self, grid: LatentGrid, seen: int, prompt: str) -> ResolvedRequest:
        """What a job of one latent frame asks for, on a canvas of `seen` others and it."""
        first = seen == 0
        steps = self.driving.first_steps if first else self.driving.num_inference_steps
        return replace(
            self.video,
            prompt=prompt,
            num_frames=1 if first else grid.time,
            canvas_frames=seen * grid.time + 1,
            num_inference_steps=steps,
            sigmas=None if first else self.driving.sigmas,
        )

    def to_json(self) -> dict[str, Any]:
        """All but the picture, as JSON values, for `request_from_json`."""
        video, driving = self.video, self.driving
        return {
            "prompt": video.prompt,
            "height": video.height,
            "width": video.width,
            "fps": driving.fps,
            "num_inference_steps": driving.num_inference_steps,
            "sigmas": None if driving.sigmas is None else list(driving.sigmas),
            "first_steps": driving.first_steps,
            "guidance_scale": video.guidance_scale,
            "negative_prompt": video.negative_prompt,
            "solver": video.solver,
            "seed": video.seed,
            "context": driving.context,
            "recall": driving.recall,
            "place": list(self.place),
            "memory_bytes": self.memory_bytes,
            "rewind": self.rewind,
            "exact": self.exact,
        }


class WorldFacts(ModelFacts, Protocol):
    """What a session must know of a checkpoint, beside what any request does."""

    @property
    def name(self) -> str: ...
    @property
    def driving(self) -> Driving | None:
        """How its worlds are driven; None where it takes no actions."""
        ...


def request_from_json(values: Any, first: np.ndarray | None) -> SessionRequest:
    """The request that `ResolvedSession.to_json` wrote; RequestError for other values."""
    known = set(SessionRequest.__slots__) - {"first"}
    if not isinstance(values, dict) or not set(values) <= known:
        raise RequestError(f"a session's request has {sorted(known)}, got {shown(values)}")
    return SessionRequest(**values, first=first)


def resolve_session(
    request: SessionRequest, facts: WorldFacts, limits: Limits, *, solvers: Sequence[str] = ()
) -> ResolvedSession:
    """Fill in defaults and check all. Raises SessionError where the checkpoint makes no worlds, and
    RequestError, which names a bad value and what would work."""
    if not isinstance(request, SessionRequest):
        raise RequestError(
            f"a session's request must be a SessionRequest, got {type(request).__name__}"
        )
    own = facts.driving
    if own is None:
        raise SessionError(
            f"{facts.name} takes no actions: it makes whole videos, from a VideoRequest. "
            'Checkpoints that take actions have "actions" in their generation_config.json'
        )
    if facts.known_mode is not KnownMode.NOISE_LEVEL:
        raise SessionError(
            f"a session's past is known at noise level 0, and {facts.name} takes known frames by "
            f"{facts.known_mode.value}; a checkpoint with expand_timesteps would work"
        )
    sigmas = None if request.num_inference_steps is not None else own.sigmas
    if request.sigmas is not None:
        sigmas = levels("sigmas", request.sigmas)
    steps = own.num_inference_steps if sigmas is None else len(sigmas)
    driving = replace(
        own,
        sigmas=sigmas,
        context=_count("context", request.context, own.context, 1, MOST_FRAMES),
        recall=_count("recall", request.recall, own.recall, 0, MOST_FRAMES),
        num_inference_steps=_count(
            "num_inference_steps",
            request.num_inference_steps,
            steps,
            1,
            limits.max_inference_steps,
        ),
        first_steps=_count(
            "first_steps", request.first_steps, own.first_steps, 1, limits.max_inference_steps
        ),
        fps=own.fps if request.fps is None else positive("fps", request.fps),
    )
    if sigmas is not None and driving.num_inference_steps != len(sigmas):
        raise RequestError(
            f"num_inference_steps = {driving.num_inference_steps} and {len(sigmas)} sigmas "
            "disagree; leave one out"
        )
    if facts.grid.patch[0] != 1:
        raise SessionError(
            f"tokens of {facts.name} hold {facts.grid.patch[0]} latent frames, not 1"
        )
    scale = 1.0 if request.guidance_scale is None else request.guidance_scale
    video = resolve_request(
        VideoRequest(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            height=request.height,
            width=request.width,
            num_frames=1,
            fps=driving.fps,
            num_inference_steps=driving.num_inference_steps,
            guidance_scale=scale,
            solver=request.solver,
            seed=request.seed,
            ladder="",
        ),
        facts,
        limits,
        solvers=solvers,
    )
    return ResolvedSession(
        video=video,
        driving=driving,
        first=_picture(request.first, video),
        place=_place(request.place),
        memory_bytes=_count("memory_bytes", request.memory_bytes, MEMORY_BYTES, 0, 2**62),
        rewind=_count("rewind", request.rewind, REWIND, 0, 100_000),
        exact=flag("exact", request.exact),
    )


def _count(name: str, value: object, default: int, least: int, most: int) -> int:
    number = integer(name, value, default)
    if not least <= number <= most:
        raise RequestError(f"{name} must be from {least} to {most}, got {number}")
    return number


def _place(value: object) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise RequestError(f"place must be pixels down and right, got {shown(value)}")
    return finite("place", value[0], None), finite("place", value[1], None)


def _picture(first: object, video: ResolvedRequest) -> np.ndarray | None:
    """The first frame. It is not scaled: what moves by whole tiles would be off them then."""
    if first is None:
        return None
    from pathlib import Path

    from sora_engine.io.images import read_image
    from sora_engine.request.frames import as_array

    if isinstance(first, (str, PathLike)):
        first = read_image(Path(first))
    frames = as_array(first, "session")
    if len(frames) != 1:
        raise RequestError(f"a session begins with one picture, got {len(frames)} frames")
    height, width = frames.shape[1:3]
    if (height, width) != (video.height, video.width):
        raise RequestError(
            f"the first picture is {width}x{height} and the session's frames are "
            f"{video.width}x{video.height}; a picture of that size, or height={height} and "
            f"width={width}, would work"
        )
    picture: np.ndarray = frames[0].copy()  # the caller's may change
    return picture
