"""The pictures of a video file in the order and at the times that they are shown.

A picture is decoded as it comes and turned into RGB only when it is asked for (`Shown.pixels`).

- **which stream**: the first that plays by default; covers and thumbnails are none.
- **times**: a picture stands until the next one comes. Where the times of a file begin anew (clips
  joined byte for byte, a recorder's restart) they go on from the end of what was before; so they do
  after a gap of over 10 s in a transport or program stream, as in the ffmpeg command.
- **interlaced** pictures are deinterlaced by bwdif (Weston 3 fields and yadif), a frame a frame.
- **transparency** is laid on white, a display matrix and pixels that are not square are applied.
- **HDR** (PQ, HLG) and wide colours are brought to SDR by `hdr`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.frame import PictureType
from av.video.reformatter import Interpolation
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io import hdr
from sora_engine.io.images import check_size, fit, on_white
from sora_engine.io.orientation import orient

logger = logging.getLogger(__name__)

# swscale's default takes short cuts: darker by one level, and 4 dB further off.
_TO_RGB = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT

# Containers without an index, in which a long gap between two pictures is a break of the recording.
_BROADCAST = ("mpegts", "mpeg", "mpegvideo")
_GAP_S = 10.0

# Of these a place can be found by its time: they have an index, and one clock. A transport stream
# has none, and its clock must be looked at first.
_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_UNINDEXED = ("mpegts",)
_SEEK_FROM_S = 1.0

# PyAV's type stubs leave out its constructor.
_side_data_of: Any = SideDataContainer

_NOT_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
_UNNAMED = 2  # "unspecified" of H.273
_DOLBY_VISION = ("dvh1", "dvhe", "dvav", "dva1", "dav1")


class Shown(NamedTuple):
    """A picture, when it is shown (seconds), and its pixels on demand: uint8 [height, width, 3]."""

    start: float
    end: float
    picture: Any
    matrix: bytes | None
    stream: VideoStream

    def pixels(self, height: int | None, width: int | None) -> np.ndarray:
        return self.stream.pixels(self.picture, self.matrix, height, width)


class VideoStream:
    """The video of an open PyAV container. path is for messages."""

    def __init__(self, container: Any, path: Path):
        self._container, self._path = container, path
        self._stream = _choose(container, path)
        self._codec = self._stream.codec_context
        self._stream.thread_type = "AUTO"
        check_size(path, self._codec.width, self._codec.height)
        self._own_decoder = self._decoder_of_alpha()
        self._step = 1 / float(self._stream.average_rate or self._stream.guessed_rate or 25)
        self._broadcast = container.format.name in _BROADCAST
        self._deinterlacer: _Deinterlacer | None = None
        self._matrix: bytes | None = None
        self._landing = False

    def shown(self) -> Iterator[Shown]:
        """Every picture, from the first on."""
        try:
            yield from self._timed(self._decoded())
        except MediaError:
            raise
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(f"{self._path} is damaged: {reason(error)}") from error

    def expected_frames(self, fps: float | None) -> int:
        """How many frames the container's header lets expect; at least 1."""
        if fps is None:
            return max(1, self._stream.frames)
        return max(1, math.ceil((self._container.duration or 0) / av.time_base * fps))

    def can_seek(self, later_s: float) -> bool:
        """Whether a place so long after the first picture can be gone to."""
        known = self.is_indexed or self._container.format.name in _UNINDEXED
        return known and later_s > _SEEK_FROM_S

    @property
    def is_indexed(self) -> bool:
        return self._container.format.name in _INDEXED

    def entry_times(self) -> list[float]:
        """When the pictures that decoding can begin at are shown (seconds), in order.

        None at all where times begin anew or leap. Reads every packet, and decodes none.
        """
        times, before = [], None
        gap = _GAP_S / float(self._stream.time_base)
        for packet in self._container.demux(self._stream):
            if packet.dts is None:
                continue
            if before is not None and not 0 <= packet.dts - before <= gap:
                return []
            before = packet.dts
            if packet.is_keyframe and packet.pts is not None:
                times.append(float(packet.pts * self._stream.time_base))
        return times

    def seek(
        self, first: float, later_s: float, entries: list[float] | None = None
    ) -> Iterator[Shown] | None:
        """The pictures from some way before `later_s` seconds after the first, at `first`, on.

        entries: `entry_times` of the file, where it has no index. None where no place to begin at
        was found; the container is then of no more use.
        """
        # Frames of room before: a deinterlacer looks at its neighbours.
        latest = first + later_s - max(3 * self._step, 0.1)
        if entries is None:
            backs = itertools.takewhile(
                lambda s: s < later_s, (_SEEK_FROM_S * 8**i for i in range(9))
            )
            targets = [first + later_s - back for back in backs]
        else:
            targets = [time - 0.5 for time in entries if time <= latest][:-3:-1]
        for target in targets:
            self._container.seek(int(target / self._stream.time_base), stream=self._stream)
            if self._own_decoder is not None:
                self._own_decoder = self._decoder_of_alpha()
            self._deinterlacer = None
            self._landing = entries is not None
            found = self.shown()
            try:
                begin = next(found, None)
            except MediaError:  # what was left out before may be what it lacks
                continue
            # A picture of its own to begin with: a stream of gradual refresh takes frames until it
            # is whole.
            if (
                begin is not None
                and begin.start <= latest
                and begin.picture.pict_type in (PictureType.I, PictureType.NONE)
            ):
                return itertools.chain([begin], found)
        return None

    def _decoder_of_alpha(self) -> Any:
        """libvpx's decoder for VP8 and VP9 with transparency, which FFmpeg's own leaves out."""
        name = self._codec.name
        if self._stream.metadata.get("alpha_mode") != "1" or name not in ("vp8", "vp9"):
            return None
        library = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[name]
        try:
            decoder = av.CodecContext.create(library, "r")
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(
                f"{self._path} has transparency, which takes FFmpeg with {library}; this one has "
                f"none. `ffmpeg -i FILE -c:v ffv1 -pix_fmt yuva420p clip.mkv` elsewhere would work"
            ) from error
        decoder.width, decoder.height = self._codec.width, self._codec.height
        return decoder

    def _decoded(self) -> Iterator[Any]:
        """Decoded pictures, whole ones only, deinterlaced where they are interlaced."""
        coded = decoded = 0
        for packet in self._container.demux(self._stream):
            # A transport stream counts its packets: where clips were joined they do not add up.
            if packet.is_corrupt and not self._broadcast:
                raise MediaError(f"{self._path} is damaged or was cut: a picture is not whole")
            if self._landing and not packet.is_keyframe:
                continue
            self._landing = False
            if packet.size and not packet.is_discard and (coded or packet.is_keyframe):
                coded += 1
            if self._own_decoder is None:
                pictures = packet.decode()
            else:
                pictures = self._own_decoder.decode(packet if packet.size else None)
            for picture in pictures:
                decoded += 1
                self._check(picture)
                if picture.interlaced_frame and self._deinterlacer is None:
                    self._deinterlacer = _Deinterlacer(self._path)
                if self._deinterlacer is None:
                    yield picture
                else:
                    yield from self._deinterlacer.push(picture)
        if self._deinterlacer is not None:
            yield from self._deinterlacer.push(None)
        # A packet may hold one of a picture's two fields, and the first ones may lean on what was
        # never there. A decoder that gives up on more than that does so without a word.
        if coded > 2 * decoded + 4:
            raise MediaError(
                f"{self._path} is damaged: {decoded} of its {coded} pictures can be decoded"
            )

    def _check(self, picture: Any) -> None:
        if picture.is_corrupt:  # the decoder painted over what it could not read
            where = "" if picture.time is None else f" at {float(picture.time):.2f} s"
            raise MediaError(f"{self._path} is damaged{where}")
        check_size(self._path, picture.width, picture.height)

    def _timed(self, pictures: Iterator[Any]) -> Iterator[Shown]:
        held: tuple[float, float, Any, bytes | None] | None = None
        shift = 0.0
        clock = 0.0
        for picture in pictures:
            # H.264 and HEVC tell it once, for all pictures that follow. A picture asked for its own
            # `side_data` holds itself in memory until the garbage is collected.
            told = _side_data_of(picture).get(SideData.DISPLAYMATRIX)
            self._matrix = self._matrix if told is None else bytes(told)
            time = clock - shift if picture.time is None else float(picture.time)
            claimed = float((picture.duration or 0) * (picture.time_base or 0)) or self._step
            if held is not None:
                anew = time + shift < held[0]
                gap = self._broadcast and time + shift - held[1] > _GAP_S
                if anew or gap:
                    shift = held[1] - time
                # A frame stands until the next one comes, whatever duration it claims.
                yield Shown(held[0], time + shift, held[2], held[3], self)
            held = (time + shift, time + shift + claimed, picture, self._matrix)
            clock = held[1]
        if held is not None:
            yield Shown(*held, self)

    def pixels(
        self, picture: Any, matrix: bytes | None, height: int | None, width: int | None
    ) -> np.ndarray:
        """A decoded picture as uint8 [height, width, 3]: upright, of square pixels, then fitted."""
        try:
            rgb = self._rgb(picture)
        except MediaError as error:
            raise MediaError(f"{self._path}: {error}") from None
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(f"{self._path} cannot be turned into RGB: {reason(error)}") from error
        aspect = self._stream.sample_aspect_ratio
        if aspect and aspect != 1:
            columns = max(1, round(rgb.shape[1] * Fraction(aspect)))
            check_size(self._path, columns, rgb.shape[0])
            rgb = np.asarray(Image.fromarray(rgb).resize((columns, rgb.shape[0])))
        rgb = orient(rgb, matrix)
        if height in (None, rgb.shape[0]) and width in (None, rgb.shape[1]):
            return rgb
        image = Image.fromarray(np.ascontiguousarray(rgb))
        return np.asarray(fit(image, height=height, width=width))

    def _rgb(self, picture: Any) -> np.ndarray:
        """The colours of a decoded picture for an SDR screen, on white."""
        transfer = self._named(picture, "color_trc")
        primaries = self._named(picture, "color_primaries")
        if transfer == _UNNAMED and self._codec.codec_tag.lower() in _DOLBY_VISION:
            raise MediaError(
                "it is Dolby Vision without a plain layer, whose colours only its own decoder "
                "knows; export it as HLG, HDR10 or SDR"
            )
        deep = hdr.needs_conversion(transfer, primaries)
        clear = picture.format.has_palette or any(p.is_alpha for p in picture.format.components)
        kind = ("rgba64le" if clear else "rgb48le") if deep else ("rgba" if clear else "rgb24")
        rgb = picture.to_ndarray(format=kind, interpolation=_TO_RGB)
        if deep:
            shown = hdr.to_sdr(rgb[..., :3], transfer, primaries)
            rgb = np.dstack([shown, (rgb[..., 3] >> 8).astype(np.uint8)]) if clear else shown
        return np.asarray(on_white(Image.fromarray(rgb))) if clear else rgb

    def _named(self, picture: Any, name: str) -> int:
        """A code of H.273 that the picture names, or else its container; 2 where neither does."""
        for holder in (picture, self._codec):
            value = int(getattr(holder, name, None) or _UNNAMED)
            if value != _UNNAMED:
                return value
        return _UNNAMED


class _Deinterlacer:
    """bwdif over pictures of one size after the other; those that are progressive pass through."""

    def __init__(self, path: Path):
        self._path = path
        self._graph: Any = None
        self._layout: tuple[Any, ...] = ()

    def push(self, picture: Any) -> Iterator[Any]:
        """The pictures that are ready once another has come; None stands for the end."""
        layout = () if picture is None else (picture.width, picture.height, picture.format.name)
        if self._graph is not None and layout != self._layout:
            self._graph.push(None)
            yield from self._ready()
            self._graph = None
        if picture is None:
            return
        if self._graph is None:
            self._layout = layout
            self._graph = self._built(picture)
        self._graph.push(picture)
        yield from self._ready()

    def _built(self, picture: Any) -> Any:
        try:
            graph = Graph()
            source = graph.add_buffer(
                width=picture.width,
                height=picture.height,
                format=picture.format,
                time_base=picture.time_base,
            )
            bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
            sink = graph.add("buffersink")
            source.link_to(bwdif)
            bwdif.link_to(sink)
            graph.configure()
        except (av.FFmpegError, ValueError) as error:
            raise MediaError(
                f"{self._path} is interlaced and cannot be deinterlaced here ({reason(error)}); "
                "`ffmpeg -i FILE -vf bwdif=0 clip.mp4` would work"
            ) from error
        return graph

    def _ready(self) -> Iterator[Any]:
        while True:
            try:
                yield self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return


def _choose(container: Any, path: Path) -> Any:
    """The stream that plays: the first of those that do by default."""
    streams = [s for s in container.streams.video if not s.disposition & _NOT_VIDEO]
    if not streams:
        only = ": its only picture is a cover" if container.streams.video else ""
        raise MediaError(f"{path} has no video stream{only}; a file of moving pictures would work")
    chosen = next((s for s in streams if s.disposition & Disposition.default), streams[0])
    if chosen.codec_context is None:
        raise MediaError(
            f"{path} is in a codec that this FFmpeg does not know; H.264, HEVC, VP9 or AV1 would "
            "work"
        )
    if len(streams) > 1:
        codecs = [s.codec_context for s in streams]
        sizes = ", ".join("?" if c is None else f"{c.width}x{c.height}" for c in codecs)
        logger.warning(
            "%s holds %d video streams (%s); number %d is read",
            path,
            len(streams),
            sizes,
            streams.index(chosen) + 1,
        )
    return chosen


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return said or type(error).__name__
