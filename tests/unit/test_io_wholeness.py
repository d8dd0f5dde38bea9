"""Files that were cut: an error, or all of their frames, in every container."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io.video_reader import read_video

NUM_FRAMES = 12

# suffix: (codec, muxer, rate, width, height, pixel format)
CONTAINERS = {
    "mp4": ("libx264", "mp4", 8, 64, 64, "yuv420p"),
    "mov": ("mjpeg", "mov", 8, 64, 64, "yuvj420p"),
    "mkv": ("libx264", "matroska", 8, 64, 64, "yuv420p"),
    "webm": ("libvpx-vp9", "webm", 8, 64, 64, "yuv420p"),
    "avi": ("mpeg4", "avi", 8, 64, 64, "yuv420p"),
    "flv": ("flv", "flv", 8, 64, 64, "yuv420p"),
    "wmv": ("wmv2", "asf", 8, 64, 64, "yuv420p"),
    "mpg": ("mpeg2video", "mpeg", 25, 64, 64, "yuv420p"),
    "mxf": ("mpeg2video", "mxf", 25, 64, 64, "yuv420p"),
    "swf": ("flv", "swf", 8, 64, 64, "yuv420p"),
    "ivf": ("libvpx-vp9", "ivf", 8, 64, 64, "yuv420p"),
    "y4m": ("wrapped_avframe", "yuv4mpegpipe", 8, 62, 34, "yuv420p"),
    "dv": ("dvvideo", "dv", 25, 720, 576, "yuv420p"),
    "ogg": ("libvpx", "ogg", 8, 64, 64, "yuv420p"),
    "nut": ("ffv1", "nut", 8, 64, 64, "yuv420p"),
}


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 576, 720, 3), np.uint8)


def written(path: Path, noise: np.ndarray, **muxer: str) -> Path:
    codec, kind, rate, width, height, pixels = CONTAINERS[path.suffix[1:]]
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg cannot write {codec}")
    with av.open(str(path), "w", format=kind, options=muxer) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.time_base = Fraction(1, rate)
        if codec == "libx264":
            stream.options = {"g": "3", "bf": "0"}
        for frame in noise:
            here = np.ascontiguousarray(frame[:height, :width])
            output.mux(stream.encode(av.VideoFrame.from_ndarray(here, format="rgb24")))
        output.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_a_cut_file_is_never_a_shorter_clip(tmp_path: Path, noise: np.ndarray, suffix: str) -> None:
    path = written(tmp_path / f"whole.{suffix}", noise)
    assert len(read_video(path)[0]) == NUM_FRAMES
    data = path.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    # Never just the last bytes: of some containers those are an index that players do without.
    for share in np.linspace(0.15, 0.95, 17):
        cut.write_bytes(data[: int(len(data) * share) | 1])
        with pytest.raises(MediaError, match=r"cut\."):
            read_video(cut)


def test_a_recording_of_unknown_size_is_read_and_its_cut_is_not(
    tmp_path: Path, noise: np.ndarray
) -> None:
    path = written(tmp_path / "live.mkv", noise, live="1")
    data = path.read_bytes()
    assert b"\x18\x53\x80\x67\x01\xff\xff\xff\xff\xff\xff\xff" in data  # the segment's size
    assert len(read_video(path)[0]) == NUM_FRAMES
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match="middle of a Matroska element"):
        read_video(path)


def test_a_cut_in_a_fragmented_mp4(tmp_path: Path, noise: np.ndarray) -> None:
    path = written(tmp_path / "a.mp4", noise, movflags="frag_keyframe+empty_moov")
    assert len(read_video(path)[0]) == NUM_FRAMES
    data = path.read_bytes()
    for share in (0.4, 0.6, 0.8):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(MediaError, match="middle of a box"):
            read_video(path)


def test_an_mp4_whose_last_box_goes_to_the_end(tmp_path: Path, noise: np.ndarray) -> None:
    path = written(tmp_path / "a.mp4", noise, movflags="faststart")
    data = bytearray(path.read_bytes())
    at = data.index(b"mdat") - 4
    data[at : at + 4] = bytes(4)  # a size of 0: up to the end of the file
    path.write_bytes(data)
    assert len(read_video(path)[0]) == NUM_FRAMES
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(MediaError, match=r"tells of pictures at byte|a picture is not whole"):
        read_video(path)


def test_an_mp4_that_was_never_finished(tmp_path: Path, noise: np.ndarray) -> None:
    data = written(tmp_path / "a.mp4", noise).read_bytes()
    path = tmp_path / "b.mp4"
    path.write_bytes(data[: data.index(b"moov") - 4])
    with pytest.raises(MediaError, match="no index"):
        read_video(path)


@pytest.mark.parametrize("trailer", [bytes(range(200, 256)) * 20, b"seven b", b"SEFT" * 9, b"\0"])
def test_what_lies_behind_a_whole_mp4_does_not_count(
    tmp_path: Path, noise: np.ndarray, trailer: bytes
) -> None:
    for muxer in ({}, {"movflags": "faststart"}):
        path = written(tmp_path / "a.mp4", noise, **muxer)
        with path.open("ab") as file:
            file.write(trailer)
        assert len(read_video(path)[0]) == NUM_FRAMES


def test_what_lies_behind_a_whole_mkv_does_not_count(tmp_path: Path, noise: np.ndarray) -> None:
    path = written(tmp_path / "a.mkv", noise)
    with path.open("ab") as file:
        file.write(bytes(range(200, 256)) * 20)
    assert len(read_video(path)[0]) == NUM_FRAMES


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm", "avi", "flv", "wmv", "ivf", "y4m"])
def test_files_joined_byte_for_byte_are_not_read_as_the_first(
    tmp_path: Path, noise: np.ndarray, suffix: str
) -> None:
    path = written(tmp_path / f"a.{suffix}", noise)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(MediaError, match="joined byte for byte"):
        read_video(path)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_a_cut_animation(tmp_path: Path, noise: np.ndarray, kind: str) -> None:
    frames = [Image.fromarray(frame[:32, :32]) for frame in noise]
    path = tmp_path / "a"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], duration=100)
    assert len(read_video(path)[0]) == NUM_FRAMES
    data = path.read_bytes()
    for share in (0.2, 0.5, 0.8, 0.97):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(MediaError):
            read_video(path)


def test_a_gif_cut_between_two_frames(tmp_path: Path) -> None:
    shades = [Image.new("L", (8, 8), shade) for shade in (0, 100, 200)]
    path = tmp_path / "a.gif"
    shades[0].save(path, save_all=True, append_images=shades[1:], duration=100)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"\x21\xf9")])  # before the last frame's own header
    with pytest.raises(MediaError, match="before the mark that closes it"):
        read_video(path)


def test_a_size_that_was_never_filled_in(tmp_path: Path, noise: np.ndarray) -> None:
    data = bytearray(written(tmp_path / "a.avi", noise).read_bytes())
    data[4:8] = struct.pack("<I", 0)
    (tmp_path / "a.avi").write_bytes(data)
    with pytest.raises(MediaError, match="never finished"):
        read_video(tmp_path / "a.avi")
