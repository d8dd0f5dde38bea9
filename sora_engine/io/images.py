"""Still images in and out, with limits: what is read is checked before it is decoded.

Rules, the same for images and videos:
- **fit**: with a height and a width, a picture is scaled (Lanczos) until it covers them and its
  middle is kept; with one of the two, the other follows the picture's own shape.
- **pixels**: transparency is laid on white, 16-bit greys keep their upper 8 bits, and the EXIF
  orientation is applied.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from sora_engine.errors import MediaError

# Twice 8K UHD. A PNG of some hundred kilobytes can declare far more than memory holds.
MAX_PIXELS = 2 * 7680 * 4320

EXIF_IMAGE_DESCRIPTION = 0x010E

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def read_image(
    path: str | Path, *, height: int | None = None, width: int | None = None
) -> np.ndarray:
    """Reads the first (or only) frame of a PNG, JPEG, WebP or GIF file: uint8 [height, width, 3].

    Raises MediaError for a missing, corrupt or oversized file and for any other format.
    """
    image = open_image(Path(path))
    if image is None:
        raise MediaError(f"{path} is not a PNG, JPEG, WebP or GIF image")
    with image:
        return decode(image, path, height=height, width=width)


def open_image(path: Path) -> Image.Image | None:
    """Opens an image file whose declared size is within MAX_PIXELS; None for any other format.

    The format is taken from the first bytes, never from the suffix.
    Raises MediaError for a missing or unreadable file, a bomb, or a header that is broken.
    """
    file = open_file(path)
    try:
        head = file.read(32)
        file.seek(0)
        if image_format(head) is None:
            file.close()
            return None
        # WebP's decoder takes the memory for its canvas on opening, so the header is read first.
        check_size(path, *(_declared_size(head) or (1, 1)))
        image = Image.open(file, formats=_FORMATS)
        check_size(path, *image.size)
        return image
    except MediaError:
        file.close()
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on hostile headers
        file.close()
        raise MediaError(f"{path} cannot be read as an image: {_reason(error)}") from error


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading; MediaError says what stands in the way."""
    if path.is_dir():
        raise MediaError(f"{path} is a folder, not a file")
    if not path.exists():
        raise MediaError(f"{path} does not exist")
    if not path.is_file():
        raise MediaError(f"{path} is not a regular file")
    try:
        return path.open("rb")
    except OSError as error:
        raise MediaError(f"{path} cannot be opened: {error.strerror}") from error


def image_format(head: bytes) -> str | None:
    """The image format that a file's first bytes announce, or None."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return None


def check_size(path: str | Path, width: int, height: int) -> None:
    """Raises MediaError for a picture that is empty or holds more than MAX_PIXELS."""
    if width < 1 or height < 1:
        raise MediaError(f"{path} is {width}x{height}: empty")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{path} is {width}x{height}, {width * height} pixels; at most {MAX_PIXELS} are read"
        )


def _declared_size(head: bytes) -> tuple[int, int] | None:
    """(width, height) of PNG, GIF and WebP headers; None for JPEG, which says it further on."""
    match image_format(head):
        case "PNG":
            return struct.unpack(">II", head[16:24])
        case "GIF":
            return struct.unpack("<HH", head[6:10])
        case "WEBP" if head[12:16] == b"VP8X":
            width, height = head[24:27], head[27:30]
            return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
        case "WEBP" if head[12:16] == b"VP8L":
            bits = int.from_bytes(head[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case "WEBP" if head[12:16] == b"VP8 ":
            width, height = struct.unpack("<HH", head[26:30])
            return width & 0x3FFF, height & 0x3FFF
    return None


def decode(
    image: Image.Image, path: str | Path, *, height: int | None = None, width: int | None = None
) -> np.ndarray:
    """The current frame of an open image as uint8 [height, width, 3], by this module's rules."""
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16") or upright.mode == "I":
            grey = np.asarray(upright, dtype=np.int64).clip(0, 65535) >> 8
            upright = Image.fromarray(grey.astype(np.uint8))
        if upright.has_transparency_data:
            rgba = upright.convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            upright = Image.alpha_composite(white, rgba)
        rgb = upright.convert("RGB")
    except Exception as error:
        raise MediaError(f"{path} cannot be decoded: {_reason(error)}") from error
    return np.asarray(fit(rgb, height=height, width=width))


def fit(image: Image.Image, *, height: int | None, width: int | None) -> Image.Image:
    """Scales a picture to cover `height` and `width` and keeps its middle."""
    for name, value in (("height", height), ("width", width)):
        if value is not None and value < 1:
            raise MediaError(f"{name} {value}: it must be 1 or more")
    if height is None and width is None:
        return image
    if height is None:
        assert width is not None
        height = max(1, round(image.height * width / image.width))
    elif width is None:
        width = max(1, round(image.width * height / image.height))
    check_size("the resized picture", width, height)
    if (width, height) == image.size:
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def check_frame(frame: Any) -> np.ndarray:
    """A frame as a contiguous uint8 array [height, width, 3]; MediaError for any other array."""
    array = np.asarray(frame)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise MediaError(
            f"a frame is {array.dtype} {list(array.shape)}; it must be uint8 [height, width, 3]"
        )
    return np.ascontiguousarray(array)


def write_png(file: BinaryIO, frame: np.ndarray, comment: str = "") -> None:
    """Writes one frame, uint8 [height, width, 3], losslessly, with `comment` as its text chunk."""
    text = PngImagePlugin.PngInfo()
    if comment:
        text.add_text("Comment", comment)
    Image.fromarray(frame).save(file, "PNG", pnginfo=text)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
