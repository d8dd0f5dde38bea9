"""What the command says: one line an error, once, with the value and what would work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sora_engine as sora
from sora_engine.cli import main, options
from sora_engine.cli.app import app, one_line
from sora_engine.cli.work import follow
from sora_engine.io.video_writer import write_video
from sora_engine.models.registry import BUNDLED

FRAMES = np.zeros((5, 16, 16, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a clip, an empty folder, a pipe, and a file of no values."""
    monkeypatch.chdir(tmp_path)
    write_video("clip.mp4", FRAMES, 8)
    (tmp_path / "empty").mkdir()
    os.mkfifo("pipe")
    save_file({"w": torch.zeros(0)}, "nothing.safetensors")
    return tmp_path


def test_bundled_checkpoints_are_there_by_their_names() -> None:
    """Wherever a command is run: `sora serve meadow` is no folder of that name."""
    assert set(options.BUNDLED) == set(BUNDLED)
    for name in BUNDLED:
        options.must_exist(name)
        assert options.absolute(name) == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "pipe"], "pipe: a device, a pipe or a socket; a file would work"),
        (["generate", "x", "--model", "pipe"], "pipe: a device, a pipe or a socket; a file"),
        (["decode", "pipe"], "it is a device, a pipe or a socket"),
        (["extend", "pipe", "--after", "1"], "pipe is not a regular file"),
        (["extend", "", "--after", "1"], "the path of a clip is empty"),
        (["generate", "x", "--image", ""], "the path of a clip is empty"),
        (["generate", "x", "--image", "empty"], "empty holds no numbered PNG files; 00000.png"),
        (["generate", "x", "--model", ""], "the path of a model is empty; a folder, a file or"),
        (["generate", "x", "--model", "sprites", "--model", "sprites"], "sprites: a whole model"),
        (["generate", "x", "--model", "Sprites"], "Sprites does not exist; sprites and"),
        (["export-vae", "sprites", "--sizes", "64"], "--sizes: '64' is not HEIGHTxWIDTH, such as"),
        (["generate", "x", "--fps", "1e-9"], "--fps: fps 1e-09: it must be at least 0.001 and at"),
        (["upscale", "clip.mp4", "--scale", "3", "--size", "64x64"], "--scale: scale 3"),
        (["generate", "x", "--upsample-model", "m"], "--upsample-model: it names the model at an"),
        (["generate", "--like", "clip.mp4", "--draft"], "--draft: --like makes clip.mp4 again"),
        (
            ["generate", "x", "--parallel", "ulysses=2,ulysses=4"],
            "--parallel: ulysses is given twice in 'ulysses=2,ulysses=4'",
        ),
        (["generate", "a \udcff"], "prompt is no text: character 2 is the lone surrogate"),
        (["extend", "no\nsuch\x1b[31m.mp4", "--after", "1"], r"no such\x1b[31m.mp4 does not exist"),
    ],
    ids=lambda value: (
        None if isinstance(value, str) else " ".join(value).encode("ascii", "replace")
    ),
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    before = sorted(os.listdir(folder))
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("sora: error: ")
    assert said.count("\n") == 1
    assert words in said
    assert sorted(os.listdir(folder)) == before


def test_a_current_folder_that_was_removed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A release that was replaced under a running service: MKL ends the process there."""
    (tmp_path / "release").mkdir()
    monkeypatch.chdir(tmp_path / "release")
    (tmp_path / "release").rmdir()
    for arguments in (["generate", "x", "-o", str(tmp_path / "a.mp4")], ["doctor"]):
        assert main(arguments) == 2
        error = "sora: error: the current folder is not there any more; `cd` into one that is\n"
        assert capsys.readouterr().err == error
    assert main(["--version"]) == 0


def test_another_schedulers_rank_is_none_of_ours(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for rank in ("", "x", "3"):
        monkeypatch.setenv("RANK", rank)
        assert main(["generate", "x", "--frames", "0"]) == 2
        assert "--frames: num_frames must be at least 1" in capsys.readouterr().err


def test_memory_that_runs_out_is_said_in_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none_left(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("sora_engine.cli.work.load_engine", none_left)
    assert main(["generate", "x"]) == 1
    assert "sora: error: memory ran out; a smaller model" in capsys.readouterr().err


def test_a_file_of_no_values_is_inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nothing.safetensors"]) == 0
    assert "1 tensors, 0 values" in capsys.readouterr().out


def test_control_characters_are_escaped_and_letters_stay() -> None:
    assert one_line("a\nb\r\x1b]0;t\x07\x9b") == r"a\nb\r\x1b]0;t\x07\x9b"
    assert one_line("é 红 🦊 \u200d") == "é 红 🦊 \u200d"


def test_an_output_with_a_line_end_in_its_name_is_told_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--size", "16x16", "--frames", "1", "--steps", "1", "--seed", "1"]
    assert main(["generate", "a red circle", *small, "-o", "a\nb.png"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(r"a\nb.png: 16x16, 1 frames")
    assert (folder / "a\nb.png").exists()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_cut_prompt_is_told_of_a_job_that_fails_at_once(terminal, monkeypatch, capsys):
    def fails(timeout_s=None):
        raise sora.JobFailedError("the disk is on fire")

    progress = SimpleNamespace(num_steps=2, num_frames=1)
    job = SimpleNamespace(cut_prompts=("its end is cut",), result=fails, progress=progress)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    with pytest.raises(sora.JobFailedError):
        follow(job)
    told = capsys.readouterr()
    assert (told.out + told.err).count("warning: its end is cut") == 1


def test_what_is_told_is_told_once(tmp_path: Path) -> None:
    """In a process of its own: there what is logged, and nobody reads, goes to stderr too."""
    code = (
        "import sys\n"
        "import sora_engine.runtime.executor as executor\n"
        "from sora_engine.cli import main\n"
        "executor.decoding = lambda *_, **__: 1 / 0\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["generate", "a red circle moves right " * 150, "--guidance", "1"]
    arguments += ["--negative-prompt", "blue", "--size", "16x16", "--frames", "1", "--steps", "1"]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments, "-o", str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 1
    begins = [
        "sora: warning: negative_prompt is not read: guidance is off at scale 1",
        "sora: warning: the prompt 'a red circle",
        "sora: error: ZeroDivisionError: division by zero",
    ]
    lines = run.stderr.splitlines()
    assert len(lines) == len(begins), run.stderr
    for line, begin in zip(lines, begins, strict=True):
        assert line.startswith(begin)


FAILURES = [
    BrokenPipeError(32, "Broken pipe"),
    EOFError(),
    ConnectionResetError(104, "Connection reset by peer"),
    OSError(),
    AssertionError(),
    MemoryError(),
    KeyboardInterrupt(),
    SystemExit("why it ended"),
    SystemExit(3),
    SystemExit(143),
]


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_no_command_fails_without_a_word(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    command = app.registered_commands[0]
    monkeypatch.setattr(command, "callback", fail)
    monkeypatch.setattr(command, "name", "broken")
    code = main(["broken"])
    assert code != 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("sora: error: ")
    assert len(told[0]) > len("sora: error: ")
    interrupted = isinstance(error, KeyboardInterrupt)
    assert ("interrupted" in told[0]) == interrupted
    assert (code == 130) == interrupted
