"""A part of a long clip: the same pixels as the whole has there, and little time and memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_engine.errors import MediaError, RequestError
from sora_engine.io.video_reader import measure_video, read_video
from sora_engine.io.video_stream import VideoStream
from sora_engine.request.frames import load_frames
from sora_engine.request.request import Footage

# name: (codec, options)
CODECS = {
    "closed.mp4": ("libx264", {"g": "30", "preset": "veryfast"}),
    "open.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=25:bframes=4"}),
    "refresh.mp4": ("libx264", {"x264-params": "intra-refresh=1:keyint=40"}),
    "fragments.mp4": ("libx264", {"g": "30"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:keyint=30"}),
    "hevc.mkv": ("libx265", {"x265-params": "log-level=none:keyint=30"}),
    "vp9.webm": ("libvpx-vp9", {"g": "40", "lag-in-frames": "16", "cpu-used": "8"}),
    "still.mov": ("mjpeg", {}),
    "mpeg4.avi": ("mpeg4", {"g": "30", "bf": "2"}),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2"}),
    "h264.ts": ("libx264", {"g": "30"}),
    "open.ts": ("libx264", {"x264-params": "open-gop=1:keyint=25:bframes=4"}),
    "refresh.ts": ("libx264", {"x264-params": "intra-refresh=1:keyint=40"}),
    "interlaced.mp4": ("libx264", {"g": "30", "flags": "+ildct+ilme", "x264-params": "tff=1"}),
}


def moving(num_frames: int, height: int, width: int) -> np.ndarray:
    t, y, x = np.mgrid[:num_frames, :height, :width]
    ramp = [(x * 3 + 5 * t) % 256, (y * 4 + 3 * t) % 256, ((x + y) * 2 - 7 * t) % 256]
    return np.stack(ramp, -1).astype(np.uint8)


def written(path: Path, frames: np.ndarray, fps: int = 25) -> Path:
    codec, options = CODECS[path.name]
    muxer = {"movflags": "frag_keyframe+empty_moov"} if "fragments" in path.name else {}
    with av.open(str(path), "w", options=muxer) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.options = options
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("fps", [25.0, 16.0, None])
def test_a_part_has_the_whole_s_pixels(tmp_path: Path, name: str, fps: float | None) -> None:
    path = written(tmp_path / name, moving(150, 48, 64))
    whole, rate = read_video(path, fps=fps)
    n = len(whole)
    assert n == (96 if fps == 16 else 150)
    for start in (0, 1, n // 3, n // 2 + 1, n - 20, n - 1):
        part, part_rate = read_video(path, fps=fps, start=start, stop=start + 9)
        np.testing.assert_array_equal(part, whole[start : start + 9])
        assert part_rate == pytest.approx(rate, rel=0.05)
    np.testing.assert_array_equal(read_video(path, fps=fps, start=n - 30)[0], whole[n - 30 :])
    np.testing.assert_array_equal(
        read_video(path, fps=fps, start=n - 30, max_frames=4)[0], whole[n - 30 : n - 26]
    )
    assert measure_video(path, fps=fps) == (n, 48, 64)
    assert measure_video(path, fps=fps, stop=n - 5) == (n - 5, 48, 64)
    assert measure_video(path, fps=fps, stop=n + 5) == (n, 48, 64)
    with pytest.raises(MediaError, match=rf"has {n} frames; there is none from frame {n} on"):
        read_video(path, fps=fps, start=n)


@pytest.mark.parametrize("name", ["closed.mp4", "hevc.mkv", "vp9.webm", "fragments.mp4", "h264.ts"])
def test_what_lies_before_a_part_is_not_decoded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / name, moving(400, 48, 64))
    decoded = []
    plain = VideoStream._decoded

    def counted(stream: VideoStream):
        for picture in plain(stream):
            decoded.append(float(picture.time))
            yield picture

    monkeypatch.setattr(VideoStream, "_decoded", counted)
    read_video(path, fps=25.0, start=350, stop=354)
    assert len(decoded) < 100
    assert min(decoded[4:]) > 9  # seconds; frame 350 is at 14


@pytest.fixture(scope="module")
def minute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """960 frames of 480x272 at 16 frames a second."""
    path = tmp_path_factory.mktemp("minute") / "closed.mp4"
    return written(path, np.concatenate([moving(40, 272, 480)] * 24), fps=16)


def peak_bytes(path: Path, *calls: str) -> int:
    """How far the last call raises a new process's peak of memory over what those before took."""
    pytest.importorskip("resource")
    code = (
        "import resource, sys\n"
        "from sora_engine.io.video_reader import read_video\n"
        "from sora_engine.request.frames import load_frames\n"
        "from sora_engine.request.request import Footage\n"
        "path, *calls = sys.argv[1:]\n"
        "for call in calls:\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    eval(call)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, path, *calls], capture_output=True, check=True
    )
    return int(ran.stdout) * (1 if sys.platform == "darwin" else 1024)


def test_a_part_of_a_minute_takes_a_tenth_of_it(minute: Path) -> None:
    begun = time.process_time()
    whole = load_frames(str(minute), 272, 480, 16.0)
    whole_s = time.process_time() - begun
    begun = time.process_time()
    part = load_frames(Footage(str(minute), 900, 909), 272, 480, 16.0)
    part_s = time.process_time() - begun
    np.testing.assert_array_equal(part, whole[900:909])
    assert part_s < whole_s / 10
    first = "load_frames(Footage(path, 0, 1), 16, 16, 16.0)"
    rose = peak_bytes(minute, first, "load_frames(Footage(path, 900, 909), 272, 480, 16.0)")
    assert rose < whole.nbytes / 10


def test_a_whole_clip_is_held_once(minute: Path) -> None:
    rose = peak_bytes(minute, "read_video(path, max_frames=1)", "read_video(path, fps=16.0)")
    assert rose < 1.2 * (960 * 272 * 480 * 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_parts_of_animations_and_folders(tmp_path: Path, kind: str) -> None:
    frames = [Image.fromarray(frame) for frame in moving(12, 16, 24)]
    path = tmp_path / "a"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], duration=100)
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(frames):
        frame.save(folder / f"{index}.png")
    for source, fps in ((path, 10.0), (path, 16.0), (path, None), (folder, 8.0), (folder, None)):
        whole, _ = read_video(source, fps=fps)
        part, _ = read_video(source, fps=fps, start=5, stop=9)
        np.testing.assert_array_equal(part, whole[5:9])
        assert measure_video(source, fps=fps, stop=9)[0] == 9


@pytest.mark.parametrize(("start", "stop"), [(0, 160), (150, None), (5, 5), (7, 3), (-1, 4)])
def test_parts_that_are_not_there_name_what_is(
    tmp_path: Path, start: int, stop: int | None
) -> None:
    frames = moving(150, 48, 64)
    path = written(tmp_path / "closed.mp4", frames)
    for source in (str(path), frames):
        with pytest.raises(RequestError, match="it has 150, so from 0 to 150 would work"):
            load_frames(Footage(source, start, stop), 48, 64, 25.0)


def test_a_part_of_a_stream_whose_times_begin_anew(tmp_path: Path) -> None:
    path = written(tmp_path / "h264.ts", moving(100, 48, 64))
    path.write_bytes(path.read_bytes() * 2)
    whole, _ = read_video(path, fps=25.0)
    assert len(whole) == 200
    for start in (60, 97, 150):
        part, _ = read_video(path, fps=25.0, start=start, stop=start + 9)
        np.testing.assert_array_equal(part, whole[start : start + 9])


def test_a_part_of_frames_in_memory(tmp_path: Path) -> None:
    frames = moving(20, 48, 64)
    np.testing.assert_array_equal(
        load_frames(Footage(frames, 3, 7), 48, 64, 25.0), load_frames(frames[3:7], 48, 64, 25.0)
    )
    np.testing.assert_array_equal(
        load_frames(Footage(frames, 3), 24, 24, 25.0), load_frames(frames, 24, 24, 25.0)[3:]
    )
