"""Videos written by the engine, held against what PyAV and Pillow read back."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io.provenance import Provenance, read_provenance
from sora_engine.io.video_reader import read_video
from sora_engine.io.video_writer import VideoWriter, check_output, write_video

PROVENANCE = Provenance(
    prompt='a "red" círcle 圆', seed=2**63 - 1, model="m", version="1", settings={"fps": 8.5}
)


def smooth_clip(num_frames: int, height: int, width: int) -> np.ndarray:
    """A colourful clip without sharp edges, which 4:2:0 can hold: uint8 [n, height, width, 3]."""
    t, y, x = np.mgrid[:num_frames, :height, :width].astype(float)
    red = 128 + 100 * np.sin(x / 20 + t / 5)
    green = 128 + 100 * np.cos(y / 15 + t / 7)
    blue = 128 + 80 * np.sin((x + y) / 30)
    return np.stack([red, green, blue], -1).round().astype(np.uint8)


def flat_clip(num_frames: int, height: int, width: int) -> np.ndarray:
    """A red square that moves a pixel a frame over an off-white ground; two colours in all."""
    clip = np.full((num_frames, height, width, 3), (250, 249, 241), np.uint8)
    for i in range(num_frames):
        clip[i, 3:9, i : i + 6] = (253, 2, 1)
    return clip


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def av_frames(path: Path) -> tuple[np.ndarray, Fraction]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        # Rounded exactly and with chroma for each column, unlike swscale's defaults.
        frames = [
            picture.to_ndarray(format="rgb24", interpolation=0x4 | 0x40000 | 0x2000)
            for picture in container.decode(stream)
        ]
        return np.stack(frames), stream.average_rate


def pillow_frames(path: Path) -> tuple[np.ndarray, float]:
    """Frames and the total duration in seconds, as Pillow sees an animation."""
    with Image.open(path) as image:
        frames, total = [], 0.0
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
            total += image.info["duration"] / 1000
    return np.stack(frames), total


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if ".tmp" in p.name or ".old" in p.name]


@pytest.mark.parametrize(
    ("fps", "exact"), [(8, Fraction(8)), (23.976, Fraction(2997, 125)), (12.5, Fraction(25, 2))]
)
def test_mp4_round_trip(tmp_path: Path, fps: float, exact: Fraction) -> None:
    clip = smooth_clip(17, 64, 96)
    write_video(tmp_path / "a.mp4", clip, fps, PROVENANCE)
    frames, rate = av_frames(tmp_path / "a.mp4")
    assert frames.shape == clip.shape
    assert rate == exact
    assert psnr(frames, clip) > 42
    assert abs(frames.mean((0, 1, 2)) - clip.mean((0, 1, 2))).max() < 0.6  # no colour cast
    assert leftovers(tmp_path) == []


def test_mp4_is_h264_yuv420p_bt709_with_its_index_in_front(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", smooth_clip(5, 32, 48), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (int(codec.colorspace), int(codec.color_range)) == (1, 1)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_mp4_pure_colours_come_back(tmp_path: Path) -> None:
    colours = np.array(
        [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0)], np.uint8
    )
    clip = np.broadcast_to(colours[:, None, None], (6, 32, 32, 3))
    write_video(tmp_path / "a.mp4", clip, 8)
    frames, _ = av_frames(tmp_path / "a.mp4")
    assert np.abs(frames[:, 16, 16].astype(int) - colours).max() <= 4


def test_the_same_frames_become_the_same_mp4_whatever_memory_held_before(tmp_path: Path) -> None:
    clip = tmp_path / "clip.npy"
    np.save(
        clip, np.concatenate([smooth_clip(12, 64, 96), np.tile(flat_clip(9, 32, 48), (2, 2, 1))])
    )
    code = (
        "import sys, numpy; from pathlib import Path\n"
        "from sora_engine.io.video_writer import write_video\n"
        "write_video(Path(sys.argv[2]), numpy.load(sys.argv[1]), fps=8.0)\n"
    )
    files = []
    for filled in (0, 1, 85, 170):  # what glibc fills new memory with
        path = tmp_path / f"{filled}.mp4"
        environment = {**os.environ, "MALLOC_PERTURB_": str(filled)}
        subprocess.run([sys.executable, "-c", code, clip, path], env=environment, check=True)
        files.append(path.read_bytes())
    assert files[1:] == files[:1] * 3


def test_odd_sides_of_an_mp4_gain_a_repeated_row_and_column(tmp_path: Path) -> None:
    clip = smooth_clip(5, 33, 47)
    write_video(tmp_path / "a.mp4", clip, 8)
    frames, _ = av_frames(tmp_path / "a.mp4")
    assert frames.shape == (5, 34, 48, 3)
    assert psnr(frames[:, :33, :47], clip) > 36
    assert psnr(frames[:, 33, :47], clip[:, 32]) > 30
    assert psnr(frames[:, :33, 47], clip[:, :, 46]) > 30


def test_gif_of_few_colours_is_exact_and_keeps_its_time(tmp_path: Path) -> None:
    clip = flat_clip(33, 20, 48)
    write_video(tmp_path / "a.gif", clip, 8, PROVENANCE)
    frames, seconds = pillow_frames(tmp_path / "a.gif")
    np.testing.assert_array_equal(frames, clip)
    assert seconds == pytest.approx(33 / 8, abs=0.006)  # delays are hundredths of a second
    np.testing.assert_array_equal(av_frames(tmp_path / "a.gif")[0], clip)  # a second opinion


def test_gif_of_exactly_256_colours_is_exact_and_257_are_not(tmp_path: Path) -> None:
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1).reshape(1, 16, 16, 3)
    clip = np.concatenate([greys, greys[:, ::-1]])
    write_video(tmp_path / "a.gif", clip, 10)
    np.testing.assert_array_equal(pillow_frames(tmp_path / "a.gif")[0], clip)
    clip[1, 0, 0] = (255, 0, 0)
    write_video(tmp_path / "b.gif", clip, 10)
    frames, _ = pillow_frames(tmp_path / "b.gif")
    assert not np.array_equal(frames, clip)
    assert psnr(frames, clip) > 35


def test_gif_of_many_colours_stays_close(tmp_path: Path) -> None:
    clip = smooth_clip(9, 48, 64)
    write_video(tmp_path / "a.gif", clip, 10)
    frames, _ = pillow_frames(tmp_path / "a.gif")
    assert frames.shape == clip.shape
    assert psnr(frames, clip) > 28


def test_webp_round_trip(tmp_path: Path) -> None:
    clip = smooth_clip(9, 48, 65)
    write_video(tmp_path / "a.webp", clip, 12, PROVENANCE)
    frames, seconds = pillow_frames(tmp_path / "a.webp")
    assert frames.shape == clip.shape
    assert seconds == pytest.approx(9 / 12, abs=0.001)
    assert psnr(frames, clip) > 38


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ""])
def test_a_video_that_stands_still_keeps_every_frame(tmp_path: Path, suffix: str) -> None:
    clip = np.repeat(flat_clip(1, 32, 32), 7, axis=0)
    path = write_video(tmp_path / f"a{suffix}", clip, 10)
    frames, fps = read_video(path, fps=None if suffix else 10)
    assert frames.shape == clip.shape
    assert fps == pytest.approx(10)


def test_one_frame_png_is_exact(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (1, 31, 17, 3), np.uint8)
    write_video(tmp_path / "a.PNG", clip, 8, PROVENANCE)
    with Image.open(tmp_path / "a.PNG") as image:
        np.testing.assert_array_equal(np.asarray(image), clip[0])
        assert Provenance.from_json(image.text["Comment"]) == PROVENANCE


def test_a_folder_of_pngs_is_exact_and_replaces_only_its_like(tmp_path: Path) -> None:
    clip = np.random.default_rng(0).integers(0, 256, (11, 8, 6, 3), np.uint8)
    target = tmp_path / "frames"
    write_video(target, clip, 8)
    write_video(target, clip[:3], 8)
    assert sorted(p.name for p in target.iterdir()) == ["00000.png", "00001.png", "00002.png"]
    for index in range(3):
        np.testing.assert_array_equal(
            np.asarray(Image.open(target / f"{index:05d}.png")), clip[index]
        )
    np.testing.assert_array_equal(read_video(target)[0], clip[:3])
    (target / "thesis.txt").write_text("do not delete")
    with pytest.raises(MediaError, match=r"thesis\.txt"):
        write_video(target, clip, 8)
    assert (target / "thesis.txt").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png", ""])
def test_provenance_survives_in_every_container(tmp_path: Path, suffix: str) -> None:
    clip = flat_clip(1 if suffix == ".png" else 3, 16, 16)
    path = write_video(tmp_path / f"a{suffix}", clip, 8, PROVENANCE)
    assert read_provenance(path) == PROVENANCE
    bare = write_video(tmp_path / f"b{suffix}", clip, 8)
    assert read_provenance(bare) is None


def test_provenance_longer_than_a_gif_block(tmp_path: Path) -> None:
    long = Provenance(prompt="word " * 300)
    assert read_provenance(write_video(tmp_path / "a.gif", flat_clip(2, 16, 16), 8, long)) == long


def test_foreign_comments_are_no_provenance() -> None:
    for text in ("", "hello", "[1]", '{"software": "other"}', "{"):
        assert Provenance.from_json(text) is None


@pytest.mark.parametrize(
    ("name", "num_frames", "words"),
    [
        ("a.mkv", 5, ".mp4, .gif, .webp, .png"),
        ("a.png", 2, "one frame, not 2"),
        ("missing/a.mp4", 5, "does not exist"),
        ("folder.mp4", 5, "is a folder"),
        ("file", 5, "means a folder"),
        ("..", 5, "name a file"),
    ],
)
def test_paths_that_cannot_be_written(
    tmp_path: Path, name: str, num_frames: int, words: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MediaError, match=r"a|f|\.") as caught:
        VideoWriter(tmp_path / name, 8, num_frames=num_frames)
    assert words in str(caught.value)
    assert name in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(MediaError, match="empty"):
        check_output("")


def test_a_place_that_refuses_new_files(tmp_path: Path) -> None:
    if os.access("/proc", os.F_OK):  # not writable even for root
        with pytest.raises(MediaError, match=r"/proc/a\.mp4"):
            VideoWriter("/proc/a.mp4", 8)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if not os.access(locked, os.W_OK):
        with pytest.raises(MediaError, match="not writable"):
            VideoWriter(locked / "a.mp4", 8)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1001])
def test_rates_that_cannot_be_written(tmp_path: Path, fps: float) -> None:
    with pytest.raises(MediaError, match="fps"):
        VideoWriter(tmp_path / "a.mp4", fps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_too_fast_for_players_are_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(MediaError, match="fps 100"):
        VideoWriter(tmp_path / f"a{suffix}", 100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_frames_of_other_kinds_are_refused(tmp_path: Path, frame: np.ndarray) -> None:
    with pytest.raises(MediaError, match="uint8"):
        write_video(tmp_path / "a.mp4", [frame], 8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png", ""])
def test_a_failure_on_the_way_leaves_what_was_there(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_video(path, flat_clip(1, 16, 16), 8, PROVENANCE)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def frames():
        yield flat_clip(1, 16, 16)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(path, frames(), 8)
    with pytest.raises(MediaError, match="at least one frame"):
        write_video(path, [], 8)
    with pytest.raises(MediaError, match=r"16x16|holds one frame"):
        write_video(path, [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 18, 3), np.uint8)], 8)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
