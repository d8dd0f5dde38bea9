"""What a file is that turned out not to be what was asked for: words for an error."""

from __future__ import annotations

from pathlib import Path

_MAGIC = (
    (b"PK\x03\x04", "a zip archive, such as PyTorch's pickles are"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer: `git lfs pull` fetches what it stands for"),
    (b"version https://git-annex", "a git-annex pointer"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF"),
    (b"RIFF", "a WebP picture or an AVI video"),
    (b"BM", "a BMP picture"),
    (b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (b"%PDF", "a PDF"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<?xml", "an XML page"),
)
JSON = "JSON text"
SAFETENSORS = "a safetensors file"
_PAGES = (b"<!doctype html", b"<html")
_HEADER = 8  # of a safetensors file, before its JSON


def kind_of(path: Path) -> str | None:
    """What is at a path, as "a GGUF file"; None where nothing is there or nothing is known of it.

    By the first bytes alone; the name says nothing.
    """
    try:
        if path.is_dir():
            return "a folder"
        if path.exists() and not path.is_file():  # opening a pipe would wait for who writes into it
            return "a device, a pipe or a socket"
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return None
    if not start:
        return "empty: a download or a copy that failed leaves such a file"
    if start[_HEADER : _HEADER + 2] in (b'{"', b"{}"):
        return SAFETENSORS
    for magic, what in _MAGIC:
        if start.startswith(magic):
            return what
    if start[4:8] == b"ftyp":
        return "an MP4 or QuickTime file"
    if start.lstrip().lower().startswith(_PAGES):
        return "a web page, such as a server sends in place of a file that it does not give out"
    if start.lstrip().startswith((b"{", b"[")):
        return JSON
    return None
