"""What a caller gave to be in a result, for the result's Content Credentials."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sora_engine.io.credentials import Source, file_source
from sora_engine.request.recipe import frames_hash
from sora_engine.request.request import Footage
from sora_engine.video import Video

if TYPE_CHECKING:
    from sora_engine.io.provenance import Provenance
    from sora_engine.request.request import Frames
    from sora_engine.request.resolve import ResolvedRequest


def sources_of(request: ResolvedRequest) -> tuple[Source, ...]:
    """The clips and pictures that a request starts from, each with its hash.

    A video that the engine made itself in this process, such as a draft, is none of them. Raises
    MediaError for a file that cannot be read.
    """
    given = [_source(clip.frames, "placed") for clip in request.clips]
    if request.init is not None:
        given.append(_source(request.init, "input"))
    return tuple(source for source in given if source is not None)


def sources_in(provenance: Provenance | None) -> tuple[Source, ...]:
    """The same from what a result says of itself: hashes alone, as the files may be gone."""
    if provenance is None:
        return ()
    settings = provenance.settings
    given: list[tuple[dict[str, Any], Literal["placed", "input"]]] = [
        (clip["frames"], "placed") for clip in settings.get("clips", ())
    ]
    if "init" in settings:
        given.append((settings["init"], "input"))
    return tuple(Source(None, r["sha256"], role) for r, role in given if "sha256" in r)


def _source(frames: Frames, role: Literal["placed", "input"]) -> Source | None:
    if isinstance(frames, Footage):
        frames = frames.frames
    if isinstance(frames, (str, PathLike)) and Path(frames).is_file():
        return file_source(Path(frames), role)
    if isinstance(frames, Video) and frames.provenance is not None:
        return None
    return Source(None, frames_hash(frames), role)
