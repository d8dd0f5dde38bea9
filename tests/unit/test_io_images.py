"""Still images: what is read, what is refused before it is decoded."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io.images import MAX_PIXELS, read_image


def png_that_claims(width: int, height: int) -> bytes:
    """A well-formed PNG header of any size, with next to no data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "JPEG"])
def test_reads_each_format_whatever_its_suffix(tmp_path: Path, kind: str) -> None:
    picture = np.zeros((24, 32, 3), np.uint8)
    picture[:, 16:] = (255, 0, 0)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0}
    Image.fromarray(picture).save(
        tmp_path / "image.bin", kind, **(options if kind in ("WEBP", "JPEG") else {})
    )
    got = read_image(tmp_path / "image.bin")
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - picture).max() <= (8 if kind == "JPEG" else 0)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (0, 0, 255, 255)
    rgba[3] = (0, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    got = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(got[0, 0], (0, 0, 255))
    np.testing.assert_array_equal(got[2, 0], (255, 255, 255))
    np.testing.assert_array_equal(got[3, 0], (127, 127, 127))


def test_sixteen_bit_greys_keep_their_upper_bits(tmp_path: Path) -> None:
    grey = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[0, :, 0], [0, 1, 128, 255])


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = np.zeros((10, 20, 3), np.uint8)
    picture[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to show
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    got = read_image(tmp_path / "a.png")
    assert got.shape == (20, 10, 3)
    assert got[:10].min() == 255
    assert got[10:].max() == 0


def test_fit(tmp_path: Path) -> None:
    picture = np.zeros((30, 90, 3), np.uint8)
    picture[:, 30:60] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    middle = read_image(tmp_path / "a.png", height=60, width=60)
    assert middle.shape == (60, 60, 3)
    assert middle[:, 6:-6].min() > 245
    assert read_image(tmp_path / "a.png", width=45).shape == (15, 45, 3)


@pytest.mark.parametrize("kind", ["png", "gif", "webp"])
def test_bombs_are_refused_from_their_headers(tmp_path: Path, kind: str) -> None:
    side = 16000
    assert side * side > MAX_PIXELS
    vp8x = b"VP8X" + struct.pack("<I", 10) + bytes(4) + 2 * (side - 1).to_bytes(3, "little")
    data = {
        "png": png_that_claims(side, side),
        "gif": b"GIF89a" + struct.pack("<HHBBB", side, side, 0, 0, 0) + b";",
        "webp": b"RIFF" + struct.pack("<I", 22) + b"WEBP" + vp8x,
    }[kind]
    (tmp_path / "bomb").write_bytes(data)
    tracemalloc.start()
    with pytest.raises(MediaError, match="16000x16000"):
        read_image(tmp_path / "bomb")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5 << 20


def test_a_resize_to_a_bomb_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match="pixels"):
        read_image(tmp_path / "a.png", height=20000)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a PNG"),
        (b"BM" + bytes(60), "not a PNG"),  # formats beyond the four are not opened
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a PNG"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "cannot be read"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "cannot be"),
        (b"GIF89a\x04\0\x04\0\0\0\0", "cannot be"),
    ],
)
def test_broken_images_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(MediaError, match=words):
        read_image(tmp_path / "a.png")


def test_truncated_pixels_are_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match="cannot be decoded"):
        read_image(tmp_path / "a.png")


def test_folders_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(MediaError, match=r"nothing\.png does not exist"):
        read_image(tmp_path / "nothing.png")
