"""HEIC and AVIF pictures: which of the two a file is, what colours it has, and HEIC by pillow-heif.

Source: ISO/IEC 23008-12 (HEIF) and 14496-12 (boxes).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from sora_engine.errors import MediaError

INSTALL = 'pip install "sora_engine[heif]"'

_AVIF = (b"avif", b"avis")
_HEIC = (b"heic", b"heix", b"heim", b"heis")
_ANY = (b"mif1", b"mif2", b"miaf", b"msf1")


def heif_format(head: bytes) -> str | None:
    """AVIF or HEIC, by the brands in a file's first bytes; None for what is neither."""
    if head[4:8] != b"ftyp":
        return None
    end = min(len(head), int.from_bytes(head[:4], "big"))
    major, others = head[8:12], [head[at : at + 4] for at in range(16, end - 3, 4)]
    if major in _AVIF or (major in _ANY and any(brand in _AVIF for brand in others)):
        return "AVIF"
    if major in _HEIC or (major in _ANY and any(brand in _HEIC for brand in others)):
        return "HEIC"
    return None


def open_heic(path: str | Path, file: BinaryIO, check: Any) -> Image.Image:
    """The picture that a HEIC file shows, put together from its tiles, turned upright.

    check: called with the path, the width and the height before anything is decoded.
    Raises MediaError where pillow-heif is missing.
    """
    try:
        import pillow_heif
    except ImportError:
        raise MediaError(
            f"{path} is a HEIC picture, which takes pillow-heif: {INSTALL}, or save it as JPEG"
        ) from None
    opened = pillow_heif.open_heif(file)
    check(path, *opened.size)
    return opened.to_pillow()


def coded_colours(file: BinaryIO) -> tuple[int, int] | None:
    """(primaries, transfer) of a file's main picture, in H.273's codes; None where it names none.

    Of the main picture alone: phones put an HDR rendition beside it.
    """
    file.seek(0)
    meta = b""
    while len(head := file.read(8)) == 8:
        size = int.from_bytes(head[:4], "big")
        if head[4:] == b"meta":
            meta = file.read(max(0, size - 8))
            break
        if size < 8:
            return None
        file.seek(size - 8, 1)
    boxes = dict(_boxes(meta[4:]))
    main = int.from_bytes(boxes.get(b"pitm", b"")[4:], "big")
    properties = dict(_boxes(boxes.get(b"iprp", b"")))
    known = list(_boxes(properties.get(b"ipco", b"")))
    for index in _associated(properties.get(b"ipma", b""), main):
        kind, body = known[index - 1] if 0 < index <= len(known) else (b"", b"")
        if kind == b"colr" and body[:4] == b"nclx":
            return int.from_bytes(body[4:6], "big"), int.from_bytes(body[6:8], "big")
    return None


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size < 8:
            return
        yield data[at + 4 : at + 8], data[at + 8 : at + size]
        at += size


def _associated(ipma: bytes, item: int) -> list[int]:
    """The numbers, from 1, of an item's properties (23008-12, 9.3.1)."""
    if len(ipma) < 8:
        return []
    id_bytes = 4 if ipma[0] else 2
    index_bytes = 2 if ipma[3] & 1 else 1
    at = 8
    for _ in range(int.from_bytes(ipma[4:8], "big")):
        name = int.from_bytes(ipma[at : at + id_bytes], "big")
        at += id_bytes
        if at >= len(ipma):
            break
        count = ipma[at]
        places = range(at + 1, at + 1 + count * index_bytes, index_bytes)
        at = places.stop
        if name == item:
            essential = 1 << (8 * index_bytes - 1)
            found = (int.from_bytes(ipma[p : p + index_bytes], "big") for p in places)
            return [index & ~essential for index in found]
    return []
