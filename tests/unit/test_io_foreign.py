"""Files that are no video and no picture: what each is, and what would work."""

from __future__ import annotations

import gzip
import io
import json
import struct
import wave
import zipfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io.images import read_image
from sora_engine.io.video_reader import read_video
from sora_engine.io.video_writer import write_video

BOX = b"\0\0\0\x18ftyp"


def pillow(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, kind)
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((3, 4, 4, 3), np.uint8))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("clip.mp4", b"x")
    return file.getvalue()


def sound() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 8000, 8000, "NONE", ""))
        out.writeframes(bytes(16000))
    return file.getvalue()


def safetensors() -> bytes:
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0"


FOREIGN = {
    "empty.mp4": (b"", "it is empty"),
    "zeros.mp4": (bytes(4096), "nothing but zeros"),
    "a.bmp": (pillow("BMP"), "a BMP picture; save it as PNG"),
    "a.tiff": (pillow("TIFF"), "a TIFF .* picture; save it as PNG"),
    "a.ico": (pillow("ICO"), "an icon"),
    "a.dds": (pillow("DDS"), "a DDS texture"),
    "a.qoi": (pillow("QOI"), "a QOI picture"),
    "a.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture"),
    "a.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture"),
    "naked.jxl": (b"\xff\x0a" + bytes(20), "a JPEG XL picture"),
    "a.psd": (b"8BPS\0\1" + bytes(20), "a Photoshop picture"),
    "a.cr3": (BOX + b"crx \0\0\0\1crx isom", "a camera's raw picture"),
    "a.pdf": (pillow("PDF"), "a PDF document"),
    "a.svg": (b'<?xml version="1.0"?>\n<svg width="9"></svg>', "an SVG drawing; draw it"),
    "naked.svg": (b"<svg></svg>", "an SVG drawing"),
    "a.wav": (sound(), "a WAV recording; it holds sound and no pictures"),
    "a.flac": (b"fLaC" + bytes(40), "a FLAC recording"),
    "a.mp3": (b"ID3\4\0" + bytes(40), "an MP3 recording"),
    "a.m3u8": (b"#EXTM3U\n#EXTINF:9,\nclip.ts\n", "a playlist .*ffmpeg -i LIST -c copy"),
    "a.mpd": (b'<?xml version="1.0"?>\n<MPD></MPD>', "a playlist"),
    "list.txt": (b"ffconcat version 1.0\nfile 'a.mp4'\n", "a list of clips"),
    "page.mp4": (b"\n<!DOCTYPE html><html>404</html>", "a web page; the download brought"),
    "login.mp4": (b"<HTML><body>log in</body></HTML>", "a web page"),
    "lfs.mp4": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a.zip": (zipped(), "a ZIP archive; unpack it"),
    "a.mp4.gz": (gzip.compress(b"x" * 99), "a gzip archive"),
    "a.npy": (npy(), "a NumPy array; it holds arrays; give them in memory"),
    "a.safetensors": (safetensors(), "a safetensors file"),
    "a.gguf": (b"GGUF\3\0\0\0" + bytes(20), "a GGUF model"),
    "notes.mp4": (b"my holiday clip\n" * 9, "a text"),
    "notes utf8.mp4": (("une vidéo d'été\n" * 40).encode(), "a text"),
    "a.exe": (b"MZ\x90\0" + bytes(60), "a program"),
    "a.R3D": (b"\0\0\3\x20RED2" + bytes(60), "a RED camera's raw clip; `ffmpeg -i FILE"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_cannot_be_read_is_named_with_what_would_work(tmp_path: Path, name: str) -> None:
    data, words = FOREIGN[name]
    path = tmp_path / name
    path.write_bytes(data)
    for read, begins in ((read_video, "cannot be read as a video: it"), (read_image, "is not a")):
        with pytest.raises(MediaError, match=words) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path} {begins}")
        assert "\n" not in message
        assert len(message) < len(str(path)) + 220


def test_videos_and_pictures_in_each_other_s_place(tmp_path: Path) -> None:
    (tmp_path / "clip.png").write_bytes(BOX + b"isom\0\0\2\0isomiso2" + bytes(40))
    with pytest.raises(MediaError, match="it is an MP4 or MOV video; read_video reads it"):
        read_image(tmp_path / "clip.png")
    (tmp_path / "clip.jpg").write_bytes(b"\x1a\x45\xdf\xa3" + bytes(40))
    with pytest.raises(MediaError, match="it is a Matroska or WebM video; read_video reads it"):
        read_image(tmp_path / "clip.jpg")


def test_what_is_not_known_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(np.random.default_rng(3).bytes(4096))
    with pytest.raises(MediaError, match="it is none of the known containers"):
        read_video(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match=r"is not a PNG, JPEG, WebP, GIF, AVIF or HEIC image$"):
        read_image(tmp_path / "a.mp4")


def test_a_codec_that_is_not_known_is_told(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    data = path.read_bytes()
    assert data.count(b"avc1") == 2  # a brand of the file, and the track's own
    at = data.rindex(b"avc1")
    path.write_bytes(data[:at] + b"zzz9" + data[at + 4 :])
    with pytest.raises(MediaError, match="a codec that this FFmpeg does not know"):
        read_video(path)


def test_tags_in_another_alphabet_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        output.metadata["title"] = "MARK of a title"
        stream = output.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        output.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"MARK", b"caf\xe9"))
    assert read_video(path)[0].shape == (1, 32, 32, 3)


def test_an_error_is_one_line(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    path = tmp_path / "a.heic"
    heif.from_pillow(Image.new("RGB", (64, 64))).save(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"iloc") + 8
    data[at : at + 12] = b"\x44\x00" + b"\xff" * 10
    path.write_bytes(data)
    with pytest.raises(MediaError) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_numbered_pngs_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "frame_1.jpg").write_bytes(pillow("JPEG"))
    (tmp_path / "frame_2.jpg").write_bytes(pillow("JPEG"))
    with pytest.raises(MediaError, match=r"no numbered PNG .*frame_1\.jpg.*00000\.png"):
        read_video(tmp_path)
