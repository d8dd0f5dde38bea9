"""Pictures in boxes: HEIC and AVIF, in tiles, turned, with other pictures beside the main one."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from sora_engine.errors import MediaError
from sora_engine.io.images import read_image
from sora_engine.io.video_reader import measure_video, open_video, read_video

COLOURS = ((220, 40, 30), (30, 200, 60), (40, 60, 220), (230, 220, 40))
KINDS = ["AVIF", "HEIC"]


def box(kind: bytes, *parts: bytes, full: int | None = None) -> bytes:
    body = (b"" if full is None else struct.pack(">I", full)) + b"".join(parts)
    return struct.pack(">I4s", len(body) + 8, kind) + body


def inside(data: bytes, *path: bytes) -> bytes:
    start, end = 0, len(data)
    for kind in path:
        at = start
        while at < end:
            size, name = struct.unpack(">I4s", data[at : at + 8])
            if name == kind:
                start, end = at + 8 + (4 if kind == b"meta" else 0), at + size
                break
            at += size
    return data[start:end]


def encoded(kind: str, picture: Image.Image, **options: object) -> bytes:
    """One picture as Pillow's AVIF or as pillow-heif's HEIC."""
    file = io.BytesIO()
    if kind == "AVIF":
        if not features.check("avif"):
            pytest.skip("this Pillow was built without AVIF")
        picture.save(file, "AVIF", quality=95, subsampling="4:2:0", **options)
    else:
        heif = pytest.importorskip("pillow_heif")
        heif.from_pillow(picture).save(file, quality=95, **options)
    return file.getvalue()


def tiled(kind: str, *, turned: bytes = b"", colour: bytes = b"") -> bytes:
    """A 2x2 grid of four colours, 200 x 180 pixels of its 256 x 256; with further properties."""
    code, brand, settings = (b"av01", b"avif", b"av1C") if kind == "AVIF" else (
        b"hvc1", b"heic", b"hvcC"
    )  # fmt: skip
    tiles, setting = [], b""
    for rgb in COLOURS:
        data = encoded(kind, Image.new("RGB", (128, 128), rgb))
        setting = inside(data, b"meta", b"iprp", b"ipco", settings)
        tiles.append(inside(data, b"mdat"))
    grid = struct.pack(">BBBBHH", 0, 0, 1, 1, 200, 180)
    more = [part for part in (turned, colour) if part]

    def meta(base: int) -> bytes:
        infe = [
            box(b"infe", struct.pack(">HH4s", i, 0, code), b"\0", full=0x02000001)
            for i in (1, 2, 3, 4)
        ]
        infe.append(box(b"infe", struct.pack(">HH4s", 5, 0, b"grid"), b"\0", full=0x02000000))
        ipco = box(
            b"ipco",
            box(b"ispe", struct.pack(">II", 128, 128), full=0),
            box(settings, setting),
            box(b"ispe", struct.pack(">II", 200, 180), full=0),
            box(b"pixi", b"\x03\x08\x08\x08", full=0),
            *more,
        )
        essential = 0x80 if turned else 0
        of_grid = bytes([3, 4, *(essential | i for i in range(5, 5 + len(more)))])
        ipma = struct.pack(">I", 5)
        ipma += b"".join(struct.pack(">HB3B", i, 3, 1, 0x82, 4) for i in (1, 2, 3, 4))
        ipma += struct.pack(">HB", 5, len(of_grid)) + of_grid
        iloc, at = struct.pack(">BBH", 0x44, 0, 5), base
        for i, tile in enumerate(tiles):
            iloc += struct.pack(">HHHHII", i + 1, 0, 0, 1, at, len(tile))
            at += len(tile)
        iloc += struct.pack(">HHHHII", 5, 1, 0, 1, 0, len(grid))
        return box(
            b"meta",
            box(b"hdlr", struct.pack(">I4s12s", 0, b"pict", b""), b"\0", full=0),
            box(b"pitm", struct.pack(">H", 5), full=0),
            box(b"iloc", iloc, full=0x01000000),
            box(b"iinf", struct.pack(">H", 5), *infe, full=0),
            box(b"iref", box(b"dimg", struct.pack(">HH4H", 5, 4, 1, 2, 3, 4)), full=0),
            box(b"iprp", ipco, box(b"ipma", ipma, full=0)),
            box(b"idat", grid),
            full=0,
        )

    head = box(b"ftyp", brand, struct.pack(">I", 0), brand + b"mif1miaf")
    base = len(head) + len(meta(0)) + 8
    return head + meta(base) + box(b"mdat", *tiles)


def four_colours() -> np.ndarray:
    truth = np.zeros((180, 200, 3), np.uint8)
    truth[:128, :128], truth[:128, 128:], truth[128:, :128], truth[128:, 128:] = COLOURS
    return truth


def far_from_edges(difference: np.ndarray) -> np.ndarray:
    rows = np.abs(np.arange(difference.shape[0]) - 128) > 4
    columns = np.abs(np.arange(difference.shape[1]) - 128) > 4
    return difference[rows][:, columns]


@pytest.mark.parametrize("kind", KINDS)
def test_all_tiles_of_a_picture_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(tiled(kind))
    truth = four_colours()
    frames, _ = read_video(path)
    assert frames.shape == (1, *truth.shape)
    assert far_from_edges(np.abs(frames[0].astype(int) - truth)).max() < 12
    np.testing.assert_array_equal(read_image(path), frames[0])
    assert measure_video(path, fps=8) == (1, 180, 200)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiled_picture_that_is_turned(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(tiled(kind, turned=box(b"irot", b"\x01")))  # a quarter counter-clockwise
    truth = np.rot90(four_colours())
    came = read_image(path)
    assert came.shape == truth.shape
    assert np.abs(came[10:60, 10:60].astype(int) - truth[10:60, 10:60]).max() < 12
    assert np.abs(came[-40:, -40:].astype(int) - truth[-40:, -40:]).max() < 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_an_hdr_picture_is_refused(tmp_path: Path, kind: str, transfer: int, name: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(
        tiled(kind, colour=box(b"colr", b"nclx", struct.pack(">HHHB", 9, transfer, 9, 128)))
    )
    with pytest.raises(MediaError, match=rf"HDR picture \({name}\)"):
        read_image(path)
    plain = box(b"colr", b"nclx", struct.pack(">HHHB", 1, 13, 6, 128))
    path.write_bytes(tiled(kind, colour=plain))
    assert read_image(path).shape == (180, 200, 3)
    wide = box(b"colr", b"nclx", struct.pack(">HHHB", 12, 13, 6, 128))  # Display P3
    stored = read_image(path)[40, 40].astype(int)
    path.write_bytes(tiled(kind, colour=wide))
    shown = read_image(path)[40, 40].astype(int)
    assert shown[0] > stored[0]  # P3's red lies outside: more red, less green
    assert shown[1] < stored[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_with_transparency_lies_on_white(tmp_path: Path, kind: str) -> None:
    rgba = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    rgba.paste((255, 0, 0, 255), (16, 16, 48, 48))
    path = tmp_path / "a"
    path.write_bytes(encoded(kind, rgba))
    came = read_image(path)
    assert came[2, 2].min() > 250
    assert np.abs(came[32, 32].astype(int) - (255, 0, 0)).max() < 8


def test_a_cut_or_oversized_picture_is_refused(tmp_path: Path) -> None:
    data = tiled("AVIF")
    path = tmp_path / "a"
    path.write_bytes(data[: len(data) - 40])
    with pytest.raises(MediaError, match="middle of a box"):
        read_image(path)
    path.write_bytes(data.replace(struct.pack(">HH", 200, 180), struct.pack(">HH", 60000, 60000)))
    with pytest.raises(MediaError, match=r"a (cannot be|is)"):
        read_image(path)


def test_heic_without_its_reader_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photo.heic"
    path.write_bytes(box(b"ftyp", b"heic", bytes(4), b"mif1heic") + box(b"meta") + box(b"mdat"))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for read in (read_image, read_video):
        with pytest.raises(MediaError, match=r'photo\.heic .*pip install "sora_engine\[heif\]"'):
            read(path)


def test_an_avif_animation_is_read_frame_by_frame(tmp_path: Path) -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    shades = [Image.new("RGB", (32, 32), (g, g, g)) for g in (0, 100, 200)]
    path = tmp_path / "a.avif"
    shades[0].save(path, save_all=True, append_images=shades[1:], duration=[100, 300, 200])
    frames, _ = read_video(path, fps=10)
    assert np.abs(frames[:, 16, 16, 0].astype(int) - (0, 100, 100, 100, 200, 200)).max() < 6


@pytest.mark.parametrize("second", [(64, 48), (256, 192)])
def test_a_phone_s_jpeg_is_one_picture(tmp_path: Path, second: tuple[int, int]) -> None:
    photo = Image.new("RGB", (256, 192), (30, 120, 200))
    path = tmp_path / "photo.jpg"
    map_ = Image.new("RGB", second, "white")
    photo.save(path, "MPO", save_all=True, append_images=[map_, map_], quality=95)
    for fps in (None, 24.0):
        frames, _ = read_video(path, fps=fps)
        assert frames.shape == (1, 192, 256, 3)
        assert np.abs(frames.astype(int) - (30, 120, 200)).max() < 4
    with Image.open(path) as image:
        assert image.n_frames == 3  # what the file holds; it is no animation


def test_pictures_are_no_videos_to_the_container_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(MediaError, match="it is a BMP picture"):
        open_video(path)
