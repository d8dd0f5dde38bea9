"""The clip that a task starts from, measured."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sora_engine.errors import RequestError
from sora_engine.request.checks import integer, positive
from sora_engine.request.facts import ModelFacts
from sora_engine.request.request import Footage

if TYPE_CHECKING:
    from sora_engine.request.request import Frames


class Source(NamedTuple):
    """A clip and what was measured of it.

    num_frames, fps: a file's at the rate of the request. height, width: its own, in pixels. prompt:
    the one that it carries.
    """

    frames: Frames
    num_frames: int
    height: int
    width: int
    fps: float
    prompt: str | None


def measure(
    model: ModelFacts, clip: Frames, settings: dict[str, Any], at_most: int | None = None
) -> Source:
    """Measure a clip as a task with these settings takes it: a file at their `fps`, or the model's.

    at_most: how many frames matter; a long clip's others are not looked at.
    Raises RequestError for frames in no form that `Clip` takes, an empty part of a clip or one
    outside it, and an `fps` that is not over 0; MediaError for a file that cannot be read.
    """
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
    return Source(clip, end - start, height, width, fps, prompt)


def part_of(source: Source, start: int, stop: int) -> Frames:
    """Frames `start` to `stop` of a source; itself where that is all."""
    if start == 0 and stop == source.num_frames:
        return source.frames
    inner = source.frames
    if isinstance(inner, Footage):
        return Footage(inner.frames, inner.start + start, inner.start + stop)
    return Footage(inner, start, stop)
