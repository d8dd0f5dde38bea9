"""An mp4 with another comment: its packets are copied as they are."""

from __future__ import annotations

import os
from pathlib import Path

import av

from sora_engine.errors import MediaError


def with_comment(source: Path, target: Path, comment: str) -> None:
    """Write `source` to `target` with this comment, its frames untouched. MediaError.

    What is known at a video's end alone, such as what was done in it, cannot be written at its
    beginning, where FFmpeg takes the metadata.
    """
    try:
        with (
            av.open(str(source)) as given,
            av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as made,
        ):
            made.metadata["comment"] = comment
            (stream,) = given.streams.video
            copied = made.add_stream_from_template(stream)
            for packet in given.demux(stream):
                if packet.dts is None:  # the empty one at the end
                    continue
                packet.stream = copied
                made.mux(packet)
        with target.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"{target} cannot be written: {error}") from error
