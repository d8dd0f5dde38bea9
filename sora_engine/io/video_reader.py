"""Videos in: files of any codec that PyAV reads, animations, images, folders of numbered PNGs."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import av
import numpy as np
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io.animation import animation_times, frame_range
from sora_engine.io.foreign import HEAD_BYTES, what_it_is
from sora_engine.io.formats import NUMBERED_PNG, check_rate
from sora_engine.io.images import decode, open_file, open_image, read_image
from sora_engine.io.media_limits import media_limits
from sora_engine.io.video_stream import VideoStream, reason
from sora_engine.io.wholeness import what_is_missing

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
    start: int = 0,
    stop: int | None = None,
) -> tuple[np.ndarray, float]:
    """Reads a video, an animation, an image or a folder of PNGs.

    Returns frames, uint8 [num_frames, height, width, 3], and their rate in frames a second.

    fps: with None every stored frame is returned, and the mean rate. With a rate, frame i is the
      one on screen i / fps seconds after the first, for as long as the file plays.
    height, width: both scale the picture to cover them and keep its middle; one alone keeps the
      shape. Rotation and non-square pixels are applied first.
    max_frames: reading stops after as many.
    start, stop: frames start to stop alone (those that there are), the same as of the whole file.
      Nothing else is turned into pixels; of MP4, MOV, Matroska and transport streams at a rate,
      what lies before is not decoded either.
    A still image or a folder of PNGs has no rate of its own: it counts as 1, or `fps`, a second.

    Raises MediaError for a missing, cut or corrupt file, one without a video stream, a picture over
    MAX_PIXELS, a clip over MAX_DECODED_BYTES (or over what `media_limits` says for this thread) or
    one that ends before `start`.
    """
    path = _named(path)
    if max_frames is not None and max_frames < 1:
        raise MediaError(f"max_frames {max_frames}: it must be 1 or more")
    if start < 0 or (stop is not None and stop <= start):
        raise MediaError(f"frames {start} to {stop}: start must be 0 or more, and stop over it")
    if max_frames is not None:
        stop = start + max_frames if stop is None else min(stop, start + max_frames)
    due = _Due(path, fps, start, stop)
    stack = _Stack(path)
    for picture, count in due.pictures():
        stack.add(picture.pixels(height, width), count, due.expected)
    if not len(stack):
        raise MediaError(f"{path} has {due.passed} frames; there is none from frame {start} on")
    if fps is not None:
        rate = fps
    elif due.played_s > 0 and not due.is_folder:
        rate = due.passed / due.played_s
    else:
        rate = 1.0
    return stack.frames(), float(rate)


def frames_of(path: str | Path) -> Iterator[tuple[float, np.ndarray]]:
    """Each stored frame of what `read_video` reads, decoded and not kept: when it ends, in seconds
    after the first one's beginning, and its pixels, uint8 [height, width, 3].

    MediaError as of `read_video`, when the frame's turn has come.
    """
    due = _Due(_named(path), None, 0, None)
    for picture, _ in due.pictures():
        yield due.played_s, picture.pixels(None, None)


def measure_video(
    path: str | Path, *, fps: float | None = None, stop: int | None = None
) -> tuple[int, int, int]:
    """(num_frames, height, width) of what `read_video` gives at this rate, at the file's own size.

    The file is decoded, because containers do not know: MediaError as of `read_video`.
    stop: frames are counted up to as many, and of what can be read from any place on (see
      `read_video`) only those about there are decoded.
    """
    path = _named(path)
    stamp = _stamp(path)
    known = _measured.get((path, fps, stop))
    if known is not None and known[0] == stamp is not None:
        return known[1]
    first, _ = read_video(path, max_frames=1)
    due = _Due(path, fps, 0 if stop is None else max(0, stop - 1), stop)
    for _ in due.pictures():
        pass
    size = due.passed, first.shape[1], first.shape[2]
    # Times of files are coarse: one that was written just now may yet change within the same tick.
    if stamp is not None and time.time_ns() - max(entry[2] for entry in stamp) > _SETTLED_NS:
        if len(_measured) >= 64:
            _measured.clear()
        _measured[path, fps, stop] = stamp, size
    return size


def _named(path: str | Path) -> Path:
    if not str(path):  # which would stand for the current folder
        raise MediaError("the path of a clip is empty")
    return Path(path)


_Stamp = tuple[tuple[str, int, int, int], ...]
_SETTLED_NS = 3_000_000_000  # FAT counts in steps of two seconds
_measured: dict[tuple[Path, float | None, int | None], tuple[_Stamp, tuple[int, int, int]]] = {}


def _stamp(path: Path) -> _Stamp | None:
    """What changes when a file, or a file of a folder, does: (name, size, times, inode) of each."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        stats = [(file.name, file.stat()) for file in files]
    except OSError:
        return None
    return tuple(
        (name, s.st_size, max(s.st_mtime_ns, s.st_ctime_ns), s.st_ino) for name, s in stats
    )


class _Due:
    """Which pictures of a file make up frames start to stop at a rate, and how often each.

    passed, played_s: how many frames were gone through, and how long they play. expected: how many
      there may be in all, a guess.
    """

    def __init__(self, path: Path, fps: float | None, start: int, stop: int | None):
        if fps is not None:
            check_rate(fps)
        self.is_folder = path.is_dir()
        self.expected = 1
        self.passed = 0
        self.played_s = 0.0
        self._path = path
        # The frames of a folder have no times: each is one frame at any rate.
        self._fps = None if self.is_folder else fps
        self._shown_fps = fps or 1.0
        self._start, self._stop = start, stop

    def pictures(self) -> Iterator[tuple[Any, int]]:
        """Each picture with a part in the frames, and how many of them it is."""
        picture = None
        with closing(self._source()) as source:
            for begin, picture in source:
                due = self._due(picture.end - begin)
                count = min(due, self._stop or due) - max(self.passed, self._start)
                self.played_s = picture.end - begin
                if count > 0:
                    yield picture, count
                self.passed = max(self.passed, due)
                if self._stop is not None and self.passed >= self._stop:
                    self.passed = self._stop
                    return
        if picture is None:
            raise MediaError(f"{self._path} holds no frames that can be decoded")
        if self.passed == 0:  # shorter than one frame at this rate
            self.passed = 1
            if self._start == 0:
                yield picture, 1

    def _due(self, played_s: float) -> int:
        """How many frames have begun before a time after the first."""
        if self._fps is None:
            return self.passed + 1
        # A millionth of a second of slack, against time stamps that are rounded up.
        return math.ceil(played_s * self._fps - 1e-6 * self._fps)

    def _source(self) -> Generator[tuple[float, _Picture], None, None]:
        """When the first picture of all begins, and a picture, one after the other."""
        if self.is_folder:
            yield from _with_first(_folder_frames(self._path, self._shown_fps))
        elif (image := open_image(self._path)) is not None:
            with image:
                yield from _with_first(_image_frames(image, self._path, self._shown_fps))
        else:
            yield from self._stream_frames()

    def _stream_frames(self) -> Iterator[tuple[float, _Picture]]:
        later_s = 0.0 if self._fps is None else self._start / self._fps
        with open_video(self._path) as container:
            stream = VideoStream(container, self._path)
            self.expected = stream.expected_frames(self._fps)
            pictures = stream.shown()
            first = next(pictures, None)
            if first is None:
                return
            yield first.start, first
            entries = self._entries(stream) if stream.can_seek(later_s) else []
            if entries == []:
                yield from ((first.start, picture) for picture in pictures)
                return
            # What went wrong may be for want of what lies before.
            with suppress(MediaError):
                found = stream.seek(first.start, later_s, entries)
                if found is not None:
                    yield from ((first.start, picture) for picture in found)
                    return
        # No place to begin at was found: from the beginning, what was seen already counts once.
        with open_video(self._path) as container:
            yield from _with_first(VideoStream(container, self._path).shown())

    def _entries(self, stream: VideoStream) -> list[float] | None:
        if stream.is_indexed:
            return None
        with open_video(self._path) as again:
            return VideoStream(again, self._path).entry_times()


class _Stack:
    """Frames one after the other in one array, which grows in place: they are never held twice."""

    def __init__(self, path: Path):
        self._path = path
        self._array: np.ndarray | None = None
        self._count = 0

    def add(self, frame: np.ndarray, times: int, expected: int) -> None:
        """expected: how many frames there may be in all; a guess."""
        end = self._count + times
        most = media_limits().decoded_bytes or MAX_DECODED_BYTES
        if end * frame.nbytes > most:
            raise MediaError(
                f"{self._path}: its frames take over {most / 2**20:.0f} MiB; "
                "read fewer (max_frames, start and stop, fps) or smaller ones (height, width)"
            )
        if self._array is None:
            room = min(max(expected, end), max(1, most // frame.nbytes))
            self._array = np.empty((room, *frame.shape), np.uint8)
        if frame.shape != self._array.shape[1:]:
            (h, w), (rows, columns) = self._array.shape[1:3], frame.shape[:2]
            raise MediaError(
                f"{self._path}: its pictures change from {w}x{h} to {columns}x{rows}; with a "
                "height and a width all are scaled to one size"
            )
        if end > len(self._array):
            self._array.resize((max(end, len(self._array) * 5 // 4), *frame.shape), refcheck=False)
        self._array[self._count : end] = frame
        self._count = end

    def __len__(self) -> int:
        return self._count

    def frames(self) -> np.ndarray:
        assert self._array is not None
        self._array.resize((self._count, *self._array.shape[1:]), refcheck=False)
        return self._array


def open_video(path: str | Path) -> Any:
    """A PyAV input container on a local file, never on an address or a playlist; or MediaError."""
    path = Path(path)
    file = open_file(path)
    try:
        head = file.read(HEAD_BYTES)
        missing = what_is_missing(file)
        if missing is not None and (known := what_it_is(head)) is not None:
            raise MediaError(f"{path} cannot be read as a video: {known}")
        if missing is not None:
            # Without its index an MP4 is lost to FFmpeg too; of several, copying keeps the first.
            advice = "; `ffmpeg -i FILE -c copy clip.mkv` keeps what there is"
            if "moov" in missing or "joined" in missing:
                advice = ""
            raise MediaError(f"{path} is damaged: {missing}{advice}")
        file.seek(0)
        # Old programs write tags in other alphabets than UTF-8: they matter to no picture.
        return av.open(
            file, "r", options={"format_whitelist": _CONTAINERS}, metadata_errors="replace"
        )
    except MediaError:
        file.close()
        raise
    except (av.FFmpegError, ValueError, OSError) as error:
        file.close()
        # FFmpeg says "invalid argument" of a container that is not on the list.
        unknown = getattr(error, "errno", None) == errno.EINVAL
        told = "it is none of the known containers" if unknown else reason(error)
        if isinstance(error, av.InvalidDataError):
            told = "it is none of the known containers, or its beginning is damaged"
        raise MediaError(f"{path} cannot be read as a video: {what_it_is(head) or told}") from error


class _Picture(Protocol):
    """A picture, until when it is shown (seconds), and its pixels: uint8 [height, width, 3]."""

    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...
    def pixels(self, height: int | None, width: int | None) -> np.ndarray: ...


class _Drawn(NamedTuple):
    """A picture out of an image file, to be asked for before the next one."""

    start: float
    end: float
    draw: Callable[..., np.ndarray]

    def pixels(self, height: int | None, width: int | None) -> np.ndarray:
        return self.draw(height=height, width=width)


def _with_first(pictures: Iterator[_Picture]) -> Iterator[tuple[float, _Picture]]:
    first: float | None = None
    for picture in pictures:
        first = picture.start if first is None else first
        yield first, picture


def _image_frames(image: Image.Image, path: Path, fps: float) -> Iterator[_Picture]:
    still = frame_range(image) == range(1)
    for start, end in animation_times(image, path):
        yield _Drawn(start, start + 1 / fps if still else end, partial(decode, image, path))


def _folder_frames(path: Path, fps: float) -> Iterator[_Picture]:
    names = [p for p in path.iterdir() if NUMBERED_PNG.fullmatch(p.name)]
    if not names:
        held = sorted(p.name for p in path.iterdir())
        told = f" (it holds {held[0]}{', ...' if len(held) > 1 else ''})" if held else ""
        raise MediaError(
            f"{path} holds no numbered PNG files{told}; 00000.png, 00001.png, ... would work"
        )
    for index, name in enumerate(sorted(names, key=lambda p: int(p.stem))):
        yield _Drawn(index / fps, (index + 1) / fps, partial(read_image, name))
