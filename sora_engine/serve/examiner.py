"""The child of `intake`: decodes one file within bounds, and says what it holds.

`python -m sora_engine.serve.examiner DESCRIPTOR KIND CAPS`. One line of JSON: width, height,
num_frames, fps and kind, or `why` not.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from sora_engine.errors import MediaError
from sora_engine.io.animation import frame_range
from sora_engine.io.images import open_image
from sora_engine.io.media_limits import MediaLimits, set_media_limits
from sora_engine.io.video_reader import frames_of

NAME = "the upload"


def main(arguments: list[str]) -> int:
    descriptor, kind, caps = int(arguments[0]), arguments[1], json.loads(arguments[2])
    path = Path(f"/proc/self/fd/{descriptor}")
    _bind(caps)
    set_media_limits(MediaLimits(pixels=caps["max_pixels"]))
    try:
        found = _found(path, kind, caps)
    except (MediaError, MemoryError) as error:
        found = {"why": str(error).replace(str(path), NAME)}
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
            found = {"why": f"{NAME} takes more memory to decode than the server gives"}
    print(json.dumps(found), flush=True)
    return 0 if "width" in found else 1


def _bind(caps: dict[str, Any]) -> None:
    """The kernel's bounds. Memory counts from what the libraries have taken by now."""
    # One processor: FFmpeg has a thread for each, with a stack and a frame of its own.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + caps["memory_bytes"]
    for bound, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, caps["cpu_s"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(bound, (most, most))
    # A server that was killed ends nobody: what waits for ever here ends by itself.
    signal.setitimer(signal.ITIMER_REAL, caps["wall_s"] + 1.0)


def _found(path: Path, kind: str, caps: dict[str, Any]) -> dict[str, Any]:
    """Every frame is decoded, none is kept."""
    count, size, played_s = 0, (0, 0), 0.0
    most = caps["max_frames"]
    image = open_image(path)
    if image is not None:
        with image:
            declared = len(frame_range(image))
            if declared > most:
                raise MediaError(f"{NAME} has {declared} frames; at most {most} are taken")
    for end_s, pixels in frames_of(path):
        count += 1
        if count > most:
            raise MediaError(f"{NAME} has over {most} frames, which is the most that is taken")
        if count > 1 and pixels.shape[:2] != size:
            raise MediaError(f"{NAME}: its pictures change their size")
        size, played_s = pixels.shape[:2], end_s
    fps = count / played_s if count > 1 and played_s > 0 else 1.0
    return {"kind": kind, "width": size[1], "height": size[0], "num_frames": count, "fps": fps}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
