"""Whether a file holds all that its container says: FFmpeg and Pillow read cut ones without a word.

Only the headers of boxes, chunks and pages are read. A raw stream (.h264, .hevc, .m2v) has none: of
such a file that was cut, only a last picture that is broken can be noticed, by its decoder.

Sources: ISO/IEC 14496-12 (MP4, MOV, HEIF), RFC 8794 and 9559 (Matroska), Microsoft's AVI and ASF
specifications, Adobe's FLV and SWF, ISO/IEC 13818-1 (TS, PS), RFC 3533 (Ogg), SMPTE ST 377-1 (MXF),
AV1's low-overhead format, IVF, YUV4MPEG2, NUT, IEC 61834 (DV), GIF89a, the specifications of WebP
and PNG.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Callable
from typing import BinaryIO

_MIDDLE = "it ends in the middle of a {}"
_JOINED = (
    "it is several {} files joined byte for byte, of which players show the first; ffmpeg's concat "
    "demuxer joins them"
)


def what_is_missing(file: BinaryIO) -> str | None:
    """How a file that was cut shows it, as "it ends in ...", or None; the place in it is kept.

    Says too when several files were joined byte for byte of which only the first would be read.
    """
    place = file.tell()
    try:
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(400)
        for begins, check in _CHECKS:
            if begins(head):
                return check(file, end)
        return None
    finally:
        file.seek(place)


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


# What may lie at the top of a file of boxes; anything else behind a whole movie is a trailer.
_BOXES = frozenset(
    b"ftyp styp moov moof mdat meta free skip wide uuid udta sidx ssix prft emsg mfra pdin pnot "
    b"PICT".split()
)
_FRAMES = (b"moov", b"moof", b"mdat", b"meta")


def _boxes(file: BinaryIO, end: int) -> str | None:
    at = 0
    seen: list[bytes] = []
    chunks = 0
    while at + 8 <= end:
        head = _read(file, at, 16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        pictures = b"moof" if b"moof" in seen else b"mdat"
        whole = (b"moov" in seen or b"meta" in seen) and pictures in seen
        if whole and kind not in _BOXES:
            break  # action cameras and phones put records of their own behind the movie
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size == 0:
            size = end - at
        if size < 8 or at + size > end:
            if whole and kind not in _FRAMES:
                break
            return _MIDDLE.format("box")
        if kind == b"moov":
            if seen.count(b"ftyp") > 1 and b"moov" in seen:
                return _JOINED.format("MP4")
            chunks = max(chunks, _last_chunk(_read(file, at + 8, size - 8)))
        seen.append(kind)
        at += size
    if 0 < end - at < 8 and b"moof" in seen:
        return _MIDDLE.format("box")
    if b"moov" not in seen and b"meta" not in seen:
        return "it has no index (moov box): the recording was cut or never finished"
    if chunks >= end:
        return f"it ends at byte {end}, and its index tells of pictures at byte {chunks}"
    return None


def _last_chunk(moov: bytes) -> int:
    """The last place at which a movie's samples begin, by its chunk offset boxes (8.7.5)."""
    last = 0
    for name, width in ((b"stco", 4), (b"co64", 8)):
        at = moov.find(name)
        while at >= 0:
            count = int.from_bytes(moov[at + 8 : at + 12], "big")
            table = moov[at + 12 : at + 12 + width * count]
            if len(table) == width * count and count:
                last = max(last, int.from_bytes(table[-width:], "big"))
            at = moov.find(name, at + 4)
    return last


_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675


def _matroska(file: BinaryIO, end: int) -> str | None:
    at = segments = whole = 0
    while at < end:
        element = _element(_read(file, at, 12))
        if element is None:
            return _MIDDLE.format("Matroska element") if at + 12 > end else None
        name, size, head = element
        if at and at == whole and name != _EBML:
            return None  # what lies behind is none of Matroska's
        if name == _SEGMENT:
            segments += 1
            whole = 0 if size is None else at + head + size
            if segments > 1:
                return _JOINED.format("Matroska")
        if size is None:  # a recording whose size was not known when it began
            if name not in (_SEGMENT, _CLUSTER):
                return None
            size = 0
        elif at + head + size > end:
            return _MIDDLE.format("Matroska element")
        at += head + size
    return None


def _element(data: bytes) -> tuple[int, int | None, int] | None:
    """An EBML element's id, the size of its content (None: unknown) and that of its head."""
    widths = [9 - data[0].bit_length()] if data else [9]
    if widths[0] > 4 or len(data) <= widths[0]:
        return None
    widths.append(9 - data[widths[0]].bit_length())
    head = sum(widths)
    if widths[1] > 8 or len(data) < head:
        return None
    size = int.from_bytes(data[widths[0] : head], "big") & ((1 << 7 * widths[1]) - 1)
    unknown = size == (1 << 7 * widths[1]) - 1
    return int.from_bytes(data[: widths[0]], "big"), None if unknown else size, head


def _avi(file: BinaryIO, end: int) -> str | None:
    at = 0
    while at + 12 <= end:
        head = _read(file, at, 12)
        if head[:4] != b"RIFF" or head[8:] not in (b"AVI ", b"AVIX"):
            break
        if at and head[8:] == b"AVI ":
            return _JOINED.format("AVI")
        size = int.from_bytes(head[4:8], "little")
        if size in (0, 0xFFFFFFFF):
            return "its size was never filled in: the recording was cut or never finished"
        if at + size > end:  # not its own head: some writers count that in
            return _MIDDLE.format("chunk")
        at += 8 + size + size % 2
    return None


def _webp(file: BinaryIO, end: int) -> str | None:
    return (
        _MIDDLE.format("chunk") if 8 + int.from_bytes(_read(file, 4, 4), "little") > end else None
    )


_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def _asf(file: BinaryIO, end: int) -> str | None:
    header = _read(file, 0, min(end, 1 << 20))
    at = header.find(_ASF_FILE)
    if at < 0 or int.from_bytes(header[at + 88 : at + 92], "little") & 1:  # broadcast: no size
        return None
    size = int.from_bytes(header[at + 40 : at + 48], "little")
    if _read(file, size, 16) == _ASF_HEADER:
        return _JOINED.format("WMV")
    return f"it ends at byte {end} of the {size} that its header tells of" if size > end else None


def _flv(file: BinaryIO, end: int) -> str | None:
    head = _read(file, 0, 4096)
    told = head.find(b"filesize\x00")
    if 0 <= told < len(head) - 17:
        size = struct.unpack(">d", head[told + 9 : told + 17])[0]
        if size > end:
            return f"it ends at byte {end} of the {size:.0f} that its header tells of"
    at = int.from_bytes(head[5:9], "big") + 4
    while at < end:
        head = _read(file, at, 4)
        if head == b"FLV\x01":
            return _JOINED.format("FLV")
        at += 11 + int.from_bytes(head[1:], "big") + 4
    return _MIDDLE.format("tag") if at > end else None


def _swf(file: BinaryIO, end: int) -> str | None:
    size = int.from_bytes(_read(file, 4, 4), "little")
    return f"it ends at byte {end} of the {size} that its header tells of" if size > end else None


def _ivf(file: BinaryIO, end: int) -> str | None:
    told = int.from_bytes(_read(file, 24, 4), "little")
    at, count, times = int.from_bytes(_read(file, 6, 2), "little"), 0, [0, 0]
    while at + 12 <= end:
        head = _read(file, at, 12)
        if head[:4] == b"DKIF":
            return _JOINED.format("IVF")
        at += 12 + int.from_bytes(head[:4], "little")
        times = [times[1], int.from_bytes(head[4:], "little")]
        count += 1
    if at != end:
        return _MIDDLE.format("frame")
    # Some writers put the number of frames there, some how long they last.
    if count and max(count, 2 * times[1] - times[0]) < told:
        return f"it holds {count} frames of the {told} that its header tells of"
    return None


def _obu(file: BinaryIO, end: int) -> str | None:
    at = 0
    while at < end:
        head = _read(file, at, 10)
        if not head[0] & 2 or head[0] & 0x81:
            return None  # not of the low-overhead format
        skip = 2 if head[0] & 4 else 1
        size = shift = 0
        for byte in head[skip:]:
            size |= (byte & 127) << shift
            shift += 7
            skip += 1
            if byte < 128:
                break
        at += skip + size
    return _MIDDLE.format("unit") if at > end else None


def _dv(file: BinaryIO, end: int) -> str | None:
    frame = 144000 if _read(file, 3, 1)[0] & 128 else 120000
    return _MIDDLE.format("frame") if end % frame else None


def _y4m(file: BinaryIO, end: int) -> str | None:
    line = _read(file, 0, 400).split(b"\n")[0]
    facts = {part[:1]: part[1:].decode("ascii", "replace") for part in line.split()[1:]}
    colour = facts.get(b"C", "420jpeg")
    share = {"420": 1.5, "411": 1.5, "422": 2.0, "444": 3.0, "mono": 1.0}
    planes = next((v for k, v in share.items() if colour.startswith(k)), None)
    if planes is None or not facts.get(b"W", "").isdigit() or not facts.get(b"H", "").isdigit():
        return None
    width, height = int(facts[b"W"]), int(facts[b"H"])
    if colour.startswith("420"):
        samples = width * height + 2 * math.ceil(width / 2) * math.ceil(height / 2)
    elif colour.startswith("422"):
        samples = width * height + 2 * math.ceil(width / 2) * height
    elif colour.startswith("411"):
        samples = width * height + 2 * math.ceil(width / 4) * height
    else:
        samples = int(width * height * (4 if "alpha" in colour else planes))
    deep = re.search(r"(?:p|mono)(9|1[0-6])$", colour)
    frame = samples * (2 if deep else 1)
    at = len(line) + 1
    while at < end:
        head = _read(file, at, 128)
        if head.startswith(b"YUV4MPEG2"):
            return _JOINED.format("Y4M")
        at += head.find(b"\n") + 1 + frame
        if not head.startswith(b"FRAME") or at > end:
            return _MIDDLE.format("frame")
    return None


def _ogg(file: BinaryIO, end: int) -> str | None:
    tail_at = max(0, end - (1 << 17))
    tail = _read(file, tail_at, end - tail_at)
    at = tail.rfind(b"OggS")
    if at < 0 or at + 27 > len(tail) or at + 27 + tail[at + 26] > len(tail):
        return _MIDDLE.format("page")
    size = 27 + tail[at + 26] + sum(tail[at + 27 : at + 27 + tail[at + 26]])
    if at + size > len(tail):
        return _MIDDLE.format("page")
    return None if tail[at + 5] & 4 else "it ends without the page that closes its streams"


def _ts(file: BinaryIO, end: int) -> str | None:
    head = _read(file, 0, 400)
    packet = next(size for size in (188, 192, 204) if _is_ts(head, size))
    rest = _read(file, end - end % packet, packet)
    sync = 4 if packet == 192 else 0
    return _MIDDLE.format("packet") if rest[sync : sync + 1] == b"\x47" else None


def _is_ts(head: bytes, packet: int) -> bool:
    first = 4 if packet == 192 else 0
    return head[first : first + 1] == b"\x47" and head[first + packet :][:1] == b"\x47"


def _ps(file: BinaryIO, end: int) -> str | None:
    tail_at = max(0, end - (1 << 18))
    tail = _read(file, tail_at, end - tail_at)
    # Walked from a pack on: what looks like a start code within a picture is passed over.
    at = tail.find(b"\x00\x00\x01\xba")
    while at >= 0 and at + 6 <= len(tail) and tail[at : at + 3] == b"\x00\x00\x01":
        code = tail[at + 3]
        if code == 0xB9:
            return None
        if code == 0xBA and tail[at + 4] & 64:  # MPEG-2's, with stuffing
            at += 14 + (tail[at + 13] & 7 if at + 13 < len(tail) else 0)
        elif code == 0xBA:
            at += 12
        elif code < 0xBB:
            return None
        else:
            at += 6 + int.from_bytes(tail[at + 4 : at + 6], "big")
    begun = 0 <= at < len(tail) < at + 6 and b"\x00\x00\x01".startswith(tail[at : at + 3])
    return _MIDDLE.format("packet") if begun or at > len(tail) else None


_NUT_INDEX = bytes.fromhex("4e58dd672f23e64e")


def _nut(file: BinaryIO, end: int) -> str | None:
    back = int.from_bytes(_read(file, max(0, end - 12), 8), "big")
    if back <= end and _read(file, end - back, 8) == _NUT_INDEX:
        return None
    return "it ends without the index that closes it: the recording was cut or never finished"


_MXF_PARTITION = bytes.fromhex("060e2b34020501010d01020101")


def _mxf(file: BinaryIO, end: int) -> str | None:
    head = _read(file, 0, 128)
    width = head[16] & 127 if head[16] & 128 else 0
    footer = int.from_bytes(head[17 + width + 24 : 17 + width + 32], "big")
    if footer == 0:
        return "its index was never written: the recording was cut or never finished"
    if footer + 16 > end or _read(file, footer, 13) != _MXF_PARTITION:
        return f"it ends at byte {end}, and its header tells of an index at byte {footer}"
    return None


def _gif(file: BinaryIO, end: int) -> str | None:
    head = _read(file, 0, 13)
    if len(head) < 13:
        return _MIDDLE.format("header")
    at = 13 + (3 << (head[10] & 7) + 1 if head[10] & 128 else 0)
    while at < end:
        kind = _read(file, at, 10)
        if kind[:1] == b";":
            return None
        if kind[:1] == b"!":
            at += 2
        elif kind[:1] == b"," and len(kind) == 10:
            at += 11 + (3 << (kind[9] & 7) + 1 if kind[9] & 128 else 0)
        elif kind[:1] == b"\0":
            at += 1
            continue
        else:
            break
        size = 1
        while size and at < end:
            size = (_read(file, at, 1) or b"\0")[0]
            at += 1 + size
    return "it ends before the mark that closes it"


def _apng(file: BinaryIO, end: int) -> str | None:
    at, animated = 8, False
    while at + 8 <= end:
        head = _read(file, at, 8)
        animated = animated or head[4:] == b"acTL"
        if head[4:] == b"IEND":
            return None
        at += 12 + int.from_bytes(head[:4], "big")
    # Of a still picture Pillow finds by itself whether its pixels are all there.
    return _MIDDLE.format("chunk") if animated else None


_CHECKS: tuple[tuple[Callable[[bytes], bool], Callable[[BinaryIO, int], str | None]], ...] = (
    (lambda head: head[4:8] in _BOXES, _boxes),
    (lambda head: head.startswith(b"\x1a\x45\xdf\xa3"), _matroska),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"AVI ", _avi),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", _webp),
    (lambda head: head.startswith(_ASF_HEADER), _asf),
    (lambda head: head.startswith(b"FLV\x01"), _flv),
    (lambda head: head.startswith(b"FWS"), _swf),
    (lambda head: head.startswith(b"DKIF"), _ivf),
    (lambda head: head.startswith(b"\x12\x00\x0a"), _obu),
    (lambda head: head.startswith(b"\x1f\x07\x00"), _dv),
    (lambda head: head.startswith(b"YUV4MPEG2"), _y4m),
    (lambda head: head.startswith(b"OggS"), _ogg),
    (lambda head: head.startswith(b"\x00\x00\x01\xba"), _ps),
    (lambda head: head.startswith(_MXF_PARTITION), _mxf),
    (lambda head: head.startswith(b"nut/multimedia container\0"), _nut),
    (lambda head: head.startswith((b"GIF87a", b"GIF89a")), _gif),
    (lambda head: head.startswith(b"\x89PNG"), _apng),
    (lambda head: any(_is_ts(head, size) for size in (188, 192, 204)), _ts),
)
