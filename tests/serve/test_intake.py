"""Uploads that are bombs, liars, two things at once, or fine: a child tells, within bounds."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io.provenance import Provenance
from sora_engine.io.video_writer import write_video
from sora_engine.serve.intake import Caps, Examined, Intake

CAPS = Caps(max_pixels=2048 * 2048, max_frames=500, cpu_s=5, wall_s=20.0)


def examined(path: Path, caps: Caps = CAPS) -> Examined:
    return Intake(caps).examine(path)


def clip(frames: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    ramp = np.arange(width, dtype=np.uint8) * 4
    return np.stack(
        [np.broadcast_to(ramp[None, :, None] + t, (height, width, 3)) for t in range(frames)]
    )


def picture(**how: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(clip(1)[0]).save(out, **how)  # type: ignore[arg-type]
    return out.getvalue()


def webm(path: Path) -> bytes:
    with av.open(str(path), "w", format="webm") as output:
        stream = output.add_stream("libvpx-vp9", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for frame in clip():
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return path.read_bytes()


def mp4(path: Path, **more: object) -> bytes:
    return write_video(path, clip(), 8, **more).read_bytes()


def test_the_six_formats_are_taken_and_measured(tmp_path: Path) -> None:
    animated = write_video(tmp_path / "a.gif", clip(), 8).read_bytes()
    moving = write_video(tmp_path / "a.webp", clip(), 8).read_bytes()
    takes = {
        "image/png": [(picture(format="PNG"), 1)],
        "image/jpeg": [(picture(format="JPEG"), 1)],
        "image/webp": [(picture(format="WEBP"), 1), (moving, 6)],
        "image/gif": [(animated, 6)],
        "video/mp4": [(mp4(tmp_path / "a.mp4"), 6)],
        "video/webm": [(webm(tmp_path / "a.webm"), 6)],
    }
    for kind, files in takes.items():
        for data, frames in files:
            path = tmp_path / "upload"
            path.write_bytes(data)
            found = examined(path)
            assert (found.kind, found.width, found.height) == (kind, 48, 32)
            assert found.num_frames == frames
            assert found.is_picture is (frames == 1)
            assert found.fps == pytest.approx(8 if frames > 1 else 1, rel=0.02)
    # What counts is what is decoded, and not what a header says.
    path.write_bytes(lying_mp4(takes["video/mp4"][0][0], 30_000, 30_000))
    assert (examined(path).width, examined(path).height) == (48, 32)


def png_header(width: int, height: int) -> bytes:
    """A PNG of black pixels whose data are whole: 1/1000 of what it becomes."""

    def part(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(9)
    row = b"\0" * (width * 3 + 1)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", data) + part(b"IEND", b"")


def long_gif(frames: int) -> bytes:
    """A GIF of so many frames of one pixel."""
    head = b"GIF89a" + struct.pack("<HH", 1, 1) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\x0a\0\0\0" + b"\x2c\0\0\0\0\x01\0\x01\0\0" + b"\x02\x02\x44\x01\0"
    return head + frame * frames + b"\x3b"


def lying_mp4(data: bytes, width: int, height: int) -> bytes:
    """Another size in the header of the track and of the sample than its frames have."""
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    lied = data[:at] + struct.pack(">HH", width, height) + data[at + 4 :]
    at = lied.index(b"tkhd") + 80
    return lied[:at] + struct.pack(">II", width << 16, height << 16) + lied[at + 8 :]


def bombs(tmp_path: Path) -> dict[str, tuple[bytes, str]]:
    good, png = mp4(tmp_path / "good.mp4"), picture(format="PNG")
    playlist = b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n"
    zipped = b"PK\x03\x04" + b"\0" * 26 + b"PK\x05\x06" + b"\0" * 18
    page = b"<html><script>alert(1)</script></html>"
    return {
        "png of 196 megapixels": (png_header(14_000, 14_000), "at most 4194304"),
        "png with a lying size": (
            png[:16] + struct.pack(">II", 50_000, 50_000) + png[24:],
            "at most",
        ),
        "gif of 100,000 frames": (long_gif(100_000), "at most 500|within the server's bounds"),
        "gif over the frames": (long_gif(501), "501 frames; at most 500"),
        "mp4 with a lying box": (
            good.replace(b"\0\0\0\x08free", b"\x7f\xff\xff\xfffree"),
            "damaged|cannot",
        ),
        "playlist named mp4": (playlist, "none of PNG, JPEG"),
        "playlist in an mp4": (good[:32] + playlist + good[32:], "damaged|something else|cannot"),
        "mp4 cut short": (good[: len(good) // 2], "damaged|cannot"),
        "png cut short": (png[: len(png) // 2], "damaged|cannot"),
        "jpeg cut short": (picture(format="JPEG")[:-200], "damaged|cannot"),
        "webp cut short": (picture(format="WEBP")[:-10], "damaged|cannot"),
        "png and zip": (png + zipped, "something else"),
        "gif and page": (
            long_gif(3)[:13] + b"\x21\xfe\x26" + page + b"\0" + long_gif(3)[13:],
            "something else",
        ),
        "webp and more": (picture(format="WEBP") + b"more", "damaged"),
        "quicktime": (good[:8] + b"qt  " + good[12:], "none of"),
        "matroska": (webm(tmp_path / "m").replace(b"webm", b"mkvv", 1), "none of"),
        "bmp": (picture(format="BMP"), "none of"),
        "tiff": (picture(format="TIFF"), "none of"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "none of"),
        "text": (b"hello", "none of"),
        "nothing": (b"", "empty"),
    }


EXAMINE = """
import json, resource, sys, time
from pathlib import Path
from sora_engine.errors import MediaError
from tests.serve.test_intake import examined
for path in sys.argv[1:]:
    begun = time.monotonic()
    try:
        told = f"taken: {examined(Path(path))}"
    except MediaError as error:
        told = str(error)
    print(json.dumps([told, time.monotonic() - begun]))
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_bombs_and_liars_are_refused_within_bounds(tmp_path: Path) -> None:
    due = {}
    for name, (data, message) in bombs(tmp_path).items():
        path = tmp_path / "server-data" / str(len(due)) / "4f5e"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        due[str(path)] = name, message
    # By a process of its own, whose children are those that examine.
    run = [sys.executable, "-c", EXAMINE, *due]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment())
    *lines, largest = done.stdout.splitlines()
    for line, (name, message) in zip(lines, due.values(), strict=True):
        told, took_s = json.loads(line)
        assert re.search(message, told), (name, told)
        assert "4f5e" not in told, name
        assert "/proc" not in told, name
        assert took_s < CAPS.cpu_s + 8, name
    # The largest child of all was no larger than one for a small picture, and 100 MB.
    code = "import sora_engine.serve.examiner, resource; print(resource.getrusage(0).ru_maxrss)"
    idle = int(os.popen(f"{sys.executable} -c '{code}'").read())
    assert int(largest) < idle + 100 * 1024


def test_memory_and_time_of_decoding_are_bounded_by_the_kernel(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(png_header(2000, 2000))
    assert examined(path).width == 2000
    with pytest.raises(MediaError, match=r"memory|bounds"):
        examined(path, Caps(memory_bytes=4 << 20))
    path.write_bytes(long_gif(300_000))
    many = 10**6
    with pytest.raises(MediaError, match="bounds"):
        examined(path, Caps(cpu_s=1, max_frames=many))
    begun = time.monotonic()
    with pytest.raises(MediaError, match=r"over 0\.2 s"):
        examined(path, Caps(wall_s=0.2, max_frames=many))
    assert time.monotonic() - begun < 2


def test_what_metadata_name_is_not_followed(tmp_path: Path) -> None:
    """A clip that says it was made from another file: nobody opens that."""
    bait = tmp_path / "bait"
    os.mkfifo(bait)  # whoever opened it would wait
    clips = [{"at": 0, "frames": {"path": str(bait), "sha256": "0" * 64}}]
    said = Provenance(prompt="p", seed=1, model="m", version="0", settings={"clips": clips})
    data = write_video(tmp_path / "a.mp4", clip(), 8, provenance=said).read_bytes()
    assert json.dumps(str(bait))[1:-1].encode() in data
    found = examined(tmp_path / "a.mp4")
    assert (found.num_frames, found.width) == (6, 48)


def test_the_child_knows_no_key_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    from sora_engine.serve.intake import _environment

    monkeypatch.setenv("SORA_API_KEY", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert not {"SORA_API_KEY", "HTTPS_PROXY", "HOME"} & set(_environment())
    path = tmp_path / "a.png"
    path.write_bytes(picture(format="PNG"))

    intake = Intake(CAPS, at_once=2)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(intake.examine, [path] * 4))) == 4
    assert len(os.listdir("/proc/self/fd")) == before
