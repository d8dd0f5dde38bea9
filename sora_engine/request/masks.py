"""The masks of pictures in which a part is made anew."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from sora_engine.errors import RequestError

if TYPE_CHECKING:
    import numpy as np


def read_mask(
    mask: np.ndarray | str | PathLike[str],
    *,
    num_frames: int,
    clip_size: tuple[int, int],
    size: tuple[int, int],
    fps: float,
) -> np.ndarray:
    """Bool `[height, width]` or `[n, height, width]`, True where the picture is made anew.

    mask: such an array, or the path of an image or a video, read at `fps`, that is bright there.
    num_frames: of the clip, and of a mask with several. clip_size: height and width of the clip,
    and of the mask, which may have `size` too. size: height and width of what is returned.

    Raises RequestError for a mask of another type, size or length, and for one that marks nothing
    or everything; MediaError for a file that cannot be read.
    """
    import numpy as np
    from PIL import Image

    from sora_engine.io.images import fit
    from sora_engine.io.video_reader import read_video

    height, width = size
    if isinstance(mask, (str, PathLike)):
        name = f"the mask {mask}"
        planes = read_video(Path(mask), fps=fps)[0].mean(axis=-1) >= 128
        stack = planes[0] if len(planes) == 1 else planes
    else:
        name, stack = "the mask", np.asarray(mask)
        if stack.dtype != bool or stack.ndim not in (2, 3):
            raise RequestError(
                f"a mask is bool [height, width] or [n, height, width], True where the picture is "
                f"made anew, got {stack.dtype} {list(stack.shape)}"
            )
    if stack.ndim == 3 and len(stack) != num_frames:
        raise RequestError(
            f"{name} has {len(stack)} frames and the clip {num_frames} at "
            f"{fps:g} fps; {num_frames} frames, or one for all, would work"
        )
    if stack.shape[-2:] not in (clip_size, size):
        raise RequestError(
            f"{name} is {stack.shape[-1]}x{stack.shape[-2]}; the clip is "
            f"{clip_size[1]}x{clip_size[0]}, and so must its mask be"
        )
    if not stack.any() or stack.all():
        share = "everything" if stack.any() else "nothing"
        raise RequestError(f"{name} marks {share}; it marks what is made anew, and leaves the rest")
    if stack.shape[-2:] == size:
        return stack
    planes = stack[None] if stack.ndim == 2 else stack
    fitted = np.stack(
        [
            np.asarray(fit(Image.fromarray(p.astype(np.uint8) * 255), height=height, width=width))
            for p in planes
        ]
    )
    return (fitted[0] if stack.ndim == 2 else fitted) >= 128
