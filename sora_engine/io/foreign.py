"""What a file is that cannot be read, by its first bytes, and what would work in its place."""

from __future__ import annotations

_PICTURE = "save it as PNG, JPEG, WebP, AVIF or GIF"
_SOUND = "it holds sound and no pictures; a video file would work"
_PLAYLIST = "give the clip itself; `ffmpeg -i LIST -c copy clip.mp4` fetches it"
_PAGE = "the download brought a page in place of the clip; fetch the clip itself"
_PACKED = "unpack it, and give a file or a folder from inside"
_DRAWING = "draw it as a PNG first"
_TENSORS = "it holds arrays; give them in memory, or as a video or a picture"
_OTHER_VIDEO = "`ffmpeg -i FILE clip.mp4` turns it into one that is read"

# (first bytes, where they lie, what the file is, what would work)
_KINDS = (
    (b"BM", 0, "a BMP picture", _PICTURE),
    (b"II*\0", 0, "a TIFF (or camera raw) picture", _PICTURE),
    (b"MM\0*", 0, "a TIFF (or camera raw) picture", _PICTURE),
    (b"II+\0", 0, "a BigTIFF picture", _PICTURE),
    (b"IIU\0", 0, "a camera's raw picture", _PICTURE),
    (b"II\xbc\x01", 0, "a JPEG XR picture", _PICTURE),
    (b"FUJIFILMCCD-RAW", 0, "a camera's raw picture", _PICTURE),
    (b"crx ", 8, "a camera's raw picture", _PICTURE),
    (b"\xff\x0a", 0, "a JPEG XL picture", _PICTURE),
    (b"\0\0\0\x0cJXL ", 0, "a JPEG XL picture", _PICTURE),
    (b"\0\0\0\x0cjP  ", 0, "a JPEG 2000 picture", _PICTURE),
    (b"\xff\x4f\xff\x51", 0, "a JPEG 2000 picture", _PICTURE),
    (b"8BPS", 0, "a Photoshop picture", _PICTURE),
    (b"gimp xcf", 0, "a GIMP picture", _PICTURE),
    (b"\0\0\x01\0", 0, "an icon", _PICTURE),
    (b"DDS ", 0, "a DDS texture", _PICTURE),
    (b"qoif", 0, "a QOI picture", _PICTURE),
    (b"v/1\x01", 0, "an OpenEXR picture", _PICTURE),
    (b"#?RADIANCE", 0, "a Radiance HDR picture", _PICTURE),
    (b"SDPX", 0, "a DPX picture", _PICTURE),
    (b"XPDS", 0, "a DPX picture", _PICTURE),
    (b"\x8aMNG", 0, "an MNG animation", _PICTURE),
    (b"%PDF", 0, "a PDF document", _DRAWING),
    (b"%!PS", 0, "a PostScript document", _DRAWING),
    (b"<svg", 0, "an SVG drawing", _DRAWING),
    (b"WAVE", 8, "a WAV recording", _SOUND),
    (b"AIFF", 8, "an AIFF recording", _SOUND),
    (b"ID3", 0, "an MP3 recording", _SOUND),
    (b"\xff\xfb", 0, "an MP3 recording", _SOUND),
    (b"fLaC", 0, "a FLAC recording", _SOUND),
    (b"MThd", 0, "a MIDI file", _SOUND),
    (b"#EXTM3U", 0, "a playlist (HLS)", _PLAYLIST),
    (b"ffconcat", 0, "a list of clips", _PLAYLIST),
    (b"[playlist]", 0, "a playlist", _PLAYLIST),
    (b"<MPD", 0, "a playlist (DASH)", _PLAYLIST),
    (b"<!doctype", 0, "a web page", _PAGE),
    (b"<html", 0, "a web page", _PAGE),
    (b"version https://git-lfs", 0, "a Git LFS pointer", "`git lfs pull` fetches the clip"),
    (b"PK\x03\x04", 0, "a ZIP archive", _PACKED),
    (b"\x1f\x8b", 0, "a gzip archive", _PACKED),
    (b"7z\xbc\xaf", 0, "a 7z archive", _PACKED),
    (b"Rar!", 0, "a RAR archive", _PACKED),
    (b"\xfd7zXZ", 0, "an xz archive", _PACKED),
    (b"\x28\xb5\x2f\xfd", 0, "a Zstandard archive", _PACKED),
    (b"BZh", 0, "a bzip2 archive", _PACKED),
    (b"ustar", 257, "a tar archive", _PACKED),
    (b"\x93NUMPY", 0, "a NumPy array", _TENSORS),
    (b"\x89HDF", 0, "an HDF5 file", _TENSORS),
    (b"GGUF", 0, "a GGUF model", _TENSORS),
    (b"\x80\x02", 0, "a Python pickle", _TENSORS),
    (b"\x7fELF", 0, "a program", "give a video or a picture"),
    (b"MZ", 0, "a program", "give a video or a picture"),
    (b"REDV", 4, "a RED camera's raw clip", _OTHER_VIDEO),
    (b"RED2", 4, "a RED camera's raw clip", _OTHER_VIDEO),
    (b"BIK", 0, "a Bink video", _OTHER_VIDEO),
    (b"SMK", 0, "a Smacker video", _OTHER_VIDEO),
    (b"CWS", 0, "a Flash film", _OTHER_VIDEO),
    (b'{"', 8, "a safetensors file", _TENSORS),
)
HEAD_BYTES = 512

_VIDEOS = (
    (b"ftyp", 4, "an MP4 or MOV video"),
    (b"moov", 4, "an MP4 or MOV video"),
    (b"\x1a\x45\xdf\xa3", 0, "a Matroska or WebM video"),
    (b"AVI ", 8, "an AVI video"),
)


def what_it_is(head: bytes) -> str | None:
    """ "it is a BMP picture; save it as ..." of a file's first bytes, or None for what is unknown.

    head: the first HEAD_BYTES of a file, or all of a shorter one.
    """
    if not head:
        return "it is empty (0 bytes); the download or the recording may have failed"
    if not head.strip(b"\0"):
        return "it begins with nothing but zeros; the download or the copy may have failed"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<?xml"):
        for name in (b"<svg", b"<MPD"):
            text = text[text.find(name) :] if name in text else text
    for mark, at, what, works in _KINDS:
        if at == 0 and mark[:1] in b"<[#" and text[: len(mark)].lower() == mark.lower():
            return f"it is {what}; {works}"
        if head[at : at + len(mark)] == mark:
            return f"it is {what}; {works}"
    if all(byte in b"\t\n\r\x0c\x1b" or byte >= 32 for byte in head) and _is_text(head):
        return "it is a text; give a video or a picture"
    return None


def video_kind(head: bytes) -> str | None:
    """What kind of video a file begins as, for who took it for a picture."""
    return next((what for mark, at, what in _VIDEOS if head[at : at + len(mark)] == mark), None)


def _is_text(head: bytes) -> bool:
    try:
        head[:-3].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 6  # cut within a letter
    return True
