"""Still images in and out, with limits: what is read is checked before it is decoded.

Rules, the same for images and videos, for files and for PIL images:
- **fit**: with a height and a width, a picture is scaled (Lanczos) until it covers them and its
  middle is kept; with one of the two, the other follows the picture's own shape.
- **pixels**: transparency is laid on white, 16-bit greys keep their upper 8 bits, an embedded
  colour profile is brought to sRGB, and the EXIF orientation is applied.
- **which picture**: of a file that holds several (a phone's gain map, a stereo pair), the first or
  the one that it names as its main one. An HDR picture (PQ, HLG) is refused.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, features

from sora_engine.errors import MediaError
from sora_engine.io import hdr
from sora_engine.io.foreign import HEAD_BYTES, video_kind, what_it_is
from sora_engine.io.heif import coded_colours, heif_format, open_heic
from sora_engine.io.icc import to_srgb, transfer_of
from sora_engine.io.media_limits import media_limits
from sora_engine.io.wholeness import what_is_missing

# Twice 8K UHD. A PNG of some hundred kilobytes can declare far more than memory holds.
MAX_PIXELS = 2 * 7680 * 4320

EXIF_IMAGE_DESCRIPTION = 0x010E

_PRIMARIES = "h273_primaries"
"""Where an open image keeps what its file names outside of a profile."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")


def read_image(
    path: str | Path, *, height: int | None = None, width: int | None = None
) -> np.ndarray:
    """Reads the picture of a PNG, JPEG, WebP, GIF, AVIF or HEIC file: uint8 [height, width, 3].

    Of an animation, the first frame. Raises MediaError for a missing, corrupt or oversized file,
    for any other format, and for HEIC where pillow-heif is missing.
    """
    image = open_image(Path(path))
    if image is None:
        with open_file(Path(path)) as file:
            head = file.read(HEAD_BYTES)
        what, video = what_it_is(head), video_kind(head)
        if what is None and video is not None:
            what = f"it is {video}; read_video reads it"
        told = "" if what is None else f": {what}"
        raise MediaError(f"{path} is not a PNG, JPEG, WebP, GIF, AVIF or HEIC image{told}")
    with image:
        return decode(image, path, height=height, width=width)


def open_image(path: Path) -> Image.Image | None:
    """Opens an image file whose declared size is within MAX_PIXELS; None for any other format.

    The format is taken from the first bytes, never from the suffix.
    Raises MediaError for a missing or unreadable file, a bomb, or a header that is broken.
    """
    file = open_file(path)
    try:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        kind = image_format(head)
        if kind is None:
            file.close()
            return None
        # WebP's decoder takes the memory for its canvas on opening, so the header is read first.
        check_size(path, *(_declared_size(head) or (1, 1)))
        missing = what_is_missing(file)
        if missing is not None:
            raise MediaError(f"{path} cannot be read as an image: it is damaged: {missing}")
        primaries = _named_primaries(path, file, kind, head)
        file.seek(0)
        if kind == "HEIC":
            with file:
                image = open_heic(path, file, check_size)
                image.info[_PRIMARIES] = primaries
                return image
        if kind == "AVIF" and not features.check("avif"):
            raise MediaError(f"{path} is an AVIF picture, which this Pillow was built without")
        image = Image.open(file, formats=_FORMATS)
        check_size(path, *image.size)
        image.info[_PRIMARIES] = primaries
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
    return heif_format(head)


def _named_primaries(path: Path, file: BinaryIO, kind: str, head: bytes) -> int | None:
    """The primaries, in H.273's codes, that a file names outside of a profile.

    Raises MediaError for a picture that says it is HDR: as SDR its white would be grey.
    """
    colours: tuple[int, int] | None = None
    if kind in ("AVIF", "HEIC"):
        colours = coded_colours(file)
    elif kind == "PNG" and 0 <= (at := head.find(b"cICP", 33)) < len(head) - 8:
        colours = head[at + 4], head[at + 5]
    _refuse_hdr(path, None if colours is None else colours[1])
    return None if colours is None else colours[0]


def _refuse_hdr(path: str | Path, transfer: int | None) -> None:
    if transfer in hdr.TRANSFERS:
        raise MediaError(
            f"{path} is an HDR picture ({hdr.TRANSFERS[transfer]}), which is not read; save it as "
            "SDR, such as a JPEG"
        )


def check_size(path: str | Path, width: int, height: int) -> None:
    """Raises MediaError for a picture that is empty or holds more than MAX_PIXELS, or than this
    thread's `media_limits`."""
    if width < 1 or height < 1:
        raise MediaError(f"{path} is {width}x{height}: empty")
    most = media_limits().pixels or MAX_PIXELS
    if width * height > most:
        raise MediaError(
            f"{path} is {width}x{height}, {width * height} pixels; at most {most} are read"
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
    check_size(path, *image.size)
    try:
        profile = image.info.get("icc_profile")
        _refuse_hdr(path, transfer_of(profile) if profile else None)
        colours, alpha = _colours_and_alpha(ImageOps.exif_transpose(image), path)
        rgb = to_srgb(colours, profile, path) if profile else colours.convert("RGB")
        primaries = image.info.get(_PRIMARIES)
        if not profile and primaries is not None and hdr.needs_conversion(1, primaries):
            deep = np.asarray(rgb, dtype=np.uint16) * 257
            rgb = Image.fromarray(hdr.to_sdr(deep, 1, primaries))
        if alpha is not None:
            rgb.putalpha(alpha)
            rgb = on_white(rgb)
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{path} cannot be decoded: {_reason(error)}") from error
    return np.asarray(fit(rgb, height=height, width=width))


def _colours_and_alpha(
    image: Image.Image, path: str | Path
) -> tuple[Image.Image, Image.Image | None]:
    """A picture of any mode as one of L, RGB or CMYK, and how opaque it is (None: all of it)."""
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise MediaError(
                f"{path} holds values from {values.min()} to {values.max()}; greys of 8 or 16 bits "
                "would work"
            )
        clear = image.info.get("transparency")
        alpha = None
        if isinstance(clear, int):
            alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        return Image.fromarray((values >> 8).astype(np.uint8)), alpha
    if image.mode == "F":
        raise MediaError(
            f"{path} holds floating-point values, of which no range is white; 8 bits would work"
        )
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    mode = {"LA": "L", "1": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    image.info.pop("transparency", None)
    return image.convert(mode), alpha


def on_white(rgba: Image.Image) -> Image.Image:
    """A picture with transparency (mode RGBA) laid on white: mode RGB."""
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


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
    return " ".join(str(error).split()) or type(error).__name__
