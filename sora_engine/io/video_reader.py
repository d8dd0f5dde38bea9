"""Videos in: files of any codec that PyAV reads, animations, images, folders of numbered PNGs."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io.animation import animation_frames
from sora_engine.io.formats import NUMBERED_PNG, check_rate
from sora_engine.io.images import check_size, fit, open_file, open_image

# swscale's default takes short cuts: darker by one level, and 4 dB further off.
_TO_RGB = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# What a clip may take in memory once it is decoded and resized.
MAX_DECODED_BYTES = 4 << 30

# Containers alone: playlists (HLS, DASH, concat) would make FFmpeg open other files and addresses.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,h264,hevc,"
    "obu,av1,m4v,mxf,nut,y4m,yuv4mpegpipe,dv,vc1,wtv,rm,swf,apng"
)


def read_video(
    path: str | Path,
    *,
    fps: float | None = None,
    height: int | None = None,
    width: int | None = None,
    max_frames: int | None = None,
) -> tuple[np.ndarray, float]:
    """Reads a video, an animation, an image or a folder of PNGs.

    Returns frames, uint8 [num_frames, height, width, 3], and their rate in frames a second.

    fps: with None every stored frame is returned, and the mean rate. With a rate, frame i is the
      one on screen i / fps seconds after the first, for as long as the file plays.
    height, width: both scale the picture to cover them and keep its middle; one alone keeps the
      shape. Rotation and non-square pixels are applied first.
    max_frames: reading stops after as many.
    A still image or a folder of PNGs has no rate of its own: it counts as 1, or `fps`, a second.

    Raises MediaError for a missing or corrupt file, one without a video stream, a picture over
    MAX_PIXELS or a clip over MAX_DECODED_BYTES.
    """
    path = Path(path)
    if fps is not None:
        check_rate(fps)
    if max_frames is not None and max_frames < 1:
        raise MediaError(f"max_frames {max_frames}: it must be 1 or more")
    if path.is_dir():
        source, rate = _folder_frames(path, height, width, fps or 1.0), fps or 1.0
        fps = None
    elif (image := open_image(path)) is not None:
        source = _image_frames(image, path, height, width, fps or 1.0)
        rate = None
    else:
        source, rate = _stream_frames(path, height, width), None

    frames: list[np.ndarray] = []
    start = end = 0.0
    size_bytes = 0
    first: float | None = None
    for start, end, frame in source:
        first = start if first is None else first
        if fps is None:
            repeats = 1
        else:
            # A millionth of a second of slack, against time stamps that are rounded up.
            due = math.ceil((end - first) * fps - 1e-6 * fps)
            repeats = max(0, due - len(frames))
        if max_frames is not None:
            repeats = min(repeats, max_frames - len(frames))
        size_bytes += repeats * frame.nbytes
        if size_bytes > MAX_DECODED_BYTES:
            raise MediaError(
                f"{path}: its frames take over {MAX_DECODED_BYTES >> 20} MiB; "
                "read fewer (max_frames, fps) or smaller ones (height, width)"
            )
        frames.extend([frame] * repeats)
        if max_frames is not None and len(frames) >= max_frames:
            break
    if first is None:
        raise MediaError(f"{path} holds no frames that can be decoded")
    if not frames:  # shorter than one frame at this rate
        frames.append(frame)
    if fps is not None:
        rate = fps
    elif rate is None:
        rate = len(frames) / (end - first) if end > first else 1.0
    return np.stack(frames), float(rate)


def measure_video(path: str | Path, *, fps: float | None = None) -> tuple[int, int, int]:
    """(num_frames, height, width) of what `read_video` gives at this rate, at the file's own size.

    The whole file is decoded, because containers do not know: MediaError as of `read_video`.
    """
    path = Path(path)
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    return _measure(path, stamp, fps)


@lru_cache(maxsize=64)
def _measure(path: Path, _stamp: int, fps: float | None) -> tuple[int, int, int]:
    first, _ = read_video(path, max_frames=1)
    small, _ = read_video(path, fps=fps, height=8, width=8)
    return len(small), first.shape[1], first.shape[2]


def open_video(path: str | Path) -> Any:
    """A PyAV input container on a local file, never on an address or a playlist; or MediaError."""
    path = Path(path)
    file = open_file(path)
    try:
        _check_whole(path, file)
        return av.open(file, "r", options={"format_whitelist": _CONTAINERS})
    except MediaError:
        file.close()
        raise
    except (av.FFmpegError, ValueError, OSError) as error:
        file.close()
        # FFmpeg says "invalid argument" of a container that is not on the list.
        unknown = getattr(error, "errno", None) == errno.EINVAL
        reason = "it is none of the known containers" if unknown else _reason(error)
        raise MediaError(f"{path} cannot be read as a video: {reason}") from error


def _check_whole(path: Path, file: BinaryIO) -> None:
    """Raises MediaError for an MP4 or MOV file that ends early, which FFmpeg reads without a word.

    Walks the top-level boxes (ISO/IEC 14496-12, 4.2) and holds their sizes against the file's.
    """
    end = file.seek(0, os.SEEK_END)
    at = 0
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if at == 0 and kind not in (b"ftyp", b"moov", b"mdat", b"wide", b"free"):
            break  # another container
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size == 0:
            break  # up to the end of the file
        if size < 8 or at + size > end:
            raise MediaError(f"{path} is damaged: it ends in the middle of a box")
        at += size
    file.seek(0)


def _stream_frames(
    path: Path, height: int | None, width: int | None
) -> Iterator[tuple[float, float, np.ndarray]]:
    """(start_s, end_s, frame) of each frame of a file's first video stream."""
    with open_video(path) as container:
        if not container.streams.video:
            raise MediaError(f"{path} has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        check_size(path, stream.codec_context.width, stream.codec_context.height)
        step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        held: tuple[float, float, np.ndarray] | None = None
        clock = 0.0
        try:
            for picture in container.decode(stream):
                start = clock if picture.time is None else float(picture.time)
                if held is not None:
                    # A frame stands until the next one comes, whatever duration it claims.
                    yield held[0], max(start, held[0]), held[2]
                if picture.is_corrupt:  # the decoder painted over what it could not read
                    raise MediaError(f"{path} is damaged at {start:.2f} s")
                check_size(path, picture.width, picture.height)
                claimed = float((picture.duration or 0) * (picture.time_base or 0)) or step
                held = (start, start + claimed, _pixels(picture, stream, height, width))
                clock = start + claimed
        except MediaError:
            raise
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(f"{path} is damaged: {_reason(error)}") from error
        if held is not None:
            yield held


def _pixels(picture: Any, stream: Any, height: int | None, width: int | None) -> np.ndarray:
    """A decoded picture as uint8 [height, width, 3]: upright, with square pixels, then fitted."""
    image = Image.fromarray(picture.to_ndarray(format="rgb24", interpolation=_TO_RGB))
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        image = image.resize((max(1, round(image.width * aspect)), image.height))
    if picture.rotation % 360:
        image = image.rotate(picture.rotation, expand=True)
    return np.asarray(fit(image, height=height, width=width))


def _image_frames(
    image: Image.Image, path: Path, height: int | None, width: int | None, fps: float
) -> Iterator[tuple[float, float, np.ndarray]]:
    with image:
        still = getattr(image, "n_frames", 1) == 1
        for start, end, frame in animation_frames(image, path, height=height, width=width):
            yield start, (start + 1 / fps if still else end), frame


def _folder_frames(
    path: Path, height: int | None, width: int | None, fps: float
) -> Iterator[tuple[float, float, np.ndarray]]:
    names = [p for p in path.iterdir() if NUMBERED_PNG.fullmatch(p.name)]
    if not names:
        raise MediaError(f"{path} holds no numbered PNG files")
    for index, name in enumerate(sorted(names, key=lambda p: int(p.stem))):
        image = open_image(name)
        if image is None:
            raise MediaError(f"{name} is not a PNG image")
        with image:
            for _, _, frame in animation_frames(image, name, height=height, width=width):
                yield index / fps, (index + 1) / fps, frame
                break


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
