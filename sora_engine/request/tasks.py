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
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sora_engine.errors import RequestError
from sora_engine.request.checks import finite, integer, positive, several
from sora_engine.request.facts import LatentGrid, ModelFacts, nearest_on_grid
from sora_engine.request.request import Clip, Footage, Shot, VideoRequest
from sora_engine.request.resolve import EDIT_STRENGTH

if TYPE_CHECKING:
    import numpy as np

    from sora_engine.request.request import Frames

DRAFT_SCALE = 0.5
DRAFT_STEPS = 0.5
UPSCALE_STRENGTH = 0.4
"""Enough noise to draw new detail, too little to move what is there."""


def image(prompt: str, **settings: Any) -> VideoRequest:
    """One frame."""
    return VideoRequest(prompt, num_frames=1, **settings)


def animate(
    model: ModelFacts, picture: Frames, prompt: str | None = None, **settings: Any
) -> VideoRequest:
    """A video whose first frame is a picture."""
    source = _measure(model, picture, settings, at_most=2)
    clip = Clip(_part(source, 0, 1), at=0)
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
    """A clip made longer at its end, at its beginning or at both."""
    source = _measure(model, clip, settings)
    before = _frames("before_s", before_s, source.fps)
    after = _frames("after_s", after_s, source.fps)
    if not before and not after:
        raise RequestError(
            f"before_s {before_s:g} and after_s {after_s:g} come to no frame at "
            f"{source.fps:g} fps; {1 / source.fps:g} s is one"
        )
    time = _step(model, settings)
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

    A loop from words alone is `VideoRequest(prompt, loop=True)`.
    """
    source = _measure(model, clip, settings)
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
    """Two clips with new frames that lead from one to the other. The size is the first one's."""
    source, end = _measure(model, first, settings), _measure(model, second, settings)
    gap = _gap(gap_s, source.fps, model.grid)
    total = _up(source.num_frames + gap + end.num_frames, _step(model, settings), 1)
    clips = (Clip(source.frames, at=0), Clip(end.frames, at=total - end.num_frames))
    return _request(model, source, prompt, settings, clips=clips, num_frames=total)


def fill(
    model: ModelFacts,
    clip: Frames,
    missing: Iterable[range],
    prompt: str | None = None,
    **settings: Any,
) -> VideoRequest:
    """A clip some of whose frames are made anew. missing: ranges of frames, at `fps`."""
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
    placed = Clip(_part(source, 0, total), at=0, mask=known)
    return _request(model, source, prompt, settings, clips=(placed,), num_frames=total)


def inpaint(
    model: ModelFacts,
    clip: Frames,
    mask: np.ndarray | str | PathLike[str],
    prompt: str | None = None,
    **settings: Any,
) -> VideoRequest:
    """A clip a part of whose picture is made anew.

    mask: bool `[height, width]` or `[n, height, width]`, True where the picture is made anew, or
    the path of an image or a video that is bright there; of the clip's own size and length.
    """
    source, total = _whole(model, clip, settings)
    request = _request(model, source, prompt, settings, num_frames=total)
    assert request.height is not None
    assert request.width is not None
    known = ~_read_mask(mask, source, request.height, request.width)
    if known.ndim == 3:
        known = known[:total]
    return replace(request, clips=(Clip(_part(source, 0, total), at=0, mask=known),))


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
    only its layout.
    """
    source, total = _whole(model, clip, settings)
    init = _part(source, 0, total)
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
    """A clip at a larger size, with its detail drawn anew: twice each side unless told."""
    scale = finite("scale", scale, 2.0)
    if not scale > 1:
        raise RequestError(f"scale {scale:g}: it must be over 1; 2 is twice each side")
    source = _measure(model, clip, settings)
    rows, columns = _multiple(model, settings)
    larger = {
        "height": _near(source.height * scale, rows),
        "width": _near(source.width * scale, columns),
    }
    return edit(model, clip, prompt, strength=strength, **{**larger, **settings})


def draft(model: ModelFacts, request: VideoRequest) -> VideoRequest:
    """The small, short-step version of a request, whose result `refine` takes to the full size."""
    defaults = model.defaults
    height = integer("height", request.height, defaults.height)
    width = integer("width", request.width, defaults.width)
    steps = integer(
        "num_inference_steps", request.num_inference_steps, defaults.num_inference_steps
    )
    return replace(
        request,
        height=_near(height * DRAFT_SCALE, model.grid.multiple[0]),
        width=_near(width * DRAFT_SCALE, model.grid.multiple[1]),
        num_inference_steps=None if request.sigmas else math.ceil(steps * DRAFT_STEPS),
    )


def refine(request: VideoRequest, made: Frames, *, strength: float = EDIT_STRENGTH) -> VideoRequest:
    """The request at its full size, from the video that its draft became."""
    return replace(request, init=made, strength=strength)


def shots(prompts: Sequence[str], num_frames: Sequence[int], **settings: Any) -> VideoRequest:
    """A video of several shots, each with its prompt and its number of frames."""
    if len(prompts) != len(num_frames):
        raise RequestError(
            f"{len(prompts)} shots have {len(num_frames)} lengths; each shot needs its own"
        )
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


class _Source(NamedTuple):
    """A clip and what was measured of it."""

    frames: Frames
    num_frames: int
    height: int
    width: int
    fps: float
    prompt: str | None


def _measure(
    model: ModelFacts, clip: Frames, settings: dict[str, Any], at_most: int | None = None
) -> _Source:
    """at_most: how many frames matter; a long clip's others are not looked at."""
    from sora_engine.io.provenance import read_provenance
    from sora_engine.io.video_reader import measure_video

    given = settings.get("fps")
    fps = positive("fps", model.defaults.fps if given is None else given)
    start, stop = 0, None
    whole = clip
    if isinstance(clip, Footage):
        whole, start = clip.frames, integer("a clip's start", clip.start, 0)
        stop = None if clip.stop is None else integer("a clip's stop", clip.stop, 0)
    provenance = getattr(whole, "provenance", None)
    if isinstance(whole, (str, PathLike)):
        path = Path(whole)
        seen = start + at_most if stop is None and at_most is not None else stop
        ordered = seen is not None and 0 <= start < seen
        n, height, width = measure_video(path, fps=fps, stop=seen if ordered else None)
        provenance = read_provenance(path)
    else:
        from sora_engine.request.frames import as_array

        n, height, width, _ = as_array(whole).shape
    end = n if stop is None else stop
    if not 0 <= start < end <= n:
        raise RequestError(
            f"frames {start} to {end} of a clip were asked for; it has {n}, so from 0 to {n} "
            "would work"
        )
    prompt = None if provenance is None else provenance.prompt
    return _Source(clip, end - start, height, width, fps, prompt)


def _whole(model: ModelFacts, clip: Frames, settings: dict[str, Any]) -> tuple[_Source, int]:
    """The source, and the longest length within it that can be made."""
    source = _measure(model, clip, settings)
    remainder = 0 if settings.get("loop") else 1
    time = model.grid.time if settings.get("loop") else _step(model, settings)
    total = (source.num_frames - remainder) // time * time + remainder
    if total < 1:
        raise RequestError(
            f"the clip has {source.num_frames} frames at {source.fps:g} fps; a loop of this model "
            f"has {time} at least"
        )
    return source, total


def _part(source: _Source, start: int, stop: int) -> Frames:
    """Frames `start` to `stop` of a source; itself where that is all."""
    if start == 0 and stop == source.num_frames:
        return source.frames
    inner = source.frames
    if isinstance(inner, Footage):
        return Footage(inner.frames, inner.start + start, inner.start + stop)
    return Footage(inner, start, stop)


def _request(
    model: ModelFacts,
    source: _Source,
    prompt: str | None,
    settings: dict[str, Any],
    **fixed: Any,
) -> VideoRequest:
    height, width = _size(model, source, settings)
    prompt = (source.prompt or "") if prompt is None else prompt
    return VideoRequest(prompt, **{**settings, "height": height, "width": width, **fixed})


def _on_grid(settings: dict[str, Any]) -> bool:
    return bool(settings.get("round_to_grid") or settings.get("strict_grid"))


def _multiple(model: ModelFacts, settings: dict[str, Any]) -> tuple[int, int]:
    """What a height and a width that nobody gave are multiples of."""
    return model.grid.multiple if _on_grid(settings) else (1, 1)


def _step(model: ModelFacts, settings: dict[str, Any]) -> int:
    """By how many frames a length grows."""
    return model.grid.time if _on_grid(settings) else 1


def _size(model: ModelFacts, source: _Source, settings: dict[str, Any]) -> tuple[int, int]:
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
    gap = _frames("gap_s", gap_s, fps)
    if gap < 1:
        raise RequestError(
            f"gap_s {gap_s:g} is no frame at {fps:g} fps; the shortest gap is one latent frame, "
            f"{grid.time / fps:g} s"
        )
    return max(gap, grid.time)


def _read_mask(
    mask: np.ndarray | str | PathLike[str], source: _Source, height: int, width: int
) -> np.ndarray:
    """Bool `[height, width]` or `[n, height, width]`, True where the picture is made anew."""
    import numpy as np
    from PIL import Image

    from sora_engine.io.images import fit
    from sora_engine.io.video_reader import read_video

    if isinstance(mask, (str, PathLike)):
        name = f"the mask {mask}"
        planes = read_video(Path(mask), fps=source.fps)[0].mean(axis=-1) >= 128
        stack = planes[0] if len(planes) == 1 else planes
    else:
        name, stack = "the mask", np.asarray(mask)
        if stack.dtype != bool or stack.ndim not in (2, 3):
            raise RequestError(
                f"a mask is bool [height, width] or [n, height, width], True where the picture is "
                f"made anew, got {stack.dtype} {list(stack.shape)}"
            )
    if stack.ndim == 3 and len(stack) != source.num_frames:
        raise RequestError(
            f"{name} has {len(stack)} frames and the clip {source.num_frames} at "
            f"{source.fps:g} fps; {source.num_frames} frames, or one for all, would work"
        )
    if stack.shape[-2:] not in ((source.height, source.width), (height, width)):
        raise RequestError(
            f"{name} is {stack.shape[-1]}x{stack.shape[-2]}; the clip is "
            f"{source.width}x{source.height}, and so must its mask be"
        )
    if not stack.any() or stack.all():
        share = "everything" if stack.any() else "nothing"
        raise RequestError(f"{name} marks {share}; it marks what is made anew, and leaves the rest")
    if stack.shape[-2:] == (height, width):
        return stack
    planes = stack[None] if stack.ndim == 2 else stack
    fitted = np.stack(
        [
            np.asarray(fit(Image.fromarray(p.astype(np.uint8) * 255), height=height, width=width))
            for p in planes
        ]
    )
    return (fitted[0] if stack.ndim == 2 else fitted) >= 128
