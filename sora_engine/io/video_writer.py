"""Videos out, a frame at a time.

| output path | what is written |
|---|---|
| `.mp4` | H.264, yuv420p, BT.709, `moov` in front; an odd side gains a repeated row or column |
| `.gif`, `.webp` | an animation that plays for ever (see animation.py) |
| `.png` | one frame, exact |
| no suffix | a folder of numbered PNGs, `00000.png` on |

Everything is written beside its target under a temporary name and moved into place at the end, so
a failure leaves nothing half-written. An existing file is replaced; an existing folder only when it
is empty or holds nothing but numbered PNGs. A symbolic link stays one: the file or the folder that
it points at is written, in the format that the link's own name says.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from sora_engine.errors import MediaError
from sora_engine.io.animation import GifWriter, WebpWriter
from sora_engine.io.atomic import name_max, temporary_beside, written_through
from sora_engine.io.credentials import Credentials, Source
from sora_engine.io.formats import NUMBERED_PNG, SUFFIXES, check_rate
from sora_engine.io.images import check_frame, write_png
from sora_engine.io.provenance import Provenance
from sora_engine.io.watermark import Watermark

# Near-transparent: about 50 dB on smooth clips. x264's default of 23 smears small coloured shapes.
H264_CRF = 13
# Half of the processor time of "medium" at crf 14, at as many dB (0.1 less on textures, 0.6 less on
# gradients of 50 dB), in files that are 1% smaller to 9% larger.
H264_PRESET = "veryfast"
_ANY_MAY_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_BT709 = 1
_TV_RANGE = 1
_SMALL = 256 * 256
"""Pixels up to which threads of x264 wait for each other longer than they work."""


class VideoWriter:
    """Writes uint8 frames [height, width, 3] one by one, in the format of the path's suffix.

    A context manager: leaving it finishes the file, leaving it by an exception removes every trace.
    The path is checked, and its temporary file made, on construction, so that a place where nothing
    can be written is found before the work and not after it.

    fps: frames a second, up to 1000 (50 for .gif, 90 for .webp).
    num_frames: how many will come, if known; a `.png` refuses more than one at once.
    credentials: sign the file, or each picture of a folder, once it is whole. sources: what a
        caller gave for it, which the signed statement names.
    watermark: goes into the pixels of each frame; what the file says of itself names its payload.
    Raises MediaError, which names the path and what would work, and CredentialsError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float | Fraction,
        *,
        num_frames: int | None = None,
        provenance: Provenance | None = None,
        credentials: Credentials | None = None,
        sources: Sequence[Source] = (),
        watermark: Watermark | None = None,
    ):
        self.path = check_output(path, num_frames=num_frames, fps=fps)
        rate = Fraction(fps).limit_denominator(1001)  # 1001 keeps 24000/1001 exact
        if watermark is not None and provenance is not None:
            settings = {**provenance.settings, "watermark": watermark.payload}
            provenance = replace(provenance, settings=settings)
        comment = "" if provenance is None else provenance.to_json()
        self._watermark = watermark
        self._provenance, self._credentials, self._sources = provenance, credentials, sources
        self._shape: tuple[int, ...] | None = None
        self._count = 0
        self._target = written_through(self.path)
        self._temporary = temporary_beside(self._target)
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
        if self._watermark is not None:
            array = self._watermark.embed(array)
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
                for picture in sorted(self._temporary.iterdir()):
                    self._sign(picture, picture.name)
                _replace_folder(self._temporary, self._target)
            else:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._sign(self._temporary, self.path.name)
                os.replace(self._temporary, self._target)
        except (OSError, av.FFmpegError) as error:
            self.abort()
            raise MediaError(f"{self.path} cannot be written: {error}") from error
        except BaseException:
            self.abort()
            raise
        self._closed = True

    def _sign(self, file: Path, title: str) -> None:
        """Puts a signed copy in the place of a finished file."""
        if self._credentials is None:
            return
        signed = temporary_beside(file)
        mark = None if self._watermark is None else self._watermark.payload
        try:
            self._credentials.sign(
                file,
                signed,
                title=title,
                provenance=self._provenance,
                sources=self._sources,
                watermark=mark,
            )
            with signed.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(signed, file)
        finally:
            signed.unlink(missing_ok=True)

    def abort(self) -> None:
        """Removes what was written so far; the target stays as it was."""
        self._closed = True
        if self._file is None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # what is buffered does not fit on the disk either
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
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    fps: float | Fraction,
    provenance: Provenance | None = None,
    credentials: Credentials | None = None,
    sources: Sequence[Source] = (),
    watermark: Watermark | None = None,
) -> Path:
    """Writes an iterable of frames, or an array of them, each uint8 [height, width, 3].

    Raises as `VideoWriter` does. Returns the path.
    """
    num_frames = len(frames) if isinstance(frames, Sized) else None
    with VideoWriter(
        path,
        fps,
        num_frames=num_frames,
        provenance=provenance,
        credentials=credentials,
        sources=sources,
        watermark=watermark,
    ) as writer:
        for frame in frames:
            writer.write(frame)
    return writer.path


def check_output(
    path: str | os.PathLike[str],
    *,
    num_frames: int | None = None,
    fps: float | Fraction | None = None,
) -> Path:
    """The path, if such a video can be written there; else MediaError.

    Looks at the suffix, at what already stands there, and whether the parent folder takes a file;
    leaves nothing behind.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise MediaError(f"an output is a path in a text or a Path, got {path!r}")
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
        check_rate(fps, suffix)
    if not path.name or path.name == "..":
        raise MediaError(f"{path}: name a file or a new folder")
    if path.name.lower() in SUFFIXES:
        raise MediaError(f"{path}: a suffix needs a name before it, such as a{path.name}")
    if "\0" in str(path):
        raise MediaError(f"{str(path)!r}: a name has no null characters")
    longest, length = name_max(path.parent), len(os.fsencode(path.name))
    if length > longest:
        raise MediaError(
            f"{path}: the name has {length} bytes; {longest} is the most that a file here has"
        )
    try:
        folder = written_through(path).parent
        if not folder.is_dir():
            raise MediaError(f"{path}: the folder {folder} does not exist")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise MediaError(f"{path} cannot be written: {error.strerror or error}") from error
    if suffix and path.is_dir():
        raise MediaError(f"{path} is a folder")
    if path.exists() and not (os.access(path, os.W_OK) and path.stat().st_mode & _ANY_MAY_WRITE):
        raise MediaError(f"{path} is write-protected; `chmod u+w` it, or name another")
    if not suffix and path.exists():
        if not path.is_dir():
            raise MediaError(
                f"{path} is a file, and a path without a suffix means a folder of PNGs"
            )
        strange = [p.name for p in path.iterdir() if not NUMBERED_PNG.fullmatch(p.name)]
        if strange:
            raise MediaError(
                f"{path} holds other files ({sorted(strange)[0]}); name an empty or a new folder"
            )
    return path


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


class _ForFFmpeg:
    """A file that FFmpeg writes: its first error is kept, and what follows goes nowhere.

    What a file raises to FFmpeg, PyAV prints a traceback of, and drops all but the first of it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.name = file, file.name
        self._error: OSError | None = None

    def write(self, data: bytes) -> int:
        return self._attempt(lambda: self._file.write(data), len(data))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._attempt(lambda: self._file.seek(offset, whence), offset)

    def tell(self) -> int:
        return self._attempt(self._file.tell, 0)

    def _attempt(self, work: Callable[[], int], otherwise: int) -> int:
        if self._error is None:
            try:
                return work()
            except OSError as error:
                self._error = error
        return otherwise

    def check(self) -> None:
        """Raises the error, if there was one."""
        if self._error is not None:
            raise self._error


class _Mp4Writer:
    def __init__(self, file: BinaryIO, rate: Fraction, comment: str):
        self._file = _ForFFmpeg(file)
        self._container = av.open(self._file, "w", format="mp4", options={"movflags": "+faststart"})
        if comment:
            self._container.metadata["comment"] = comment
        try:
            self._stream = self._container.add_stream("libx264", rate=rate)
        except (ValueError, av.FFmpegError) as error:
            raise MediaError(
                "this build of PyAV has no libx264, so no .mp4 can be written"
            ) from error
        self._stream.pix_fmt = "yuv420p"
        # x264's fast code for macroblock trees reads memory that nobody wrote, and the same frames
        # would become other bytes from run to run.
        self._stream.options = {"crf": str(H264_CRF), "preset": H264_PRESET, "mbtree": "0"}
        self._converter = VideoReformatter()  # kept, as each sets up tables of its own
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
            if height * width <= _SMALL:
                self._stream.codec_context.thread_count = 1
            self._started = True
        picture = self._converter.reformat(
            av.VideoFrame.from_ndarray(frame, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            interpolation="BICUBIC",
            threads=1,
        )
        self._container.mux(self._stream.encode(picture))
        self._file.check()

    def close(self) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()
        self._file.check()


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
