"""Videos in and out, a frame at a time.

| output path | what is written |
|---|---|
| `.mp4` | H.264, yuv420p, BT.709, `moov` in front; an odd side gains a repeated row or column |
| `.gif`, `.webp` | an animation that plays for ever (see animation.py) |
| `.png` | one frame, exact |
| no suffix | a folder of numbered PNGs, `00000.png` on |

Everything is written beside its target under a temporary name and moved into place at the end, so
a failure leaves nothing half-written. An existing file is replaced; an existing folder only when it
is empty or holds nothing but numbered PNGs.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sized
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io.animation import (
    GIF_MAX_FPS,
    WEBP_MAX_FPS,
    GifWriter,
    WebpWriter,
    animation_frames,
)
from sora_engine.io.images import check_frame, check_size, fit, open_file, open_image, write_png
from sora_engine.io.provenance import Provenance

MAX_FPS = {".mp4": 1000, ".gif": GIF_MAX_FPS, ".webp": WEBP_MAX_FPS, ".png": 1000, "": 1000}
SUFFIXES = tuple(suffix for suffix in MAX_FPS if suffix)

# Near-transparent: about 45 dB on smooth clips. x264's default of 23 smears small coloured shapes.
H264_CRF = 14
_BT709 = 1
_TV_RANGE = 1

# swscale's default takes short cuts: darker by one level, and 4 dB further off.
_TO_RGB = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# What a clip may take in memory once it is decoded and resized.
MAX_DECODED_BYTES = 4 << 30

# Containers alone: playlists (HLS, DASH, concat) would make FFmpeg open other files and addresses.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,h264,hevc,"
    "obu,av1,m4v,mxf,nut,y4m,yuv4mpegpipe,dv,vc1,wtv,rm,swf,apng"
)

_NUMBERED_PNG = re.compile(r"\d+\.png")


class VideoWriter:
    """Writes uint8 frames [height, width, 3] one by one, in the format of the path's suffix.

    A context manager: leaving it finishes the file, leaving it by an exception removes every trace.
    The path is checked, and its temporary file made, on construction, so that a place where nothing
    can be written is found before the work and not after it.

    fps: frames a second, up to 1000 (50 for .gif, 90 for .webp).
    num_frames: how many will come, if known; a `.png` refuses more than one at once.
    Raises MediaError, which names the path and what would work.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float | Fraction,
        *,
        num_frames: int | None = None,
        provenance: Provenance | None = None,
    ):
        self.path = check_output(path, num_frames=num_frames, fps=fps)
        rate = Fraction(fps).limit_denominator(1001)  # 1001 keeps 24000/1001 exact
        comment = "" if provenance is None else provenance.to_json()
        self._shape: tuple[int, ...] | None = None
        self._count = 0
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        self._file: BinaryIO | None = None
        self._closed = False
        try:
            if self.path.suffix:
                self._file = self._temporary.open("xb")
            else:
                self._temporary.mkdir()
        except OSError as error:
            raise MediaError(f"{self.path} cannot be written: {error.strerror}") from error
        try:
            self._writer = self._make_writer(rate, comment)
        except BaseException:
            self.abort()
            raise

    def _make_writer(self, rate: Fraction, comment: str) -> _FrameWriter:
        if self._file is None:
            return _FolderWriter(self._temporary, comment)
        match self.path.suffix.lower():
            case ".mp4":
                return _Mp4Writer(self._file, rate, comment)
            case ".gif":
                return GifWriter(self._file, rate, comment)
            case ".webp":
                return WebpWriter(self._file, rate, comment)
            case _:
                return _PngWriter(self._file, self.path, comment)

    def write(self, frame: np.ndarray) -> None:
        """Adds one frame, uint8 [height, width, 3], of the size of the first."""
        array = check_frame(frame)
        if self._shape is None:
            self._shape = array.shape
        elif array.shape != self._shape:
            raise MediaError(
                f"frame {self._count} is {array.shape[1]}x{array.shape[0]}, "
                f"but the video is {self._shape[1]}x{self._shape[0]}"
            )
        try:
            self._writer.write(array)
        except (OSError, av.FFmpegError) as error:
            raise MediaError(f"{self.path} cannot be written: {error}") from error
        self._count += 1

    def close(self) -> None:
        """Finishes the file and moves it into place; MediaError (and no file) if that fails."""
        if self._closed:
            return
        try:
            if self._count == 0:
                raise MediaError(f"{self.path}: a video needs at least one frame")
            self._writer.close()
            if self._file is None:
                _replace_folder(self._temporary, self.path)
            else:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self.path)
        except (OSError, av.FFmpegError) as error:
            self.abort()
            raise MediaError(f"{self.path} cannot be written: {error}") from error
        except BaseException:
            self.abort()
            raise
        self._closed = True

    def abort(self) -> None:
        """Removes what was written so far; the target stays as it was."""
        self._closed = True
        if self._file is None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        else:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            self.abort()


def write_video(
    path: str | Path,
    frames: Iterable[np.ndarray],
    fps: float | Fraction,
    provenance: Provenance | None = None,
) -> Path:
    """Writes an iterable of frames, or an array of them, each uint8 [height, width, 3].

    Raises MediaError as `VideoWriter` does. Returns the path.
    """
    num_frames = len(frames) if isinstance(frames, Sized) else None
    with VideoWriter(path, fps, num_frames=num_frames, provenance=provenance) as writer:
        for frame in frames:
            writer.write(frame)
    return writer.path


def check_output(
    path: str | Path, *, num_frames: int | None = None, fps: float | Fraction | None = None
) -> Path:
    """The path, if such a video can be written there; else MediaError.

    Looks at the suffix, at what already stands there, and whether the parent folder takes a file;
    leaves nothing behind.
    """
    if not str(path):
        raise MediaError("the output path is empty")
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix and suffix not in SUFFIXES:
        raise MediaError(
            f"{path}: unknown suffix {path.suffix!r}; known are {', '.join(SUFFIXES)}, "
            "or none for a folder of PNGs"
        )
    if suffix == ".png" and num_frames is not None and num_frames > 1:
        raise MediaError(
            f"{path}: a .png holds one frame, not {num_frames}; "
            "leave the suffix away for a folder of PNGs"
        )
    if fps is not None:
        _check_rate(fps, suffix)
    if not path.name or path.name == "..":
        raise MediaError(f"{path}: name a file or a new folder")
    if not path.parent.is_dir():
        raise MediaError(f"{path}: the folder {path.parent} does not exist")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise MediaError(
            f"{path}: the folder {path.parent} is not writable: {error.strerror}"
        ) from error
    if suffix and path.is_dir():
        raise MediaError(f"{path} is a folder")
    if not suffix and path.exists():
        if not path.is_dir():
            raise MediaError(
                f"{path} is a file, and a path without a suffix means a folder of PNGs"
            )
        strange = [p.name for p in path.iterdir() if not _NUMBERED_PNG.fullmatch(p.name)]
        if strange:
            raise MediaError(
                f"{path} holds other files ({sorted(strange)[0]}); name an empty or a new folder"
            )
    return path


def _check_rate(fps: float | Fraction, suffix: str = "") -> None:
    limit = MAX_FPS[suffix]
    if not math.isfinite(fps) or not 0 < fps <= limit:
        what = f" for a {suffix}" if suffix else ""
        raise MediaError(f"fps {float(fps):g}: it must be above 0 and at most {limit}{what}")


def _replace_folder(source: Path, target: Path) -> None:
    """Moves a folder into place; what stood there goes only once the new one is whole."""
    if not target.exists():
        source.rename(target)
        return
    check_output(target)
    aside = source.with_suffix(".old")
    target.rename(aside)
    try:
        source.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


class _FrameWriter(Protocol):
    def write(self, frame: np.ndarray) -> None: ...

    def close(self) -> None: ...


class _Mp4Writer:
    def __init__(self, file: BinaryIO, rate: Fraction, comment: str):
        self._container = av.open(file, "w", format="mp4", options={"movflags": "+faststart"})
        if comment:
            self._container.metadata["comment"] = comment
        try:
            self._stream = self._container.add_stream("libx264", rate=rate)
        except (ValueError, av.FFmpegError) as error:
            raise MediaError(
                "this build of PyAV has no libx264, so no .mp4 can be written"
            ) from error
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"crf": str(H264_CRF), "preset": "medium"}
        codec = self._stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _TV_RANGE
        self._started = False

    def write(self, frame: np.ndarray) -> None:
        height, width = frame.shape[:2]
        if height % 2 or width % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if not self._started:
            self._stream.height, self._stream.width = frame.shape[:2]
            self._started = True
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
            format="yuv420p", dst_colorspace="itu709", interpolation="BICUBIC"
        )
        self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()


class _PngWriter:
    def __init__(self, file: BinaryIO, path: Path, comment: str):
        self._file, self._path, self._comment = file, path, comment
        self._written = False

    def write(self, frame: np.ndarray) -> None:
        if self._written:
            raise MediaError(
                f"{self._path}: a .png holds one frame; leave the suffix away for a folder of PNGs"
            )
        write_png(self._file, frame, self._comment)
        self._written = True

    def close(self) -> None:
        pass


class _FolderWriter:
    def __init__(self, folder: Path, comment: str):
        self._folder, self._comment = folder, comment
        self._count = 0

    def write(self, frame: np.ndarray) -> None:
        with (self._folder / f"{self._count:05d}.png").open("xb") as file:
            write_png(file, frame, self._comment)
        self._count += 1

    def close(self) -> None:
        pass


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
        _check_rate(fps)
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
    names = [p for p in path.iterdir() if _NUMBERED_PNG.fullmatch(p.name)]
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
