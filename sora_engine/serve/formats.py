"""Which files are taken as uploads, by their bytes: six formats, and one format a file."""

from __future__ import annotations

import os
from typing import BinaryIO

from sora_engine.errors import MediaError

TAKEN = "PNG, JPEG, WebP, GIF, MP4 and WebM"

_HEAD, _TAIL = 4096, 66_000
_FOREIGN_HEADS = (b"%PDF-", b"<html", b"<script", b"<svg", b"<?xml", b"<!doctype", b"#EXTM3U")
_ZIP_END = b"PK\x05\x06"
_BRANDS = ("isom", "iso2", "iso3", "iso4", "iso5", "iso6", "iso7", "iso8", "iso9", "mp41", "mp42")
_MORE_BRANDS = ("avc1", "av01", "hvc1", "M4V ", "M4VP", "MSNV", "dash", "f4v ", "mmp4", "3gp5")


def kind_of_upload(file: BinaryIO) -> str:
    """The media type that a file's first bytes announce; MediaError for any other.

    A file that is also something else (an archive at its end, a page near its start) is refused:
    other programs would take it for that.
    """
    file.seek(0)
    head = file.read(_HEAD)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    tail = file.read()
    if not head:
        raise MediaError("the upload is empty")
    kind = _announced(head)
    if kind is None:
        raise MediaError(f"the upload is none of {TAKEN}")
    start = head.lower()
    if _ZIP_END in tail or any(mark.lower() in start for mark in _FOREIGN_HEADS):
        raise MediaError(f"the upload is a {kind} file and something else too; it is not taken")
    if kind == "image/webp" and int.from_bytes(head[4:8], "little") + 8 not in (size, size - 1):
        raise MediaError("the upload is damaged: its length is not what it says")
    return kind


def _announced(head: bytes) -> str | None:
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head[4:8] == b"ftyp" and head[8:12].decode("latin-1") in (*_BRANDS, *_MORE_BRANDS):
        return "video/mp4"
    if head.startswith(b"\x1a\x45\xdf\xa3") and b"webm" in head[:64]:
        return "video/webm"
    return None
