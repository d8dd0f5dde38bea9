"""The frames that a request gives, in whatever form: a file, a part of one, arrays, a picture."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from sora_engine.errors import RequestError
from sora_engine.io.images import decode, fit
from sora_engine.io.video_reader import measure_video, read_video
from sora_engine.request.checks import integer
from sora_engine.request.request import Footage

if TYPE_CHECKING:
    from torch import Tensor

    from sora_engine.request.request import Frames


Array = TypeVar("Array", np.ndarray, "Tensor")


def crop_middle(frames: Array, height: int, width: int) -> Array:
    """The middle of frames `[..., H, W, 3]`, of that size; a view."""
    top = (frames.shape[-3] - height) // 2
    left = (frames.shape[-2] - width) // 2
    return frames[..., top : top + height, left : left + width, :]


def load_frames(
    frames: Frames, height: int, width: int, fps: float | None = None, what: str = "clip"
) -> np.ndarray:
    """Frames in any form that a request takes, as uint8 `[n, height, width, 3]`.

    A file is resampled to `fps`; frames in memory are taken as they are. Frames of another size are
    scaled until they cover the size asked for, and their middle is kept. Raises RequestError or
    MediaError.
    """
    if isinstance(frames, Footage):
        return _part_of(frames, height, width, fps, what)
    if isinstance(frames, (str, PathLike)):
        return read_video(Path(frames), fps=fps, height=height, width=width)[0]
    array = as_array(frames, what)
    if array.shape[1:3] == (height, width):
        return array
    return np.stack(
        [np.asarray(fit(Image.fromarray(f), height=height, width=width)) for f in array]
    )


def as_array(frames: object, what: str = "clip") -> np.ndarray:
    """Frames in memory as uint8 `[n, height, width, 3]`; RequestError for what are none."""
    from torch import Tensor  # what only frames in memory need: the command line reads files

    from sora_engine.video import Video

    if isinstance(frames, Video):
        frames = frames.frames
    if isinstance(frames, Image.Image):
        frames = decode(frames, f"the {what}'s picture")[None]
    if isinstance(frames, Tensor):
        frames = frames.cpu().numpy()
    if not isinstance(frames, np.ndarray):
        raise RequestError(
            f"a {what}'s frames are a uint8 array [n, height, width, 3], a PIL image, a path or a "
            f"Video, got {type(frames).__name__}"
        )
    if frames.ndim == 3:
        frames = frames[None]
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise RequestError(
            f"a {what}'s frames are uint8 [n, height, width, 3], "
            f"got {frames.dtype} {list(frames.shape)}"
        )
    return frames


def _part_of(part: Footage, height: int, width: int, fps: float | None, what: str) -> np.ndarray:
    start = integer(f"a {what}'s start", part.start, 0)
    stop = None if part.stop is None else integer(f"a {what}'s stop", part.stop, 0)
    ordered = start >= 0 and (stop is None or start < stop)
    if not isinstance(part.frames, (str, PathLike)):
        array = as_array(part.frames, what)
        total = len(array)
        if ordered and start < total and (stop is None or stop <= total):
            return load_frames(array[start:stop], height, width, fps, what)
    else:
        path = Path(part.frames)
        if ordered:
            last = start + 1 if stop is None else stop  # whether it is there costs little to tell
            total, _, _ = measure_video(path, fps=fps, stop=last)
            if start < total and (stop is None or stop <= total):
                return read_video(
                    path, fps=fps, height=height, width=width, start=start, stop=stop
                )[0]
        total, _, _ = measure_video(path, fps=fps)
    raise RequestError(
        f"frames {start} to {total if stop is None else stop} of a {what} were asked for; it has "
        f"{total}, so from 0 to {total} would work"
    )
