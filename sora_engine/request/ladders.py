"""Ladders: the noise levels, solver and guidance that few-step checkpoints were distilled for.

A distilled model has learned to jump between a few levels and no others, without guidance. Levels
are those that its publishers' code steps through, after their shift.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from sora_engine.errors import RequestError
from sora_engine.request.checks import integer, several, shown
from sora_engine.request.request import VideoRequest


@dataclass(frozen=True, slots=True)
class Ladder:
    """One model's levels.

    sigmas: falling, within (0, 1]; after the last one comes 0. solver: `"euler"` goes along the
        flow, `"renoise"` to the model's x0 and from there, by fresh noise, to the next level.
    files: what the file names of such models and adapters have in them, as a regular expression.
    of: whose models these are.
    scaled_start: whether the first sample is noise times the first level, in place of noise.
    """

    sigmas: tuple[float, ...]
    solver: str
    files: str
    of: str
    scaled_start: bool = False


LADDERS: dict[str, Ladder] = {}
"""By name, which ends in the number of steps: those of the families that are known."""


def register_ladders(ladders: Mapping[str, Ladder]) -> None:
    """Make a family's ladders known. ValueError where another has the name of one."""
    for name, ladder in ladders.items():
        if LADDERS.setdefault(name, ladder) != ladder:
            raise ValueError(f"there is another ladder {name!r} already")


def ladder_named(name: object) -> Ladder:
    """Raises RequestError for a name that there is not, with those that there are."""
    found = LADDERS.get(name) if isinstance(name, str) else None
    if found is None:
        raise RequestError(f"ladder {shown(name)} is not known; there are {', '.join(LADDERS)}")
    return found


def ladder_of_file(name: str) -> str | None:
    """The ladder of a model or an adapter by its file's name, where exactly one is told by it.

    Of a file that names its kind of model and that of its teacher's loader the longest name counts:
    "self-forcing" before "4 steps".
    """
    found: Iterator[tuple[int, str]] = (
        (len(match[0]), key)
        for key, ladder in LADDERS.items()
        if (match := re.search(ladder.files, name.lower())) is not None
    )
    return max(found, default=(0, None))[1]


def ladder_of_adapters(names: Iterable[str]) -> str | None:
    """The one ladder that the file names of a request's or a model's adapters tell; None where they
    tell none, or several."""
    told = {ladder for name in names if (ladder := ladder_of_file(name)) is not None}
    return told.pop() if len(told) == 1 else None


def with_ladder(request: VideoRequest, own: str | None) -> tuple[VideoRequest, str]:
    """The request on its ladder's levels, and the ladder's name; as it is and "" where it has none.

    own: the checkpoint's ladder. That of the request's adapters goes before it, `request.ladder`
    before both; "" switches it off, and so do `sigmas` of the request's own. RequestError for an
    unknown name, and for steps, levels or a shift beside a ladder that has others.
    """
    name = request.ladder
    if name is None and request.sigmas is None:
        adapters = (getattr(lora, "name", "") for lora in several("loras", request.loras, "Loras"))
        name = ladder_of_adapters(adapters) or own
    if name is None or name == "":
        return request, ""
    ladder = ladder_named(name)
    count = len(ladder.sigmas)
    if request.sigmas is not None and tuple(request.sigmas) != ladder.sigmas:
        raise RequestError(
            f"sigmas and ladder {name!r}: the ladder brings its own; give one of the two"
        )
    if integer("num_inference_steps", request.num_inference_steps, count) != count:
        raise RequestError(
            f"num_inference_steps is {request.num_inference_steps}: ladder {name!r} has {count} "
            f"steps and no others; {count} would work, another ladder ({', '.join(LADDERS)}), or "
            "ladder='' for a schedule of any length"
        )
    if request.shift is not None and request.shift != 1.0:
        raise RequestError(
            f"shift is {request.shift}: the levels of ladder {name!r} are shifted already; leave "
            "it out"
        )
    scale = request.guidance_scale
    if scale is None and getattr(request.guidance, "scale", None) is None:
        scale = 1.0  # off; a scale of the caller's own holds
    return (
        replace(
            request,
            sigmas=ladder.sigmas,
            num_inference_steps=None,
            shift=1.0,
            solver=request.solver or ladder.solver,
            guidance_scale=scale,
        ),
        name,
    )
