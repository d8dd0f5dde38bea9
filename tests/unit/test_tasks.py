"""Tasks become requests: where clips lie on the time line, at which size, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from sora_engine import tasks
from sora_engine.errors import MediaError, RequestError
from sora_engine.io.provenance import Provenance
from sora_engine.io.video_stream import VideoStream
from sora_engine.io.video_writer import write_video
from sora_engine.request import Clip, Footage, GenerationDefaults, LatentGrid, VideoRequest


class Facts(NamedTuple):
    grid: LatentGrid
    defaults: GenerationDefaults


MODEL = Facts(
    LatentGrid(channels=16, vae_spatial=8, patch=(1, 2, 2), time=4),
    GenerationDefaults(
        height=96, width=96, num_frames=33, fps=8.0, num_inference_steps=20, guidance_scale=5.0
    ),
)


GRID = {"strict_grid": True}


def a_clip(n: int, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, height, width, 3), np.uint8)


def spans(request) -> list[tuple[int, int]]:
    """(first, stop) of each clip on the time line."""
    out = []
    for clip in request.clips:
        frames = clip.frames
        n = frames.stop - frames.start if isinstance(frames, Footage) else len(frames)
        out.append((clip.at, clip.at + n))
    return out


@pytest.mark.parametrize(
    ("before_s", "after_s", "clip", "total", "at"),
    [
        (0, 1, 33, 41, 0),  # on the grid already
        (0, 1, 30, 41, 0),  # up to the grid, never short of what was asked
        (1, 0, 32, 41, 9),
        (1, 0, 33, 41, 8),  # the clip ends where the video does
        (1, 1, 16, 33, 9),  # the clip begins with a latent frame
    ],
)
def test_extend_on_the_grid(before_s, after_s, clip, total, at):
    request = tasks.extend(MODEL, a_clip(clip), before_s=before_s, after_s=after_s, **GRID)
    assert request.num_frames == total
    assert spans(request) == [(at, at + clip)]
    assert at >= 8 * before_s
    assert total - at - clip >= 8 * after_s


@pytest.mark.parametrize(
    ("task", "total", "at"),
    [
        (lambda m, c: tasks.extend(m, c, after_s=1), 42, [0]),
        (lambda m, c: tasks.extend(m, c, before_s=1), 42, [8]),
        (lambda m, c: tasks.extend(m, c, before_s=1, after_s=1), 50, [8]),
        (lambda m, c: tasks.connect(m, c, c[:9], gap_s=1), 51, [0, 42]),
        (lambda m, c: tasks.fill(m, c, [range(4, 8)]), 34, [0]),
        (lambda m, c: tasks.inpaint(m, c, np.eye(281, 500, dtype=bool)), 34, [0]),
        (lambda m, c: tasks.edit(m, c), 34, []),
        (lambda m, c: tasks.upscale(m, c, scale=2), 34, []),
        (lambda m, c: tasks.animate(m, c, num_frames=34), 34, [0]),
    ],
)
def test_sizes_and_lengths_are_exact(task, total, at):
    wide = MODEL._replace(defaults=replace(MODEL.defaults, height=720, width=1280))
    request = task(wide, a_clip(34, 281, 500))
    assert request.num_frames == total
    assert [clip.at for clip in request.clips] == at
    scale = 2 if request.strength == tasks.UPSCALE_STRENGTH else 1
    assert (request.height, request.width) == (281 * scale, 500 * scale)


@pytest.mark.parametrize(("n", "gap_s", "total"), [(16, 1.0, 24), (17, 1.0, 28), (16, 0.2, 20)])
def test_a_clip_becomes_a_loop(n, gap_s, total):
    request = tasks.loop(MODEL, a_clip(n), gap_s=gap_s)
    assert request.loop
    assert (request.num_frames, spans(request)) == (total, [(0, n)])


def test_connect_takes_the_first_clips_size():
    request = tasks.connect(MODEL, a_clip(9), a_clip(12, 32, 32), gap_s=1.0, **GRID)
    assert (request.height, request.width, request.num_frames) == (64, 96, 29)
    assert spans(request) == [(0, 9), (17, 29)]


def test_fill_marks_what_is_missing_and_leaves_the_last_frames_off_the_grid():
    request = tasks.fill(MODEL, a_clip(35), [range(5, 9), range(12, 13)], **GRID)
    (clip,) = request.clips
    assert request.num_frames == 33
    assert spans(request) == [(0, 33)]
    assert np.flatnonzero(~clip.mask).tolist() == [5, 6, 7, 8, 12]


def test_inpaint_marks_what_stays(tmp_path):
    mask = np.zeros((64, 96), bool)
    mask[:, 48:] = True
    (clip,) = tasks.inpaint(MODEL, a_clip(9), mask).clips
    np.testing.assert_array_equal(clip.mask, ~mask)
    write_video(tmp_path / "mask.png", [mask[..., None].repeat(3, -1).astype(np.uint8) * 255], 1)
    (from_file,) = tasks.inpaint(MODEL, a_clip(9), tmp_path / "mask.png").clips
    np.testing.assert_array_equal(from_file.mask, ~mask)
    (scaled,) = tasks.inpaint(MODEL, a_clip(9), mask, height=32, width=48).clips
    np.testing.assert_array_equal(scaled.mask, ~mask[::2, ::2])
    moving = np.stack([np.roll(mask, i, 1) for i in range(11)])
    (clip,) = tasks.inpaint(MODEL, a_clip(11), moving, **GRID).clips
    np.testing.assert_array_equal(clip.mask, ~moving[:9])


def test_edit_and_upscale_start_from_the_clip():
    request = tasks.edit(MODEL, a_clip(10), "a cat", strength=0.3, **GRID)
    assert (request.init.start, request.init.stop, request.num_frames) == (0, 9, 9)
    assert (request.prompt, request.strength) == ("a cat", 0.3)
    request = tasks.upscale(MODEL, a_clip(9), scale=1.5)
    assert (request.height, request.width, request.strength) == (96, 144, 0.4)
    request = tasks.upscale(MODEL, a_clip(9), height=128, width=64)
    assert (request.height, request.width) == (128, 64)


def test_what_a_task_makes_may_be_given_as_it_makes_it():
    clip = a_clip(9)
    assert tasks.extend(MODEL, clip, after_s=1, num_frames=17).num_frames == 17
    request = tasks.loop(MODEL, clip, gap_s=1, loop=True, num_frames=None, clips=())
    assert (request.loop, len(request.clips)) == (True, 1)


def test_one_side_of_an_upscaled_clip_sets_the_other():
    clip = a_clip(5, 48, 64)
    for given in ({"height": 192}, {"width": 256}, {"height": 192, "width": 256}):
        request = tasks.upscale(MODEL, clip, **given)
        assert (request.height, request.width) == (192, 256)


def test_a_draft_is_half_the_size_in_half_the_steps():
    from sora_engine.request import VideoRequest

    request = VideoRequest("a cat", seed=3, num_inference_steps=9)
    small = tasks.draft(MODEL, request)
    assert (small.height, small.width, small.num_inference_steps, small.seed) == (48, 48, 5, 3)
    full = tasks.refine(request, a_clip(33))
    assert (full.height, full.strength, len(full.init)) == (None, tasks.EDIT_STRENGTH, 33)


@pytest.mark.parametrize(
    ("size", "given", "expected"),
    [
        ((64, 96), {}, (64, 96)),  # its own
        ((60, 100), {}, (64, 96)),  # to the nearest on the grid
        ((540, 960), {}, (64, 128)),  # at the default's area, in the clip's shape
        ((8, 8), {}, (16, 16)),
        ((540, 960), {"height": 48}, (48, 80)),
        ((540, 960), {"height": 32, "width": 32}, (32, 32)),
    ],
)
def test_the_size_of_a_task_follows_its_clip(size, given, expected):
    request = tasks.animate(MODEL, a_clip(1, *size), **given, **GRID)
    assert (request.height, request.width) == expected


def test_files_are_measured_at_the_requests_rate_and_tell_their_prompt(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, a_clip(48), 24, provenance=Provenance(prompt="a red circle", seed=1))
    request = tasks.extend(MODEL, path, after_s=1, **GRID)
    assert request.num_frames == 25  # 2 s at 8 fps, one more second, and the grid
    assert request.prompt == "a red circle"
    assert request.clips[0].frames == path
    other = tasks.extend(MODEL, path, "a cat", after_s=1, fps=4, **GRID)
    assert (other.num_frames, other.prompt, other.fps) == (13, "a cat", 4)
    part = tasks.edit(MODEL, Footage(path, 2, 12), **GRID).init
    assert (part.frames, part.start, part.stop) == (path, 2, 11)


def broken(tmp_path, kind: str) -> str:
    """A file that is no usable video."""
    import av

    path = tmp_path / f"{kind}.mp4"
    if kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    else:
        write_video(path, a_clip(9), 8)
        data = bytearray(path.read_bytes())
        if kind == "short":
            data = data[: len(data) // 2]
        else:
            data[len(data) // 2 :: 50] = bytes(b ^ 0xFF for b in data[len(data) // 2 :: 50])
        path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda c: tasks.extend(MODEL, c), "come to no frame at 8 fps; 0.125 s is one"),
        (lambda c: tasks.extend(MODEL, c, after_s=-1), "after_s must be 0 or more seconds, got -1"),
        (
            lambda c: tasks.extend(MODEL, c, before_s=float("nan")),
            "before_s must be finite, got nan",
        ),
        (lambda c: tasks.loop(MODEL, c, gap_s=0), "gap_s 0 is no frame.*shortest.*0.5 s"),
        (lambda c: tasks.connect(MODEL, c, c, gap_s=0.01), "gap_s 0.01 is no frame"),
        (lambda c: tasks.fill(MODEL, c, [range(7, 10)]), "frames 7-9: the video has frames 0 to 8"),
        (lambda c: tasks.fill(MODEL, c, [4, 5]), r"such as \[range\(4, 8\)\]; 4 is none"),
        (lambda c: tasks.fill(MODEL, c, [range(0, 9, 2)]), "9, 2\\) is none"),
        (lambda c: tasks.fill(MODEL, c, 4), "missing must be a list of ranges.*got int"),
        (lambda c: tasks.extend(MODEL, c, after_s="1"), "after_s must be a number, got '1'"),
        (lambda c: tasks.extend(MODEL, c, after_s=1e308), r"after_s 1e\+308 in frames must be fin"),
        (lambda c: tasks.extend(MODEL, c, after_s=1, fps="8"), "fps must be a number, got '8'"),
        (lambda c: tasks.extend(MODEL, c, after_s=1, fps=0), "fps must be over 0, got 0"),
        (lambda c: tasks.edit(MODEL, c, height="64"), "height must be an integer, got '64'"),
        (lambda c: tasks.upscale(MODEL, c, scale=float("inf")), "scale must be finite, got inf"),
        (lambda c: tasks.upscale(MODEL, c, scale="2"), "scale must be a number, got '2'"),
        (lambda c: tasks.edit(MODEL, Footage(c, 1.5)), "clip's start must be an integer, got 1.5"),
        (
            lambda _: tasks.draft(MODEL, VideoRequest("a", num_inference_steps="4")),
            "num_inference_steps must be an integer, got '4'",
        ),
        (lambda c: tasks.fill(MODEL, c, [range(0, 9)]), "all 9 frames are missing"),
        (lambda c: tasks.fill(MODEL, c, []), "no frame is missing; name some of frames 0 to 8"),
        (lambda c: tasks.edit(MODEL, c[:3], loop=True), "has 3 frames.*has 4 at least"),
        (
            lambda c: tasks.edit(MODEL, Footage(c, 4, 20)),
            "frames 4 to 20.*it has 9, so from 0 to 9",
        ),
        (lambda c: tasks.upscale(MODEL, c, scale=1.0), "scale 1: it must be over 1"),
        (
            lambda c: tasks.upscale(MODEL, c, scale=3, height=192),
            "scale 3: height is given too, which says the size; leave one out",
        ),
        (lambda c: tasks.upscale(MODEL, c, scale=3, height=192, width=9), "height is given too"),
        (
            lambda c: tasks.extend(MODEL, c, after_s=1, num_frames=99),
            "num_frames = 99: this task makes it of what it is given; leave num_frames out",
        ),
        (lambda c: tasks.fill(MODEL, c, [range(2, 4)], num_frames=3), "num_frames = 3: this"),
        (lambda c: tasks.connect(MODEL, c, c, gap_s=1, num_frames=3), "num_frames = 3: this"),
        (lambda c: tasks.inpaint(MODEL, c, np.eye(64, 96, dtype=bool), num_frames=3), "= 3: this"),
        (lambda c: tasks.edit(MODEL, c, init=c), "leave init out"),
        (lambda c: tasks.upscale(MODEL, c, num_frames=3), "num_frames = 3: this"),
        (lambda c: tasks.loop(MODEL, c, gap_s=1, clips=[Clip(c)]), "leave clips out"),
        (lambda c: tasks.animate(MODEL, c, clips=[Clip(c)]), "leave clips out"),
        (
            lambda c: tasks.inpaint(MODEL, c, np.ones((8, 8), bool)),
            "the mask is 8x8; the clip is 96x64",
        ),
        (lambda c: tasks.inpaint(MODEL, c, np.zeros((64, 96), bool)), "marks nothing"),
        (lambda c: tasks.inpaint(MODEL, c, np.ones((64, 96), bool)), "marks everything"),
        (lambda c: tasks.inpaint(MODEL, c, np.ones((64, 96))), "got float64"),
        (
            lambda c: tasks.inpaint(MODEL, c, np.ones((5, 64, 96), bool)),
            "has 5 frames and the clip 9.*9 frames, or one for all",
        ),
        (lambda c: tasks.animate(MODEL, c.astype(float)), "uint8.*got float64"),
        (lambda c: tasks.animate(MODEL, 7), "got int"),
        (lambda _: tasks.parse_ranges("4-2"), "'4-2': it is FIRST-LAST in frames"),
        (lambda _: tasks.parse_ranges("4,,5"), "FIRST-LAST"),
        (lambda _: tasks.shots(["a", "b"], [9]), "2 shots have 1 lengths"),
        (lambda _: tasks.shots("ab", [9, 8]), "prompts must be a list of texts, got str"),
        (lambda _: tasks.shots(["a"], 9), "num_frames must be a list of numbers.*, got int"),
        (lambda _: tasks.shots([b"a"], [9]), "a shot's prompt must be a string, got b'a'"),
        (lambda c: tasks.connect(MODEL, c, c, gap_s=None), "gap_s must be a number, got None"),
    ],
)
def test_what_cannot_be_is_named(task, message):
    with pytest.raises(RequestError, match=message):
        task(a_clip(9))


@pytest.mark.parametrize(
    ("kind", "message"),
    [("short", "damaged"), ("holes", "damaged"), ("sound", "no video stream")],
)
def test_broken_files_are_named(tmp_path, kind, message):
    path = broken(tmp_path, kind)
    with pytest.raises(MediaError, match=message):
        tasks.extend(MODEL, path, after_s=1)
    with pytest.raises(MediaError, match="does not exist"):
        tasks.extend(MODEL, tmp_path / "none.mp4", after_s=1)


def test_ranges():
    assert tasks.parse_ranges("4-7, 12") == [range(4, 8), range(12, 13)]


def test_clips_are_kept_as_they_were_given():
    array = a_clip(9)
    assert tasks.extend(MODEL, array, after_s=1).clips[0].frames is array
    assert isinstance(tasks.extend(MODEL, array, after_s=1).clips[0], Clip)


def test_a_picture_out_of_a_long_clip_looks_at_that_alone(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", a_clip(200), 8)
    passed = []
    plain = VideoStream._decoded
    monkeypatch.setattr(
        VideoStream, "_decoded", lambda stream: (passed.append(p) or p for p in plain(stream))
    )
    request = tasks.animate(MODEL, path, fps=8.0)
    part = request.clips[0].frames
    assert (part.frames, part.start, part.stop) == (path, 0, 1)
    assert len(passed) < 12
    request = tasks.animate(MODEL, Footage(path, 150), fps=8.0)
    assert (request.clips[0].frames.start, request.clips[0].frames.stop) == (150, 151)
    request = tasks.edit(MODEL, Footage(path, 3, 20), "sea", fps=8.0)
    assert (request.init.start, request.init.stop) == (3, 20)
    for start, stop in ((200, None), (0, 201), (5, 5), (-1, 2)):
        with pytest.raises(RequestError, match="it has 200, so from 0 to 200 would work"):
            tasks.edit(MODEL, Footage(path, start, stop), "sea", fps=8.0)
