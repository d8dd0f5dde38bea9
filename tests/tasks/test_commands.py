"""The commands on the bundled checkpoint: lengths, sizes, and the same video again by --like."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sora_engine as sora
from sora_engine.cli import main
from sora_engine.io.provenance import read_provenance
from sora_engine.io.video_reader import read_video
from sora_engine.io.video_writer import write_video

QUICK = ["--steps", "2", "--seed", "5"]
SIZE = ["--size", "80x64"]


@pytest.fixture(scope="module")
def engine():
    with sora.Engine.from_pretrained("sprites", device="cpu") as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def _one_engine_for_all(engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sora_engine.cli.work.load_engine", lambda _common: engine)
    monkeypatch.setattr(type(engine), "close", lambda _self: None)


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """A red square that moves right, 9 frames of 64x80 at the checkpoint's rate."""
    frames = np.full((9, 64, 80, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        frame[24:40, 4 + 3 * i : 20 + 3 * i] = (220, 20, 30)
    return str(write_video(tmp_path / "clip", frames, 8))


def run(*arguments: str | Path) -> None:
    assert main([*map(str, arguments), *QUICK]) == 0


def frames_of(path: str | Path) -> np.ndarray:
    return read_video(path, fps=8)[0]


@pytest.mark.parametrize(
    ("arguments", "num_frames"),
    [
        (["extend", "--after", "1"], 17),
        (["extend", "--before", "1"], 17),
        (["loop", "--gap", "0.5"], 16),
        (["fill", "--missing", "1-4"], 9),
        (["edit", "--strength", "0.5", "-p", "a blue circle"], 9),
        (["animate", "--frames", "5"], 5),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else None,
)
def test_a_clips_task_and_the_same_again(tmp_path, clip, arguments, num_frames, capsys) -> None:
    """Length and size are the clip's, what is known stays, and --like gives every byte again."""
    command, *options = arguments
    run(command, clip, *options, *SIZE, "-o", tmp_path / "out")
    made = frames_of(tmp_path / "out")
    assert made.shape == (num_frames, 64, 80, 3)
    at = num_frames - 9 if "--before" in options else 0
    first = 3 if at else 0  # frames of a latent shared with new ones are made anew
    known = {"fill": [0, 5, 6, 7, 8], "animate": [0], "edit": []}.get(command, range(first, 9))
    for i in known:
        error = np.abs(made[at + i].astype(float) - frames_of(clip)[i]).mean()
        assert error < 8, (i, error)
    assert main(["generate", "--like", str(tmp_path / "out"), "-o", str(tmp_path / "again")]) == 0
    np.testing.assert_array_equal(frames_of(tmp_path / "again"), made)
    printed = capsys.readouterr().out.splitlines()
    assert f"making 80x64, {num_frames} frames, 2 steps, seed 5" in printed


def test_connect_inpaint_and_upscale(tmp_path, clip) -> None:
    run("connect", clip, clip, "--gap", "0.5", *SIZE, "-o", tmp_path / "joined")
    assert len(frames_of(tmp_path / "joined")) == 9 + 4 + 9
    run("connect", clip, clip, "--gap", "0.5", "--strict", *SIZE, "-o", tmp_path / "longer")
    assert len(frames_of(tmp_path / "longer")) == 25  # up to the grid
    mask = np.zeros((64, 80, 3), np.uint8)
    mask[:, 48:] = 255
    write_video(tmp_path / "mask.png", [mask], 1)
    run("inpaint", clip, "--mask", tmp_path / "mask.png", *SIZE, "-o", tmp_path / "painted")
    painted, plain = frames_of(tmp_path / "painted"), frames_of(clip)
    assert np.abs(painted[:, :, :40].astype(float) - plain[:, :, :40]).mean() < 8
    assert main(["generate", "--like", str(tmp_path / "painted"), "-o", f"{tmp_path}/again"]) == 0
    np.testing.assert_array_equal(frames_of(tmp_path / "again"), painted)
    run("upscale", clip, "--size", "128x96", "--strength", "0.6", "-o", tmp_path / "large")
    assert frames_of(tmp_path / "large").shape == (9, 96, 128, 3)


def test_words_become_pictures_loops_shots_and_drafts(tmp_path, capsys) -> None:
    run("image", "a red circle", "-o", tmp_path / "a.png", "--size", "96x64")
    assert frames_of(tmp_path / "a.png").shape == (1, 64, 96, 3)
    run("loop", "a red circle", "--frames", "8", *SIZE, "-o", tmp_path / "loop")
    assert len(frames_of(tmp_path / "loop")) == 8
    shots = ["--shot", "a red circle", "--shot-frames", "5", "--shot", "a blue star"]
    run("generate", *shots, "--shot-frames", "4", *SIZE, "-o", f"{tmp_path}/shots/")
    assert len(frames_of(tmp_path / "shots")) == 9
    told = read_provenance(tmp_path / "shots").settings["shots"]
    assert told[1] == {"prompt": "a blue star", "num_frames": 4}
    capsys.readouterr()
    run("generate", "a red circle", "--draft", "--size", "64x64", "--frames", "5",
        "-o", tmp_path / "full.mp4")  # fmt: skip
    assert "making 32x32, 5 frames, 1 steps first" in capsys.readouterr().out
    for name in ("loop", "shots", "full.mp4"):
        again = tmp_path / f"again-{name}"
        assert main(["generate", "--like", str(tmp_path / name), "-o", str(again)]) == 0
        np.testing.assert_array_equal(frames_of(again), frames_of(tmp_path / name))


def test_like_takes_changes_and_names_what_stands_in_the_way(tmp_path, clip, engine, capsys):
    run("extend", clip, "--after", "0.5", *SIZE, "-o", tmp_path / "out")
    like = ["generate", "--like", str(tmp_path / "out")]
    assert main([*like, "--seed", "6", "-o", str(tmp_path / "other")]) == 0
    assert read_provenance(tmp_path / "other").seed == 6
    assert not np.array_equal(frames_of(tmp_path / "other"), frames_of(tmp_path / "out"))
    capsys.readouterr()

    def complaint(arguments: list[str]) -> str:
        assert main(arguments) == 2
        return capsys.readouterr().err

    assert "does not say how it was made" in complaint(["generate", "--like", clip])
    told = read_provenance(tmp_path / "out")
    for change, words in (
        ({"model": "Wan2.1-T2V-1.3B"}, "was made by 'Wan2.1-T2V-1.3B'; name it by --model"),
        ({"settings": {**told.settings, "model_hash": "0" * 16}}, "made by weights 0000"),
        ({"settings": {**told.settings, "latents": {"sha256": "f" * 64}}}, "noise given in memory"),
    ):
        values = {"prompt": "x", "seed": 1, "model": told.model, "settings": told.settings}
        strange = sora.io.provenance.Provenance(**{**values, **change})
        write_video(tmp_path / "strange.png", frames_of(clip)[:1], 8, provenance=strange)
        assert words in complaint(["generate", "--like", str(tmp_path / "strange.png")])
    (Path(clip) / "00000.png").write_bytes((Path(clip) / "00001.png").read_bytes())
    assert "is not the file it was" in complaint(like)
    for name in Path(clip).iterdir():
        name.unlink()
    Path(clip).rmdir()
    assert "is not there any more" in complaint(like)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["extend", "CLIP"], "come to no frame"),
        (["extend", "CLIP", "--after", "-1"], "--after: after_s must be 0 or more seconds, got -1"),
        (["extend", "none.mp4", "--after", "1"], "none.mp4 does not exist"),
        (["extend", "CLIP", "--after", "99999"], "at most 100000"),
        (["loop", "none.mp4"], "none.mp4 does not exist"),
        (["loop", " "], "the prompt is empty"),
        (["loop", "CLIP", "--gap", "0"], "--gap: gap_s 0 is no frame"),
        (["loop", "a red circle", "--frames", "9"], "a multiple of 4, got 9; the nearest are 8"),
        (["fill", "CLIP", "--missing", "8-9"], "frames 8-9: the video has frames 0 to 8"),
        (["fill", "CLIP", "--missing", "all"], "--missing: missing 'all': it is FIRST-LAST"),
        (["fill", "CLIP", "--missing", "0-8"], "all 9 frames are missing"),
        (["inpaint", "CLIP", "--mask", "none.png"], "none.png does not exist"),
        (["edit", "CLIP", "--strength", "0"], r"--strength: strength must lie in (0, 1], got 0"),
        (["edit", "CLIP", "--strength", "1.5"], r"(0, 1], got 1.5"),
        (["edit", "CLIP", "--strength", "0.01", *QUICK], "the least that does is 0.5"),
        (["upscale", "CLIP", "--scale", "0.5"], "--scale: scale 0.5: it must be over 1"),
        (["image", ""], "the prompt is empty"),
        (["image", "x", "--size", "4096x4096"], "at most"),
        (["generate", "x", "--shot", "y", "--shot-frames", "5"], "take the place of PROMPT 'x'"),
        (["generate", "--shot", "y"], "1 shots have 0 lengths"),
        (["generate", "--shot", "y", "--shot-frames", "7", "--strict"], "are 5 or 9"),
        (["generate", "--like", "none.mp4"], "none.mp4 does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, clip, arguments, words, capsys) -> None:
    given = [clip if argument == "CLIP" else argument for argument in arguments]
    assert main([*given, "-o", str(tmp_path / "out.mp4")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sora: error: ")
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "out.mp4").exists()
