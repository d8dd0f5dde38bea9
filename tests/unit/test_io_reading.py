"""Clips of many makers, read: their pixels, times, shapes and faults."""

from __future__ import annotations

import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io import video_reader
from sora_engine.io.media_limits import MediaLimits, reading_within
from sora_engine.io.video_reader import read_video
from sora_engine.io.video_writer import write_video
from tests.unit.test_io_writing import psnr, smooth_clip


@pytest.mark.parametrize(
    ("codec", "container", "pixel_format"),
    [
        ("mpeg4", "avi", "yuv420p"),
        ("ffv1", "matroska", "bgr0"),
        ("libvpx-vp9", "webm", "yuv420p"),
        ("libx265", "mp4", "yuv420p10le"),
        ("mjpeg", "mov", "yuvj444p"),
    ],
)
def test_reads_other_codecs(tmp_path: Path, codec: str, container: str, pixel_format: str) -> None:
    clip = smooth_clip(10, 64, 96)
    path = tmp_path / "clip"
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pixel_format
        stream.bit_rate = 4_000_000
        for frame in clip:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    frames, fps = read_video(path)
    assert frames.shape == clip.shape
    assert fps == pytest.approx(25, rel=0.02)
    assert psnr(frames, clip) > 28


def test_resampling_shows_the_frame_that_is_on_screen(tmp_path: Path) -> None:
    clip = np.stack([np.full((16, 16, 3), 20 * i, np.uint8) for i in range(12)])
    path = write_video(tmp_path / "a.mp4", clip, 12)
    for fps in (12, 6, 4, 5, 24, 30, 7.5):
        frames, rate = read_video(path, fps=fps)
        assert rate == fps
        num_frames = int(np.ceil(fps - 1e-6))  # the clip lasts one second
        shown = [int(i / fps * 12 + 1e-6) for i in range(num_frames)]
        assert [round(f.mean() / 20) for f in frames] == shown


def test_variable_durations_of_a_gif_count(tmp_path: Path) -> None:
    shades = [Image.new("RGB", (8, 8), (g, g, g)) for g in (0, 100, 200)]
    shades[0].save(
        tmp_path / "a.gif", save_all=True, append_images=shades[1:], duration=[100, 300, 200]
    )
    frames, fps = read_video(tmp_path / "a.gif")
    assert (len(frames), fps) == (3, pytest.approx(5))
    frames, _ = read_video(tmp_path / "a.gif", fps=10)
    assert [int(f[0, 0, 0]) for f in frames] == [0, 100, 100, 100, 200, 200]


def test_fit_covers_and_keeps_the_middle(tmp_path: Path) -> None:
    clip = np.zeros((2, 64, 128, 3), np.uint8)
    clip[:, :, 32:96] = (0, 200, 0)  # the middle square
    path = write_video(tmp_path / "a.mp4", clip, 8)
    frames, _ = read_video(path, height=32, width=32)
    assert frames.shape == (2, 32, 32, 3)
    assert frames[:, 4:-4, 4:-4, 1].min() > 190
    assert read_video(path, height=32)[0].shape == (2, 32, 64, 3)
    assert read_video(path, width=32)[0].shape == (2, 16, 32, 3)
    assert read_video(path, max_frames=1)[0].shape == (1, 64, 128, 3)
    with pytest.raises(MediaError, match="height 0"):
        read_video(path, height=0)


def test_phones_rotation_is_applied(tmp_path: Path) -> None:
    clip = np.zeros((2, 32, 64, 3), np.uint8)
    clip[:, :16, :16] = 255  # a white corner, top left
    path = write_video(tmp_path / "a.mp4", clip, 8)
    data = bytearray(path.read_bytes())
    # The track header's matrix (ISO/IEC 14496-12, 8.3.2) turned by a quarter, clockwise.
    at = data.index(b"tkhd") + 4 + 40
    one, minus = 0x00010000, 0xFFFF0000
    turned = [0, one, 0, minus, 0, 0, 32 << 16, 0, 0x40000000]
    data[at : at + 36] = b"".join(value.to_bytes(4, "big") for value in turned)
    path.write_bytes(data)
    frames, _ = read_video(path)
    assert frames.shape == (2, 64, 32, 3)
    assert frames[0, :14, 18:].min() > 200  # clockwise: top left goes to top right
    assert frames[0, 18:].max() < 50


def test_pixels_that_are_not_square_are_made_square(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        output.mux(stream.encode())
    assert read_video(path)[0].shape == (1, 32, 64, 3)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    good = write_video(tmp_path / "good.mp4", smooth_clip(9, 64, 96), 8).read_bytes()
    noise = bytearray(good)
    noise[len(good) // 2 :: 50] = bytes(b ^ 0xFF for b in noise[len(good) // 2 :: 50])
    with av.open(str(tmp_path / "good.mp4")) as container:
        ends_of_pictures = [p.pos for p in container.demux(video=0) if p.pos]
    with av.open(str(tmp_path / "sound.mp4"), "w") as output:
        stream = output.add_stream("aac", rate=8000)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        tone.sample_rate = 8000
        output.mux(stream.encode(tone))
        output.mux(stream.encode())
    playlist = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/good.mp4\n#EXT-X-ENDLIST\n"
    )
    bad = {
        "half.mp4": (good[: len(good) // 2], "damaged"),
        "whole pictures.mp4": (good[: max(ends_of_pictures)], "damaged"),
        "noise.mp4": (bytes(noise), "damaged"),
        "empty.mp4": (b"", "cannot be read"),
        "text.mp4": (b"hello " * 99, "cannot be read"),
        "sound.mp4": ((tmp_path / "sound.mp4").read_bytes(), "no video stream"),
        "list.m3u8": (playlist.encode(), "cannot be read"),
        "list.ffconcat": (b"ffconcat version 1.0\nfile 'good.mp4'\n", "cannot be read"),
        "half.png": (b"\x89PNG\r\n\x1a\n" + b"\0" * 9, "cannot be read"),
    }
    for name, (data, words) in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=words) as caught:
            read_video(tmp_path / name)
        assert name in str(caught.value)
    for path, words in (("nowhere.mp4", "does not exist"), ("http://127.0.0.1/a.mp4", "does not")):
        with pytest.raises(MediaError, match=words):
            read_video(tmp_path / path if ":" not in path else path)
    (tmp_path / "void").mkdir()
    with pytest.raises(MediaError, match="no numbered PNG"):
        read_video(tmp_path / "void")


def test_clips_over_the_memory_limit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4", smooth_clip(9, 32, 32), 8)
    monkeypatch.setattr(video_reader, "MAX_DECODED_BYTES", 5 * 32 * 32 * 3)
    with pytest.raises(MediaError, match="read fewer"):
        read_video(path)
    assert len(read_video(path, max_frames=5)[0]) == 5


def test_limits_of_a_thread_bound_what_it_reads(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", smooth_clip(9, 32, 32), 8)
    picture = tmp_path / "a.png"
    Image.fromarray(smooth_clip(1, 32, 32)[0]).save(picture)
    with reading_within(MediaLimits(decoded_bytes=5 * 32 * 32 * 3)):
        with pytest.raises(MediaError, match="read fewer"):
            read_video(path)
        assert len(read_video(path, max_frames=5)[0]) == 5
    for given in (path, picture):
        with reading_within(MediaLimits(pixels=32 * 32 - 1)):
            with pytest.raises(MediaError, match="at most 1023 are read"):
                read_video(given)
            other: list[int] = []  # a limit is of the thread that it was said in
            thread = threading.Thread(target=lambda: other.append(len(read_video(given)[0])))  # noqa: B023
            thread.start()
            thread.join()
            assert other
        with reading_within(MediaLimits(pixels=32 * 32)):
            read_video(given)
    assert len(read_video(path)[0]) == 9
