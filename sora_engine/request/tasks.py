"""The tasks: each turns clips, words and lengths into the `VideoRequest` that a canvas is made of.

    from sora_engine import tasks
    video = engine.generate(tasks.extend(engine.model, "clip.mp4", after_s=2.0, seed=7))

Pure functions of what they are given. `model` is what is known of a checkpoint: its grid of sizes
and its defaults. `**settings` are `VideoRequest`'s own (height, width, fps, seed, ...).

How a clip comes onto the time line, the same for all:

- **rate**: a file is resampled to `fps`, by default the checkpoint's; frame i is the one on screen
  i / fps seconds after the first. Frames in memory are taken as they are.
- **size**: height and width given are taken. Else the clip's own size, made smaller (never larger)
  until it has no more pixels than the checkpoint's default. Frames are scaled until they cover that
  size, and their middle is kept.
- **length**: the clip's own, or with what is added to it. A loop's is a multiple of `grid.time`.
- **grid**: with `round_to_grid=True` or `strict_grid=True` sizes are the nearest on the model's
  grid. A clip that is the whole video loses its last frames down to it, and where frames are added
  there are never fewer.
- **joints**: a latent frame holds several frames, and is known only where all of them are. Frames
  of a clip that share a latent with new ones, at most `grid.time - 1` at a joint, are made anew.
- **prompt**: by default the one that the file carries in its metadata, or none.

Every task with a clip raises RequestError for frames in no form that `Clip` takes, an empty
`Footage` or one outside its clip, a size that is no integer, an `fps` that is not over 0, and a
setting that the task makes itself: its clips, and as a rule `num_frames`. It raises MediaError for
a file that cannot be read. A setting that `VideoRequest` lacks raises TypeError. All other values
are checked when the request is submitted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from sora_engine.errors import RequestError
from sora_engine.request.cascade import Stage as Stage
from sora_engine.request.cascade import cascade as cascade
from sora_engine.request.checks import finite, integer, several, shown
from sora_engine.request.facts import LatentGrid, ModelFacts, nearest_on_grid
from sora_engine.request.masks import read_mask
from sora_engine.request.request import Clip, Shot, VideoRequest
from sora_engine.request.resolve import EDIT_STRENGTH
from sora_engine.request.source import Source, measure, part_of

if TYPE_CHECKING:
    import numpy as np

    from sora_engine.request.request import Frames

DRAFT_SCALE = 0.5
"""Of each side."""
DRAFT_STEPS = 0.5
"""Of the denoising steps."""
UPSCALE_STRENGTH = 0.4
"""Enough noise to draw new detail, too little to move what is there."""


def image(prompt: str = "", **settings: Any) -> VideoRequest:
    """One frame, of a prompt or (`label`) of a class."""
    return VideoRequest(prompt, num_frames=1, **settings)


def animate(
    model: ModelFacts, picture: Frames, prompt: str | None = None, **settings: Any
) -> VideoRequest:
    """A video whose first frame is a picture, or the first frame of a clip.

    Raises as every task with a clip.
    """
    source = measure(model, picture, settings, at_most=2)
    clip = Clip(part_of(source, 0, 1), at=0)
    return _request(model, source, prompt, settings, clips=(clip,))


def extend(
    model: ModelFacts,
    clip: Frames,
    prompt: str | None = None,
    *,
    before_s: float = 0.0,
    after_s: float = 0.0,
    **settings: Any,
) -> VideoRequest:
    """A clip made longer at its end, at its beginning or at both.

    before_s, after_s: seconds that are added, rounded to frames.
    Raises RequestError for seconds that are negative or no number, or no frame together; and as
    every task with a clip.
    """
    source = measure(model, clip, settings)
    before = _frames("before_s", before_s, source.fps)
    after = _frames("after_s", after_s, source.fps)
    if not before and not after:
        raise RequestError(
            f"before_s {before_s:g} and after_s {after_s:g} come to no frame at "
            f"{source.fps:g} fps; {1 / source.fps:g} s is one"
        )
    time = _frame_multiple(model, settings)
    if before and after:
        at = _up(before, time, 1)
        total = _up(at + source.num_frames + after, time, 1)
    else:
        total = _up(before + source.num_frames + after, time, 1)
        at = total - source.num_frames if before else 0
    placed = Clip(source.frames, at=at)
    return _request(model, source, prompt, settings, clips=(placed,), num_frames=total)


def loop(
    model: ModelFacts, clip: Frames, prompt: str | None = None, *, gap_s: float, **settings: Any
) -> VideoRequest:
    """A clip made into a loop: new frames lead from its end to its beginning.

    gap_s: seconds of new frames, rounded to frames. The gap has one latent frame (`grid.time`
    frames) at least, and as many more frames as bring the loop to a multiple of that.
    A loop from words alone is `VideoRequest(prompt, loop=True)`.
    Raises RequestError for a gap that is negative, no number or no frame; and as every task with a
    clip.
    """
    source = measure(model, clip, settings)
    gap = _gap(gap_s, source.fps, model.grid)
    total = _up(source.num_frames + gap, model.grid.time, 0)
    placed = Clip(source.frames, at=0)
    return _request(model, source, prompt, settings, clips=(placed,), num_frames=total, loop=True)


def connect(
    model: ModelFacts,
    first: Frames,
    second: Frames,
    prompt: str | None = None,
    *,
    gap_s: float,
    **settings: Any,
) -> VideoRequest:
    """Two clips with new frames that lead from one to the other. The size is the first one's.

    gap_s: seconds of new frames, rounded to frames; one latent frame (`grid.time` frames) at least.
    Raises as `loop`.
    """
    source, end = measure(model, first, settings), measure(model, second, settings)
    gap = _gap(gap_s, source.fps, model.grid)
    total = _up(source.num_frames + gap + end.num_frames, _frame_multiple(model, settings), 1)
    clips = (Clip(source.frames, at=0), Clip(end.frames, at=total - end.num_frames))
    return _request(model, source, prompt, settings, clips=clips, num_frames=total)


def fill(
    model: ModelFacts,
    clip: Frames,
    missing: Iterable[range],
    prompt: str | None = None,
    **settings: Any,
) -> VideoRequest:
    """A clip some of whose frames are made anew.

    missing: ranges of frames, counted at `fps`, such as `[range(4, 8)]`.
    Raises RequestError for what is no range of the video's frames, and where no frame or every one
    is missing; and as every task with a clip.
    """
    import numpy as np

    source, total = _whole(model, clip, settings)
    known = np.ones(total, bool)
    for stretch in several("missing", missing, "ranges of frames, such as [range(4, 8)]"):
        if not isinstance(stretch, range) or stretch.step != 1:
            raise RequestError(
                f"missing must be a list of ranges of frames, such as [range(4, 8)]; {stretch!r} "
                "is none"
            )
        if not 0 <= stretch.start < stretch.stop <= total:
            raise RequestError(
                f"missing frames {stretch.start}-{stretch.stop - 1}: the video has frames 0 to "
                f"{total - 1} (at {source.fps:g} fps)"
            )
        known[stretch.start : stretch.stop] = False
    if known.all() or not known.any():
        what = "no frame is" if known.all() else f"all {total} frames are"
        raise RequestError(f"{what} missing; name some of frames 0 to {total - 1}, such as 4-7")
    placed = Clip(part_of(source, 0, total), at=0, mask=known)
    return _request(model, source, prompt, settings, clips=(placed,), num_frames=total)


def inpaint(
    model: ModelFacts,
    clip: Frames,
    mask: np.ndarray | str | PathLike[str],
    prompt: str | None = None,
    **settings: Any,
) -> VideoRequest:
    """A clip a part of whose picture is made anew.

    mask: bool `[height, width]` or `[n, height, width]`, True where the picture is made anew (the
    opposite of `Clip.mask`, which is True where it is known), or the path of an image or a video
    that is bright there. Of the clip's own size or the request's, and of one frame or the clip's
    length at `fps`.
    Raises RequestError for a mask of another type, size or length, and for one that marks nothing
    or everything; and as every task with a clip.
    """
    source, total = _whole(model, clip, settings)
    request = _request(model, source, prompt, settings, num_frames=total)
    assert request.height is not None
    assert request.width is not None
    known = ~read_mask(
        mask,
        num_frames=source.num_frames,
        clip_size=(source.height, source.width),
        size=(request.height, request.width),
        fps=source.fps,
    )
    if known.ndim == 3:
        known = known[:total]
    return replace(request, clips=(Clip(part_of(source, 0, total), at=0, mask=known),))


def edit(
    model: ModelFacts,
    clip: Frames,
    prompt: str | None = None,
    *,
    strength: float = EDIT_STRENGTH,
    **settings: Any,
) -> VideoRequest:
    """A clip changed to fit a prompt (SDEdit, arXiv 2108.01073).

    strength: in (0, 1], how far back towards noise the clip is taken: low keeps it, high leaves
    only its layout. It is checked when the request is submitted.
    Raises as every task with a clip.
    """
    source, total = _whole(model, clip, settings)
    init = part_of(source, 0, total)
    return _request(model, source, prompt, settings, init=init, strength=strength, num_frames=total)


def upscale(
    model: ModelFacts,
    clip: Frames,
    prompt: str | None = None,
    *,
    scale: float | None = None,
    strength: float = UPSCALE_STRENGTH,
    **settings: Any,
) -> VideoRequest:
    """A clip at a larger size, with its detail drawn anew.

    scale: what each side of the clip is multiplied by, over 1; 2 by default. Or give `height`,
    `width` or both in its place: one alone sets the other by the clip's shape. strength: as of
    `edit`.
    Raises RequestError for a scale of 1 or less, that is no number, or beside a height or a width;
    and as every task with a clip.
    """
    sides = [name for name in ("height", "width") if settings.get(name) is not None]
    if sides and scale is not None:
        raise RequestError(
            f"scale {shown(scale)}: {sides[0]} is given too, which says the size; leave one out"
        )
    scale = finite("scale", scale, 2.0)
    if not scale > 1:
        raise RequestError(f"scale {scale:g}: it must be over 1; 2 is twice each side")
    if not sides:
        source = measure(model, clip, settings)
        rows, columns = _multiple(model, settings)
        settings["height"] = _near(source.height * scale, rows)
        settings["width"] = _near(source.width * scale, columns)
    return edit(model, clip, prompt, strength=strength, **settings)


def draft(model: ModelFacts, request: VideoRequest) -> VideoRequest:
    """The small, short-step version of a request, whose result `refine` takes to the full size.

    Half of each side, to the nearest on the model's grid, and half of the steps, rounded up. The
    steps of a request with `sigmas` or on a ladder stay as they are.
    Raises RequestError for a size or a number of steps that is no integer.
    """
    defaults = model.defaults
    height = integer("height", request.height, defaults.height)
    width = integer("width", request.width, defaults.width)
    steps = integer(
        "num_inference_steps", request.num_inference_steps, defaults.num_inference_steps
    )
    fixed = request.sigmas or (defaults.ladder if request.ladder is None else request.ladder)
    return replace(
        request,
        height=_near(height * DRAFT_SCALE, model.grid.multiple[0]),
        width=_near(width * DRAFT_SCALE, model.grid.multiple[1]),
        num_inference_steps=None if fixed else math.ceil(steps * DRAFT_STEPS),
    )


def refine(request: VideoRequest, made: Frames, *, strength: float = EDIT_STRENGTH) -> VideoRequest:
    """The request at its full size, from the video that its draft became.

    strength: as of `edit`. Both are checked when the request is submitted.
    """
    return replace(request, init=made, strength=strength)


def shots(prompts: Sequence[str], num_frames: Sequence[int], **settings: Any) -> VideoRequest:
    """A video of several shots, each with its prompt and its number of frames.

    Raises RequestError where there are not as many lengths as prompts.
    """
    prompts = several("prompts", prompts, "texts")
    num_frames = several("num_frames", num_frames, "numbers of frames")
    if len(prompts) != len(num_frames):
        raise RequestError(
            f"{len(prompts)} shots have {len(num_frames)} lengths; each shot needs its own"
        )
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise RequestError(f"a shot's prompt must be a string, got {shown(prompt)}")
    parts = tuple(Shot(p, n) for p, n in zip(prompts, num_frames, strict=True))
    return VideoRequest(" / ".join(prompts), shots=parts, **settings)


def parse_ranges(text: str) -> list[range]:
    """'4-7,12' -> frames 4 to 7 and frame 12. Raises RequestError."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        if last < first:
            raise RequestError(f"missing {part.strip()!r}: it is FIRST-LAST in frames, such as 4-7")
        found.append(range(first, last + 1))
    return found


def _whole(model: ModelFacts, clip: Frames, settings: dict[str, Any]) -> tuple[Source, int]:
    """The source, and the longest length within it that can be made."""
    source = measure(model, clip, settings)
    remainder = 0 if settings.get("loop") else 1
    time = model.grid.time if settings.get("loop") else _frame_multiple(model, settings)
    total = (source.num_frames - remainder) // time * time + remainder
    if total < 1:
        raise RequestError(
            f"the clip has {source.num_frames} frames at {source.fps:g} fps; a loop of this model "
            f"has {time} at least"
        )
    return source, total


def _request(
    model: ModelFacts,
    source: Source,
    prompt: str | None,
    settings: dict[str, Any],
    **fixed: Any,
) -> VideoRequest:
    for name, value in fixed.items():
        given = settings.get(name)
        silent = given is None or given is False or (isinstance(given, (tuple, list)) and not given)
        if not silent and not (isinstance(given, int) and given == value):
            raise RequestError(
                f"{name} = {shown(given)}: this task makes it of what it is given; leave {name} out"
            )
    height, width = _size(model, source, settings)
    prompt = (source.prompt or "") if prompt is None else prompt
    return VideoRequest(prompt, **{**settings, "height": height, "width": width, **fixed})


def _on_grid(settings: dict[str, Any]) -> bool:
    return bool(settings.get("round_to_grid") or settings.get("strict_grid"))


def _multiple(model: ModelFacts, settings: dict[str, Any]) -> tuple[int, int]:
    """What a height and a width that nobody gave are multiples of."""
    return model.grid.multiple if _on_grid(settings) else (1, 1)


def _frame_multiple(model: ModelFacts, settings: dict[str, Any]) -> int:
    """By how many frames a length grows."""
    return model.grid.time if _on_grid(settings) else 1


def _size(model: ModelFacts, source: Source, settings: dict[str, Any]) -> tuple[int, int]:
    """By the module's rule; one side alone given sets the other by the clip's shape."""
    rows, columns = _multiple(model, settings)
    given = settings.get("height"), settings.get("width")
    height = None if given[0] is None else integer("height", given[0], 0)
    width = None if given[1] is None else integer("width", given[1], 0)
    if height is not None and width is not None:
        return height, width
    if height is not None:
        return height, _near(height * source.width / source.height, columns)
    if width is not None:
        return _near(width * source.height / source.width, rows), width
    area = model.defaults.height * model.defaults.width
    scale = min(1.0, math.sqrt(area / (source.height * source.width)))
    return _near(source.height * scale, rows), _near(source.width * scale, columns)


def _near(value: float, multiple: int) -> int:
    below, above = nearest_on_grid(math.floor(value), multiple)
    return below if value - below <= above - value else above


def _up(value: int, multiple: int, remainder: int) -> int:
    """The smallest length of at least `value` that leaves `remainder`."""
    return max(-(-(value - remainder) // multiple) * multiple + remainder, remainder or multiple)


def _frames(name: str, seconds: float, fps: float) -> int:
    number = finite(name, seconds, 0.0)
    if number < 0:
        raise RequestError(f"{name} must be 0 or more seconds, got {number:g}")
    return round(finite(f"{name} {number:g} in frames", number * fps, 0.0))


def _gap(gap_s: float, fps: float, grid: LatentGrid) -> int:
    gap = _frames("gap_s", finite("gap_s", gap_s, None), fps)
    if gap < 1:
        raise RequestError(
            f"gap_s {gap_s:g} is no frame at {fps:g} fps; the shortest gap is one latent frame, "
            f"{grid.time / fps:g} s"
        )
    return max(gap, grid.time)
