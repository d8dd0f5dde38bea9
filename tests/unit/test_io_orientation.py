"""Clips that are stored turned or mirrored, held against the matrix itself."""

from __future__ import annotations

import struct
from pathlib import Path

import av
import numpy as np
import pytest

from sora_engine.io.orientation import orient
from sora_engine.io.video_reader import read_video

# a, b, c, d of each: a pixel (x right, y down) goes to (ax + cy, bx + dy).
MATRICES = {
    "as it is": (1, 0, 0, 1),
    "mirrored left to right": (-1, 0, 0, 1),
    "mirrored top to bottom": (1, 0, 0, -1),
    "half a turn": (-1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
    "a quarter clockwise": (0, 1, -1, 0),
    "a quarter the other way": (0, -1, 1, 0),
    "transposed over the other corner": (0, -1, -1, 0),
}


def moved(picture: np.ndarray, matrix: tuple[float, float, float, float]) -> np.ndarray:
    """Each pixel carried to where the matrix has it, one by one."""
    a, b, c, d = matrix
    height, width = picture.shape[:2]
    places = {(a * x + c * y, b * x + d * y): (y, x) for y in range(height) for x in range(width)}
    columns, rows = (sorted({place[i] for place in places}) for i in (0, 1))
    return np.array([[picture[places[x, y]] for x in columns] for y in rows])


def packed(matrix: tuple[float, float, float, float], order: str) -> bytes:
    a, b, c, d = (int(value * 65536) for value in matrix)
    return struct.pack(f"{order}9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
def test_every_pixel_goes_where_its_matrix_says(matrix: tuple[float, float, float, float]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    truth = moved(picture, matrix)
    np.testing.assert_array_equal(orient(picture, packed(matrix, "=")), truth)
    twice = tuple(2 * value for value in matrix)  # scale does not count
    np.testing.assert_array_equal(orient(picture, packed(twice, "=")), truth)


def test_a_slight_slant_is_a_quarter_turn_and_a_real_one_is_drawn() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    slant = packed((0.0087, 1.0, -1.0, 0.0087), "=")  # half a degree
    np.testing.assert_array_equal(orient(picture, slant), np.rot90(picture, -1))
    white = np.full((40, 40, 3), 255, np.uint8)
    diamond = orient(white, packed((0.7071, 0.7071, -0.7071, 0.7071), "="))
    assert diamond.shape[0] in range(56, 60)  # 40 times the root of 2
    assert diamond[0, 0].max() == 0
    assert diamond[28, 28].min() == 255
    np.testing.assert_array_equal(orient(picture, packed((0, 0, 0, 0), "=")), picture)


def copied(path: Path, to: Path) -> Path:
    """The same packets in another container, where FFmpeg keeps the matrix as a projection."""
    with av.open(str(path)) as container, av.open(str(to), "w") as output:
        stream = container.streams.video[0]
        copy = output.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                output.mux(packet)
    return to


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_track_s_matrix_counts(
    tmp_path: Path, suffix: str, matrix: tuple[float, float, float, float]
) -> None:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :24], picture[:16, 24:], picture[16:, :24] = (220, 30, 30), (30, 200, 30), 255
    path = tmp_path / ("a.mov" if suffix == "mov" else "a.mp4")
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv444p"
        stream.options = {"crf": "1"}
        for _ in range(2):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = packed(matrix, ">")
    path.write_bytes(data)
    if suffix == "mkv":
        path = copied(path, tmp_path / "a.mkv")
    came = read_video(path)[0]
    truth = moved(picture, matrix)
    assert came.shape == (2, *truth.shape)
    assert np.abs(came[1].astype(int) - truth).max() < 16


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
def test_a_stream_that_tells_it_once_has_it_for_all(
    tmp_path: Path, matrix: tuple[float, float, float, float]
) -> None:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :24], picture[:16, 24:], picture[16:, :24] = (220, 30, 30), (30, 200, 30), 255
    # H.264's display orientation SEI (ITU-T H.264, D.1.27): mirrored first, then turned by 65536ths
    # counter-clockwise.
    a, b, c, d = matrix
    mirror = a * d - b * c < 0
    if mirror:
        a, b = -a, -b
    turn = {(1, 0): 0, (0, 1): 49152, (-1, 0): 32768, (0, -1): 16384}[a, b]
    bits = f"0{int(mirror)}0{turn:016b}010" + "0"  # repetition: ue(1), for all that follow
    bits += "1" + "0" * (-(len(bits) + 1) % 8)
    payload = int(bits, 2).to_bytes(len(bits) // 8, "big")
    body = b"\x06" + bytes([47, len(payload)]) + payload + b"\x80"
    for code in (b"\0\0\0", b"\0\0\1", b"\0\0\2"):
        body = body.replace(code, code[:2] + b"\x03" + code[2:])
    path = tmp_path / "a.ts"
    with av.open(str(path), "w", format="mpegts") as output:
        stream = output.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv444p"
        stream.options = {"crf": "1", "bf": "0"}
        packets = []
        for _ in range(4):
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        packets += stream.encode()
        for index, packet in enumerate(packets):
            if index == 0:
                whole = bytes(packet)
                at = whole.index(b"\0\0\1\x65")  # before the picture
                told = av.Packet(whole[:at] + b"\0\0\1" + body + whole[at:])
                told.pts, told.dts, told.time_base = packet.pts, packet.dts, packet.time_base
                told.stream, told.is_keyframe = stream, True
                packet = told
            output.mux(packet)
    came = read_video(path)[0]
    truth = moved(picture, matrix)
    assert came.shape == (4, *truth.shape)
    assert np.abs(came[[0, 3]].astype(int) - truth).max() < 16
