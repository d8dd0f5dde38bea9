"""Animated GIF and WebP files: Pillow codes each picture, the containers are laid out here.

Pillow (and libwebp's own animation encoder) merge a frame into the one before it when the two look
the same, which loses frames of a video that stands still; these writers keep every frame.

Sources: CompuServe's GIF89a specification; Google's "WebP Container Specification".
"""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import GifImagePlugin, Image

from sora_engine.errors import MediaError
from sora_engine.io.images import EXIF_IMAGE_DESCRIPTION

GIF_MAX_FPS = 50  # players slow down what claims to be faster (a delay under 2/100 s)
WEBP_MAX_FPS = 90  # likewise (under 11 ms)
WEBP_MAX_SIDE = 16383
WEBP_QUALITY = 90

_PALETTE_FRAMES = 16  # as many frames, spread over the clip, choose a GIF's palette


def durations(num_frames: int, fps: Fraction, ticks_per_s: int) -> list[int]:
    """How long each frame stands, in ticks: rounded so that frame i starts at round(i / fps)."""
    starts = [round(Fraction(i * ticks_per_s) / fps) for i in range(num_frames + 1)]
    return [after - before for before, after in itertools.pairwise(starts)]


class GifWriter:
    """A GIF that plays for ever, of one palette for all its frames, so that no colour flickers.

    A clip of at most 256 colours is stored exactly. Otherwise the palette is the median cut over
    16 frames spread across the clip, without dithering (its noise would crawl from frame to frame).
    The frames are held until `close`, since they all have a say in the palette.
    """

    def __init__(self, file: BinaryIO, fps: Fraction, comment: str):
        self._file, self._fps, self._comment = file, fps, comment
        self._frames: list[np.ndarray] = []

    def write(self, frame: np.ndarray) -> None:
        if max(frame.shape[:2]) > 65535:
            raise MediaError(f"{frame.shape[1]}x{frame.shape[0]}: a .gif is at most 65535 a side")
        self._frames.append(frame.copy())

    def close(self) -> None:
        height, width = self._frames[0].shape[:2]
        palette = _Palette(self._frames)
        out = self._file
        out.write(b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF7, 0, 0) + palette.colours)
        out.write(b"\x21\xff\x0bNETSCAPE2.0\x03\x01\x00\x00\x00")  # play for ever
        if self._comment:
            out.write(b"\x21\xfe")
            text = self._comment.encode("ascii", "replace")
            for start in range(0, len(text), 255):
                block = text[start : start + 255]
                out.write(bytes([len(block)]) + block)
            out.write(b"\x00")
        before: np.ndarray | None = None
        delays = durations(len(self._frames), self._fps, 100)
        for frame, delay in zip(self._frames, delays, strict=True):
            indices = palette.indices(frame)
            top, bottom, left, right = _changed(before, indices)
            patch = Image.fromarray(indices[top:bottom, left:right], mode="P")
            patch.putpalette(palette.colours)
            for block in GifImagePlugin.getdata(
                patch, (left, top), duration=delay * 10, disposal=1
            ):
                out.write(block)
            before = indices
        out.write(b"\x3b")


class _Palette:
    """A clip's 256 colours. `colours` is 768 bytes; `indices` maps a frame to [height, width]."""

    def __init__(self, frames: list[np.ndarray]):
        self._exact: np.ndarray | None = np.empty(0, np.uint32)
        for frame in frames:
            self._exact = np.union1d(self._exact, _packed(frame))
            if self._exact.size > 256:
                self._exact = None
                break
        if self._exact is not None:
            bands = np.stack([self._exact >> shift & 255 for shift in (16, 8, 0)], axis=-1)
            self.colours = bands.astype(np.uint8).tobytes().ljust(768, b"\0")
            return
        count = min(_PALETTE_FRAMES, len(frames))
        picked = {round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(count)}
        sheet = Image.fromarray(np.concatenate([frames[i] for i in sorted(picked)]))
        self._median_cut = sheet.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1)
        self.colours = bytes(self._median_cut.getpalette("RGB") or b"").ljust(768, b"\0")

    def indices(self, frame: np.ndarray) -> np.ndarray:
        if self._exact is not None:  # Pillow's own lookup drops the two lowest bits
            return np.searchsorted(self._exact, _packed(frame)).astype(np.uint8)
        image = Image.fromarray(frame)
        return np.asarray(image.quantize(palette=self._median_cut, dither=Image.Dither.NONE))


def _packed(frame: np.ndarray) -> np.ndarray:
    """Each pixel's colour as one uint32: [height, width]."""
    return frame.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)


def _changed(before: np.ndarray | None, after: np.ndarray) -> tuple[int, int, int, int]:
    """The rows and columns (top, bottom, left, right) that differ; one pixel when none do."""
    if before is None:
        return 0, after.shape[0], 0, after.shape[1]
    differs = before != after
    rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
    if rows.size == 0:
        return 0, 1, 0, 1
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


class WebpWriter:
    """An animated WebP that plays for ever, lossy at quality 90, a frame coded as it arrives."""

    def __init__(self, file: BinaryIO, fps: Fraction, comment: str):
        self._file, self._fps, self._comment = file, fps, comment
        self._shape: tuple[int, int] | None = None
        self._count = 0

    def write(self, frame: np.ndarray) -> None:
        height, width = frame.shape[:2]
        if max(height, width) > WEBP_MAX_SIDE:
            raise MediaError(f"{width}x{height}: a .webp is at most {WEBP_MAX_SIDE} a side")
        if self._shape is None:
            self._shape = height, width
            flags = 0x02 | (0x08 if self._comment else 0)  # animation, EXIF
            self._file.write(b"RIFF\0\0\0\0WEBP")
            self._chunk(b"VP8X", bytes([flags, 0, 0, 0]) + _u24(width - 1) + _u24(height - 1))
            self._chunk(b"ANIM", b"\xff\xff\xff\xff\x00\x00")  # white behind, for ever
        start, end = (round(Fraction(i * 1000) / self._fps) for i in (self._count, self._count + 1))
        still = io.BytesIO()
        Image.fromarray(frame).save(still, "WEBP", quality=WEBP_QUALITY, method=4)
        place = _u24(0) + _u24(0) + _u24(width - 1) + _u24(height - 1)
        no_blend = b"\x02"
        self._chunk(b"ANMF", place + _u24(end - start) + no_blend + _bitstream(still.getvalue()))
        self._count += 1

    def close(self) -> None:
        if self._comment:
            exif = Image.Exif()
            exif[EXIF_IMAGE_DESCRIPTION] = self._comment
            self._chunk(b"EXIF", exif.tobytes().removeprefix(b"Exif\0\0"))
        size = self._file.tell()
        self._file.seek(4)
        self._file.write(struct.pack("<I", size - 8))
        self._file.seek(size)

    def _chunk(self, name: bytes, payload: bytes) -> None:
        padding = b"\0" * (len(payload) % 2)
        self._file.write(name + struct.pack("<I", len(payload)) + payload + padding)


def _bitstream(still: bytes) -> bytes:
    """The picture chunk (VP8 or VP8L, header included) of a still WebP file."""
    at = 12
    while at < len(still):
        name, size = still[at : at + 4], struct.unpack("<I", still[at + 4 : at + 8])[0]
        end = at + 8 + size + size % 2
        if name in (b"VP8 ", b"VP8L"):
            return still[at:end]
        at = end
    raise AssertionError("a still WebP without a picture")


def _u24(value: int) -> bytes:
    return value.to_bytes(3, "little")


_ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")
"""Formats whose several pictures follow each other; a JPEG's are other views of one."""


def frame_range(image: Image.Image) -> range:
    """The pictures of an open image file that are shown one after the other; of a still, one.

    The picture that a PNG shows where animations are unknown is none of its frames.
    """
    count = getattr(image, "n_frames", 1) if image.format in _ANIMATIONS else 1
    return range(1 if count > 1 and image.info.get("default_image") else 0, count)


def animation_times(image: Image.Image, path: str | Path) -> Iterator[tuple[float, float]]:
    """(start_s, end_s) of each frame of an open image, stills included; the image stands at it.

    A frame without a duration, or with one of 10 ms or less, stands for 100 ms, as in browsers.
    """
    start = 0.0
    for index in frame_range(image):
        try:
            image.seek(index)
            image.load()
        except Exception as error:
            raise MediaError(f"{path}: frame {index} cannot be decoded: {error}") from error
        milliseconds = float(image.info.get("duration", 0) or 0)
        end = start + (milliseconds / 1000 if milliseconds > 10 else 0.1)
        yield start, end
        start = end
