"""What a video file holds beside one plain stream: breaks, covers, transparency, fields, bombs."""

from __future__ import annotations

import logging
import struct
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io import video_reader
from sora_engine.io.images import MAX_PIXELS
from sora_engine.io.video_reader import measure_video, read_video

RED, BLUE, GREEN = (250, 0, 0), (0, 0, 250), (0, 250, 0)


def flat(
    path: Path, *streams: Any, muxer: str | None = None, num_frames: int = 16, begins_s: int = 0
) -> Path:
    """A file of one stream for each (colour, width, height, codec, disposition)."""
    rate = 25 if path.suffix == ".mpg" else 8
    with av.open(str(path), "w", format=muxer) as output:
        made = []
        for colour, width, height, codec, disposition in streams:
            stream = output.add_stream(codec, rate=rate)
            stream.width, stream.height = width, height
            stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
            if codec == "libx264":
                stream.options = {"bf": "0"}
            if disposition is not None:
                stream.disposition = disposition
            made.append((stream, np.full((height, width, 3), colour, np.uint8)))
        for index in range(num_frames):
            for stream, picture in made:
                if index and stream.disposition & Disposition.attached_pic:
                    continue
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = index + rate * begins_s, Fraction(1, rate)
                output.mux(stream.encode(frame))
        for stream, _ in made:
            output.mux(stream.encode())
    return path


def plain(colour: Any, codec: str = "libx264", width: int = 64, height: int = 64) -> Any:
    return colour, width, height, codec, None


def is_colour(frames: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(frames.mean((1, 2)) - colour) < 12).all(1)


@pytest.mark.parametrize(
    ("suffix", "codec"), [("ts", "libx264"), ("ts", "mpeg2video"), ("mpg", "mpeg2video")]
)
@pytest.mark.parametrize("second_s", [0, 1, 5000])
def test_times_that_begin_anew_go_on(
    tmp_path: Path, suffix: str, codec: str, second_s: int
) -> None:
    parts = [
        flat(tmp_path / f"{i}.{suffix}", plain(colour, codec), begins_s=begins_s)
        for i, (colour, begins_s) in enumerate([(RED, 0), (BLUE, second_s), (RED, 0)])
    ]
    path = tmp_path / f"joined.{suffix}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    rate = 25 if suffix == "mpg" else 8
    for fps in (None, float(rate)):
        frames, came = read_video(path, fps=fps)
        assert came == pytest.approx(rate, rel=0.05)
        assert abs(len(frames) - 48) <= 1
        blue = is_colour(frames, BLUE)
        assert abs(int(blue.sum()) - 16) <= 1
        assert is_colour(frames, RED)[~blue].all()
        assert blue[24]
        assert measure_video(path, fps=fps)[0] == len(frames)


def test_a_long_pause_of_an_mkv_is_no_break(tmp_path: Path) -> None:
    path = tmp_path / "slides.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for pts, colour in ((0, RED), (30, BLUE), (31, BLUE)):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), colour, np.uint8))
            frame.pts, frame.time_base = pts, Fraction(1)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    frames, _ = read_video(path, fps=1)
    assert is_colour(frames, RED).tolist() == [True] * 30 + [False] * 2


def test_pictures_that_change_size(tmp_path: Path) -> None:
    parts = [
        flat(tmp_path / "a.ts", plain(RED)),
        flat(tmp_path / "b.ts", plain(BLUE, width=96, height=48)),
    ]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(MediaError, match="change from 64x64 to 96x48; with a height and a width"):
        read_video(path)
    frames, _ = read_video(path, fps=8, height=32, width=40)
    assert frames.shape == (32, 32, 40, 3)
    assert is_colour(frames, BLUE).sum() == 16
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, size in enumerate([(8, 8), (8, 9)]):
        Image.new("RGB", size).save(folder / f"{index}.png")
    with pytest.raises(MediaError, match="change from 8x8 to 8x9"):
        read_video(folder)


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_of_several_streams_the_default_is_read_and_said(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    none, default = Disposition(0), Disposition.default
    path = flat(
        tmp_path / f"a.{suffix}",
        (RED, 64, 64, "libx264", none),
        (BLUE, 32, 48, "libx264", default),
    )
    with caplog.at_level(logging.WARNING, "sora_engine"):
        frames, _ = read_video(path)
    assert frames.shape == (16, 48, 32, 3)
    assert is_colour(frames, BLUE).all()
    assert "2 video streams (64x64, 32x48); number 2 is read" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sora_engine"):
        read_video(flat(tmp_path / f"b.{suffix}", plain(RED)))
    assert caplog.text == ""


def test_a_cover_is_not_the_video(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cover = (GREEN, 100, 100, "png", Disposition.attached_pic)
    path = flat(tmp_path / "a.mp4", plain(RED), cover)
    with av.open(str(path)) as container:
        assert [
            bool(s.disposition & Disposition.attached_pic) for s in container.streams.video
        ] == [False, True]
    with caplog.at_level(logging.WARNING, "sora_engine"):
        frames, _ = read_video(path)
    assert frames.shape == (16, 64, 64, 3)
    assert is_colour(frames, RED).all()
    assert caplog.text == ""
    with pytest.raises(MediaError, match="its only picture is a cover"):
        read_video(flat(tmp_path / "song.mp4", cover))


ALPHA = {
    "vp9.webm": ("libvpx-vp9", "yuva420p", {}),
    "vp8.webm": ("libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    "vp9.mkv": ("libvpx-vp9", "yuva420p", {}),
    "prores.mov": ("prores_ks", "yuva444p10le", {"profile": "4444"}),
    "animation.mov": ("qtrle", "argb", {}),
    "png.mov": ("png", "rgba", {}),
    "ffv1.mkv": ("ffv1", "yuva420p", {}),
    "ut.avi": ("utvideo", "gbrap", {}),
    "a.nut": ("rawvideo", "rgba", {}),
}


def clear_square() -> np.ndarray:
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[16:48, 16:48] = (255, 0, 0, 255)
    rgba[24:40, 24:40] = (0, 0, 255, 128)
    return rgba


def check_clear_square(frames: np.ndarray, bound: int) -> None:
    truth = {(4, 4): (255, 255, 255), (18, 32): (255, 0, 0), (32, 32): (127, 127, 255)}
    for place, colour in truth.items():
        assert np.abs(frames[:, place[0], place[1]].astype(int) - colour).max() <= bound, place


@pytest.mark.parametrize("name", ALPHA)
def test_transparency_of_a_video_lies_on_white(tmp_path: Path, name: str) -> None:
    codec, pixels, options = ALPHA[name]
    path = tmp_path / name
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixels
        stream.options, stream.bit_rate = options, 8_000_000
        for _ in range(12):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(clear_square(), format="rgba")))
        output.mux(stream.encode())
    frames, rate = read_video(path)
    assert (len(frames), rate) == (12, pytest.approx(8, rel=0.02))
    check_clear_square(frames, bound=1 if pixels in ("rgba", "argb", "gbrap") else 8)
    part, _ = read_video(path, fps=8, start=10, stop=12)
    np.testing.assert_array_equal(part, read_video(path, fps=8)[0][10:12])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "AVIF"])
@pytest.mark.parametrize("count", [1, 4])
def test_transparency_of_an_animation_lies_on_white_alike(
    tmp_path: Path, kind: str, count: int
) -> None:
    rgba = clear_square()
    if kind == "GIF":  # clear or not, nothing between
        rgba[24:40, 24:40] = (127, 127, 255, 255)
    frames = [Image.fromarray(np.roll(rgba, i, 1)) for i in range(count)]
    more = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    frames[0].save(
        tmp_path / "a", kind, save_all=True, append_images=frames[1:], duration=100, disposal=2,
        **more,
    ) if kind in ("PNG", "GIF") else frames[0].save(
        tmp_path / "a", kind, save_all=True, append_images=frames[1:], duration=100, **more
    )  # fmt: skip
    came, _ = read_video(tmp_path / "a")
    assert len(came) == count
    for i, frame in enumerate(came):
        check_clear_square(np.roll(frame, -i, 1)[None], bound=8 if kind == "AVIF" else 1)


def test_vp9_transparency_without_its_decoder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test_transparency_of_a_video_lies_on_white(tmp_path, "vp9.webm")

    def missing(name: str, mode: str) -> None:
        raise ValueError(f"no codec {name}")

    monkeypatch.setattr(av.CodecContext, "create", missing)
    with pytest.raises(MediaError, match="has transparency, which takes FFmpeg with libvpx-vp9"):
        read_video(tmp_path / "vp9.webm")


def woven(num_frames: int, height: int, width: int, *, top_first: bool) -> np.ndarray:
    """Frames of two fields each, taken half a frame apart: a bar that moves 4 columns a field."""
    fields = np.full((2 * num_frames, height, width, 3), 30, np.uint8)
    for i, field in enumerate(fields):
        field[:, 20 + 4 * i : 36 + 4 * i] = 220
    frames = fields[::2].copy()
    later = slice(1, None, 2) if top_first else slice(0, None, 2)
    frames[:, later] = fields[1::2, later]
    return frames


@pytest.mark.parametrize("top_first", [True, False])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.mpg"])
def test_interlaced_pictures_are_deinterlaced(tmp_path: Path, name: str, top_first: bool) -> None:
    path = tmp_path / name
    frames = woven(12, 64, 160, top_first=top_first)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg2video" if name == "a.mpg" else "libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 64, "yuv422p"
        stream.options = {"flags": "+ildct+ilme"}
        if name != "a.mpg":
            stream.options |= {"crf": "1"}
        stream.bit_rate = 8_000_000
        for frame in frames:
            picture = interlaced(av.VideoFrame.from_ndarray(frame, format="rgb24"), top_first)
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
    came, rate = read_video(path)
    assert (came.shape, rate) == (frames.shape, pytest.approx(25, rel=0.05))

    def combing(clip: np.ndarray) -> float:
        return float(np.abs(np.diff(clip[2:-2, 8:-8, :, 1].astype(int), axis=1)).mean())

    assert combing(frames) > 8
    assert combing(came) < 1
    with av.open(str(path)) as container:
        stored = [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
    # The lines of the field that comes first stay as they are.
    kept = slice(0, None, 2) if top_first else slice(1, None, 2)
    assert np.abs(came[:, kept].astype(int) - np.stack(stored)[:, kept]).mean() < 1


def interlaced(picture: Any, top_first: bool) -> Any:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=picture.width,
        height=picture.height,
        format=picture.format,
        time_base=Fraction(1, 25),
    )
    marked = graph.add("setfield", "tff" if top_first else "bff")
    sink = graph.add("buffersink")
    source.link_to(marked)
    marked.link_to(sink)
    graph.configure()
    graph.push(picture)
    return graph.pull()


def with_pixel_shape(path: Path, across: int, down: int) -> Path:
    """An MP4 whose pixels claim a shape (a pasp box, ISO/IEC 14496-12, 12.1.4)."""
    flat(path, plain(RED, width=256, height=192), num_frames=2)
    data = bytearray(path.read_bytes())
    at = data.find(b"pasp")
    if at >= 0:
        data[at + 4 : at + 12] = struct.pack(">II", across, down)
    else:
        at = data.index(b"avcC") - 4
        end = at + int.from_bytes(data[at : at + 4], "big")
        data[end:end] = struct.pack(">I4sII", 16, b"pasp", across, down)
        for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
            i = data.index(kind, data.index(b"moov")) - 4
            data[i : i + 4] = (int.from_bytes(data[i : i + 4], "big") + 16).to_bytes(4, "big")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("across", "down"), [(3000, 1), (2**31 - 1, 1), (60000, 7)])
def test_pixels_of_a_monstrous_shape_are_refused_before_they_are_made(
    tmp_path: Path, across: int, down: int
) -> None:
    path = with_pixel_shape(tmp_path / "a.mp4", across, down)
    with av.open(str(path)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(across, down)
    with pytest.raises(MediaError, match=f"at most {MAX_PIXELS} are read"):
        read_video(path, height=8, width=8)
    with pytest.raises(MediaError, match=f"at most {MAX_PIXELS} are read"):
        measure_video(path, fps=8)


def test_narrow_pixels_leave_a_column_at_least(tmp_path: Path) -> None:
    path = with_pixel_shape(tmp_path / "a.mp4", 1, 3000)
    assert read_video(path)[0].shape == (2, 192, 1, 3)


def test_a_size_is_never_remembered_past_a_change(tmp_path: Path) -> None:
    folder, picture, clip = tmp_path / "frames", tmp_path / "a.png", tmp_path / "a.mkv"
    folder.mkdir()
    for height, width in ((64, 64), (32, 48), (48, 32), (16, 16)):
        for index in range(3):
            Image.new("RGB", (width, height)).save(folder / f"{index:05d}.png")
        Image.new("RGB", (width, height)).save(picture)
        flat(clip, plain(RED, width=width, height=height))
        assert measure_video(folder, fps=8) == (3, height, width)
        assert measure_video(picture, fps=8) == (1, height, width)
        assert measure_video(clip, fps=8) == (16, height, width)
    (folder / "00002.png").unlink()
    assert measure_video(folder, fps=8) == (2, 16, 16)
    clip.unlink()
    with pytest.raises(MediaError, match="does not exist"):
        measure_video(clip, fps=8)


def test_a_size_is_remembered_of_a_file_that_has_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = flat(tmp_path / "a.mkv", plain(RED))
    monkeypatch.setattr(video_reader, "_SETTLED_NS", -(10**12))
    assert measure_video(path, fps=8) == (16, 64, 64)
    monkeypatch.setattr(video_reader, "read_video", None)  # would raise TypeError
    assert measure_video(path, fps=8) == (16, 64, 64)


class Forgetful:
    """A packet whose decoder keeps one of four pictures and says nothing of the others.

    FFmpeg's does so with H.264 whose pixels claim 100:1 in a transport stream.
    """

    count = 0

    def __init__(self, packet: Any):
        self._packet = packet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._packet, name)

    def decode(self) -> list[Any]:
        kept = []
        for picture in self._packet.decode():
            kept += [picture] if Forgetful.count % 4 == 0 else []
            Forgetful.count += 1
        return kept


def test_pictures_that_a_decoder_leaves_out_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = flat(tmp_path / "a.ts", plain(RED))
    opened = video_reader.open_video

    @contextmanager
    def forgetful(path: Path) -> Any:
        with opened(path) as container:
            yield SimpleNamespace(
                streams=container.streams,
                format=container.format,
                duration=container.duration,
                demux=lambda stream: map(Forgetful, container.demux(stream)),
            )

    monkeypatch.setattr(video_reader, "open_video", forgetful)
    monkeypatch.setattr(Forgetful, "count", 0)
    with pytest.raises(MediaError, match="4 of its 16 pictures can be decoded"):
        read_video(path)
