"""Where results go: names of any length, symbolic links, and a safety copy that cannot be."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sora_engine.cli import main
from sora_engine.errors import MediaError
from sora_engine.io.atomic import NAME_MAX, name_beside, temporary_beside, write_atomically
from sora_engine.io.latents import SUFFIX, SavedLatents
from sora_engine.io.provenance import read_provenance
from sora_engine.io.video_reader import read_video
from sora_engine.io.video_writer import VideoWriter, check_output, write_video

CLIP = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
NAMES = ["a" * 251 + ".mp4", "红" * 83 + ".mp4", "🦊" * 62 + ".png", "é" * 127, "a" * 230 + ".gif"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: f"{len(os.fsencode(name))} bytes")
def test_the_longest_names_are_written(tmp_path: Path, name: str) -> None:
    clip = CLIP[:1] if name.endswith(".png") else CLIP
    write_video(tmp_path / name, clip, 8)
    assert os.listdir(tmp_path) == [name]
    copy = name_beside(tmp_path / name, SUFFIX)
    SavedLatents(torch.ones(1, 1, 2, 2), 8.0, False, "sprites").write(copy)
    assert SavedLatents.read(copy).latents.sum() == 4
    assert len(os.fsencode(copy.name)) <= NAME_MAX
    assert sorted(os.listdir(tmp_path)) == sorted([name, copy.name])


def test_names_that_are_cut_stay_apart() -> None:
    folder = Path("/tmp")
    one, other = (name_beside(folder / ("x" * 250 + end), SUFFIX) for end in ("a", "b"))
    assert one != other
    assert one.name.endswith(SUFFIX)
    assert name_beside(folder / "out.mp4", SUFFIX).name == "out.mp4" + SUFFIX
    fits = "y" * (NAME_MAX - len(SUFFIX))
    assert name_beside(folder / fits, SUFFIX).name == fits + SUFFIX
    assert temporary_beside(folder / "z") != temporary_beside(folder / "z")


@pytest.mark.parametrize(
    "name", ["b" * 252 + ".mp4", "红" * 84 + ".mp4", "c" * 256], ids=["ASCII", "CJK", "folder"]
)
def test_names_over_the_systems_limit_are_refused_at_once(tmp_path: Path, name: str) -> None:
    size = len(os.fsencode(name))
    with pytest.raises(MediaError, match=f"the name has {size} bytes; 255 is the most"):
        check_output(tmp_path / name)


def test_a_null_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="null characters"):
        check_output(f"{tmp_path}/a\0.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png"])
def test_a_link_stays_and_its_target_is_written(tmp_path: Path, suffix: str) -> None:
    clip = CLIP[:1] if suffix == ".png" else CLIP
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / f"real{suffix}", tmp_path / f"latest{suffix}"
    real.write_bytes(b"old")
    link.symlink_to(os.path.join("store", real.name))
    write_video(link, clip, 8)
    assert os.readlink(link) == os.path.join("store", real.name)
    assert not real.is_symlink()
    expected = write_video(tmp_path / f"plain{suffix}", clip, 8)
    assert real.read_bytes() == expected.read_bytes()
    assert os.listdir(tmp_path / "store") == [real.name]


def test_links_to_links_to_what_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "b.png").symlink_to("c.png")
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    write_video(tmp_path / "a.png", CLIP[:1], 8)
    assert (tmp_path / "a.png").is_symlink()
    assert (tmp_path / "b.png").is_symlink()
    assert not (tmp_path / "c.png").is_symlink()
    np.testing.assert_array_equal(read_video(tmp_path / "c.png")[0], CLIP[:1])


def test_a_link_to_a_folder_of_pngs(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "latest"
    write_video(real, CLIP, 8)
    link.symlink_to("real")
    write_video(link, CLIP[:2], 8)
    assert os.readlink(link) == "real"
    assert sorted(path.name for path in real.iterdir()) == ["00000.png", "00001.png"]
    assert sorted(os.listdir(tmp_path)) == ["latest", "real"]
    (tmp_path / "next").symlink_to("new")
    write_video(tmp_path / "next", CLIP, 8)
    assert len(list((tmp_path / "new").iterdir())) == 3
    (real / "thesis.txt").write_text("do not delete")
    with pytest.raises(MediaError, match=r"thesis\.txt"):
        write_video(link, CLIP, 8)


def test_links_that_lead_nowhere_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").symlink_to("b.mp4")
    (tmp_path / "b.mp4").symlink_to("a.mp4")
    (tmp_path / "c.mp4").symlink_to("gone/c.mp4")
    with pytest.raises(MediaError, match=r"a\.mp4 .*leads in a circle"):
        check_output(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match=r"the folder .*gone does not exist"):
        VideoWriter(tmp_path / "c.mp4", 8)


def test_a_write_protected_file_or_folder_is_not_replaced(tmp_path: Path) -> None:
    """Renaming over it would: that asks for the folder's permission alone."""
    file, folder = tmp_path / "a.mp4", tmp_path / "frames"
    file.write_bytes(b"precious")
    write_video(folder, CLIP, 8)
    for path, mode in ((file, 0o444), (folder, 0o555)):
        path.chmod(mode)
        with pytest.raises(MediaError, match=f"{path.name} is write-protected; `chmod u"):
            check_output(path)
    assert file.read_bytes() == b"precious"
    file.chmod(0o644)
    folder.chmod(0o755)
    write_video(file, CLIP, 8)
    write_video(folder, CLIP, 8)


@pytest.mark.parametrize("name", [".mp4", ".GIF", ".webp", ".png"])
def test_a_suffix_is_no_name(tmp_path: Path, name: str) -> None:
    """A hidden folder of PNGs would come of it."""
    with pytest.raises(MediaError, match=f"a suffix needs a name before it, such as a{name}"):
        check_output(tmp_path / name)


@pytest.mark.parametrize("path", [b"a.mp4", None, 5, ["a.mp4"]], ids=str)
def test_what_is_no_path_is_named(path: Any) -> None:
    with pytest.raises(MediaError, match="an output is a path in a text or a Path, got"):
        write_video(path, CLIP, 8)


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    """Nor through links: as root, a link to a device would have made a file of it."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to("pipe.mp4")
    for name in ("pipe.mp4", "link.mp4"):
        with pytest.raises(MediaError, match=r"pipe\.mp4 is a device, a pipe or a socket"):
            check_output(tmp_path / name)
        with pytest.raises(OSError, match="a file would take its place"):
            write_atomically(tmp_path / name, b"x")
    assert (tmp_path / "pipe.mp4").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["link.mp4", "pipe.mp4"]


def test_a_failure_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "real.gif").write_bytes(b"old")
    (tmp_path / "link.gif").symlink_to("real.gif")
    with pytest.raises(MediaError, match="frame 1 is"):
        write_video(tmp_path / "link.gif", [CLIP[0], CLIP[0, :8]], 8)
    assert (tmp_path / "real.gif").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["link.gif", "real.gif"]


def test_other_files_that_are_written_whole_go_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


QUICK = ["--size", "32x32", "--frames", "5", "--steps", "1", "--seed", "1"]


def test_names_in_no_encoding_are_written_and_read(tmp_path: Path) -> None:
    """A name is bytes; Python holds those that are no UTF-8 as lone surrogates."""
    for suffix in (".mp4", ".gif", ".webp", ""):
        path = tmp_path / (os.fsdecode(b"clip\xff") + suffix)
        write_video(path, CLIP, 8)
        assert read_video(path)[0].shape == CLIP.shape


@pytest.mark.parametrize("command", ["extend", "upscale", "animate", "loop"])
def test_what_is_read_is_not_written_over_by_default(
    tmp_path, monkeypatch, capsys, command
) -> None:
    monkeypatch.chdir(tmp_path)
    write_video("out.mp4", CLIP, 8)
    (tmp_path / "link.mp4").symlink_to("out.mp4")
    before = Path("out.mp4").read_bytes()
    for name in ("out.mp4", "./out.mp4", str(tmp_path / "link.mp4")):
        assert main([command, name]) == 2
        assert capsys.readouterr().err == (
            f"sora: error: --output: {name} would be written over; name another file\n"
        )
    assert Path("out.mp4").read_bytes() == before


def test_the_command_makes_a_video_of_a_long_name(tmp_path: Path) -> None:
    output = tmp_path / ("红" * 83 + ".mp4")
    assert main(["generate", "a red circle", *QUICK, "-o", str(output)]) == 0
    assert os.listdir(tmp_path) == [output.name]
    assert read_provenance(output).seed == 1


def test_a_safety_copy_that_fails_does_not_fail_the_job(tmp_path, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sora_engine.io.latents.write_atomically", full)
    assert main(["generate", "a red circle", *QUICK, "-o", str(tmp_path / "a.mp4")]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("sora: warning: finished latents are not kept while they are decoded: ")
    assert "No space left on device" in said
    assert os.listdir(tmp_path) == ["a.mp4"]
    left = Path(tempfile.gettempdir()).glob(f"a.mp4*{SUFFIX}")
    assert [file for file in left if not file.stat().st_size] == []


def test_another_runs_safety_copy_is_not_ours(tmp_path, monkeypatch, capsys) -> None:
    """An older file of that name is neither offered after a failure before it, nor removed."""
    older = tmp_path / f"a.mp4{SUFFIX}"
    SavedLatents(torch.ones(1, 1, 2, 2), 8.0, False, "sprites").write(older)
    monkeypatch.setattr("sora_engine.runtime.executor.denoise_step", lambda *_: 1 / 0)
    assert main(["generate", "a red circle", *QUICK, "-o", str(tmp_path / "a.mp4")]) == 1
    assert "latents" not in capsys.readouterr().out
    assert SavedLatents.read(older).latents.sum() == 4


def test_an_earlier_runs_safety_copy_outlives_a_video_of_that_name(tmp_path, capsys) -> None:
    """And one that fails keeps its own beside it, which is what it offers."""
    older = tmp_path / f"a.mp4{SUFFIX}"
    SavedLatents(torch.ones(1, 1, 2, 2), 8.0, False, "sprites").write(older)
    output = tmp_path / "a.mp4"
    assert main(["generate", "a red circle", *QUICK, "-o", str(output)]) == 0
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", older.name]
    assert SavedLatents.read(older).latents.sum() == 4
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sora_engine.runtime.executor.decoding", lambda *_, **__: 1 / 0)
        assert main(["generate", "a red circle", *QUICK, "-o", str(output)]) == 1
    own = tmp_path / f"a.mp4-2{SUFFIX}"
    assert f"sora decode {own} -o {output}" in capsys.readouterr().out
    assert main(["decode", str(own), "-o", str(output)]) == 0
    assert SavedLatents.read(older).latents.sum() == 4


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png", ""])
def test_a_disk_that_is_full_is_a_typed_error_and_leaves_nothing(tmp_path, suffix) -> None:
    """A limit on the size of files stands for it: writing fails in the middle, and on closing."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    clip = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        with pytest.raises(MediaError, match="cannot be written"):
            write_video(tmp_path / f"a{suffix}", clip, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_up_under_ffmpeg_prints_no_traceback(tmp_path, capfd) -> None:
    """PyAV shows those of the errors that a file raises to it of which FFmpeg does not tell: here
    the video fits into the file's buffer, and it is seeking that writes, and fails, again and
    again."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    clip = np.zeros((9, 64, 64, 3), np.uint8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(MediaError, match=r"a\.mp4 cannot be written: .*File too large"):
            write_video(tmp_path / "a.mp4", clip, 8)
        gc.collect()  # the container closes itself
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capfd.readouterr().err == ""
    assert os.listdir(tmp_path) == []
