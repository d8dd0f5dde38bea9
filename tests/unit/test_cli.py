"""The command line, on a random-weight folder that diffusers saved."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from sora_engine.cli import main
from sora_engine.errors import CheckpointError
from sora_engine.io.provenance import read_provenance
from sora_engine.io.video_reader import read_video
from sora_engine.runtime.job import Job
from tests.unit.wan_folders import pipeline

SMALL = ["--size", "48x32", "--frames", "5", "--fps", "8", "--steps", "2", "--seed", "3"]
PROMPT = "a red circle moves right"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    # Weights at which every option moves thousands of pixel values.
    torch.manual_seed(0)
    pipe = pipeline()
    pipe.scheduler.register_to_config(prediction_type="flow_prediction")
    pipe.save_pretrained(folder)
    return str(folder)


def last(arguments: list[str]) -> list[str]:
    """The arguments with no more than the last of each option, which a command takes once."""
    kept: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--") or argument == "-o":
            kept = [part for part in kept if part[0] != argument]
            kept.append([argument])
        elif kept and kept[-1][0].startswith("-") and len(kept[-1]) == 1:
            kept[-1].append(argument)
        else:
            kept.append([argument])
    return [argument for part in kept for argument in part]


def generate(model: str, *options: str | Path) -> int:
    return main(last(["generate", PROMPT, "--model", model, *map(str, options)]))


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    return subprocess.Popen(
        [sys.executable, "-m", "sora_engine", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        # A shell has what it starts in the background ignore interrupts, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ""])
def test_every_format_of_a_video(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    output = tmp_path / f"clip{suffix}"
    assert generate(model, "-o", output, *SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "denoise 2/2" in lines
    assert "decode 5/5" in lines
    times = r"load \d+\.\d s, encode \d+\.\d s, denoise \d+\.\d s, decode \d+\.\d s"
    last = rf"{re.escape(str(output))}: 48x32, 5 frames at 8 fps, seed 3 \({times}\)"
    assert re.fullmatch(last, lines[-1])
    frames, fps = read_video(output, fps=None if suffix else 8)
    assert frames.shape == (5, 32, 48, 3)
    assert fps == pytest.approx(8, rel=0.02)
    provenance = read_provenance(output)
    assert provenance is not None
    assert (provenance.prompt, provenance.seed) == (PROMPT, 3)
    assert provenance.settings["num_inference_steps"] == 2
    assert [p.name for p in tmp_path.iterdir()] == [output.name]


def test_a_terminal_gets_two_bars(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert generate(model, "-o", tmp_path / "a.mp4", *SMALL) == 0
    printed = capsys.readouterr().out
    assert re.search(r"denoise .*2/2", printed)
    assert re.search(r"decode .*5/5", printed)
    assert f"{tmp_path}/a.mp4: 48x32" in printed.splitlines()[-1]


def test_one_frame_is_an_image(tmp_path: Path, model: str) -> None:
    assert generate(model, "-o", tmp_path / "a.png", *SMALL, "--frames", "1") == 0
    assert Image.open(tmp_path / "a.png").size == (48, 32)


def test_the_file_holds_what_the_library_makes(tmp_path: Path, model: str) -> None:
    import sora_engine as sora

    assert generate(model, "-o", tmp_path / "frames", *SMALL, "--guidance", "2.5") == 0
    request = sora.VideoRequest(
        PROMPT, height=32, width=48, num_frames=5, num_inference_steps=2, guidance_scale=2.5, seed=3
    )
    with sora.Engine.from_pretrained(model) as engine:
        expected = engine.generate(request).frames
    np.testing.assert_array_equal(read_video(tmp_path / "frames")[0], expected)
    assert expected.std() > 5  # not one flat colour


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "3"],
        ["--guidance", "7"],
        ["--shift", "9"],
        ["--seed", "4"],
        ["--negative-prompt", "a"],
        ["--solver", "euler"],
    ],
)
def test_every_option_has_its_effect(tmp_path: Path, model: str, options: list[str]) -> None:
    assert generate(model, "-o", tmp_path / "plain", *SMALL) == 0
    assert generate(model, "-o", tmp_path / "changed", *SMALL, *options) == 0
    plain, changed = (read_video(tmp_path / name)[0] for name in ("plain", "changed"))
    assert not np.array_equal(plain, changed)


def test_a_seed_is_drawn_and_told(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = set()
    for _ in range(2):
        assert generate(model, "-o", tmp_path / "a.mp4", *SMALL[:-2]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        seeds.add(int(re.search(r"seed (\d+)", last)[1]))
        assert read_provenance(tmp_path / "a.mp4").seed in seeds
    assert len(seeds) == 2


def test_help_and_version_leave_torch_alone() -> None:
    code = "import sys; from sora_engine.cli import main; assert main([{!r}]) == 0; "
    code += "assert not {{'torch', 'transformers', 'av', 'numpy'}} & set(sys.modules)"
    for option in ("--help", "--version"):
        run = subprocess.run([sys.executable, "-c", code.format(option)], capture_output=True)
        assert run.returncode == 0, run.stderr.decode()


def test_it_speaks_before_torch_is_there(tmp_path: Path, model: str) -> None:
    # A torch that cannot be imported: the first line must come all the same.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('not yet')")
    root = Path(__file__).parents[2]
    arguments = ["generate", "x", "--model", model, "-o", f"{tmp_path}/a.gif"]
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]\n"
    code += f"from sora_engine.cli import main; sys.exit(main({arguments!r}))"
    begin = os.times()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    end = os.times()
    assert run.stdout.startswith("sora_engine ")
    assert model in run.stdout
    assert run.returncode == 1
    assert "not yet" in run.stderr
    # The child's own time: what else the machine does counts for nothing.
    own_s = end.children_user - begin.children_user + end.children_system - begin.children_system
    assert own_s < 5


def bad_values(model: str, folder: Path) -> dict[str, tuple[list[str], str]]:
    """name: (arguments, a part of the message)"""
    (folder / "notes.txt").write_text("not an image")
    (folder / "folder.mp4").mkdir()
    ok = ["generate", PROMPT, "--model", model, "-o", str(folder / "a.mp4")]
    out = ["generate", PROMPT, "--model", model, "-o"]
    return {
        "no command": (["frobnicate"], "frobnicate"),
        "no prompt": (["generate"], "prompt"),
        "empty prompt": (["generate", "  ", "--model", model], "prompt is empty"),
        "unknown option": ([*ok, "--sice", "64x64"], "--sice"),
        "two prompts": ([*ok, "another"], "another"),
        "size, one number": ([*ok, "--size", "64"], "WIDTHxHEIGHT"),
        "size, words": ([*ok, "--size", "widexhigh"], "WIDTHxHEIGHT"),
        "size, negative": ([*ok, "--size", "-64x64"], "WIDTHxHEIGHT"),
        "size, zero": ([*ok, "--size", "0x64"], "--size"),
        "size, off the grid": ([*ok, "--size", "100x64", "--strict"], "96 or 112"),
        "size, too large": ([*ok, "--size", "99968x99968"], "at most"),
        "frames, off the grid": ([*ok, "--frames", "7", "--strict"], "5 or 9"),
        "frames, zero": ([*ok, "--frames", "0"], "--frames"),
        "frames, a word": ([*ok, "--frames", "many"], "--frames"),
        "frames, too many": ([*ok, "--frames", "400000001"], "at most"),
        "fps, zero": ([*ok, "--fps", "0"], "--fps"),
        "fps, nan": ([*ok, "--fps", "nan"], "--fps"),
        "fps, too high": ([*ok, *SMALL, "--fps", "9999"], "--fps"),
        "steps, zero": ([*ok, "--steps", "0"], "--steps"),
        "steps, negative": ([*ok, "--steps", "-3"], "--steps"),
        "steps, a fraction": ([*ok, "--steps", "2.5"], "--steps"),
        "guidance, nan": ([*ok, "--guidance", "nan"], "--guidance"),
        "guidance, inf": ([*ok, "--guidance", "inf"], "--guidance"),
        "guidance-2, nan": ([*ok, "--guidance-2", "nan"], "--guidance-2"),
        "shift, zero": ([*ok, "--shift", "0"], "--shift"),
        "seed, negative": ([*ok, "--seed", "-1"], "--seed"),
        "seed, 2**64": ([*ok, "--seed", str(2**64)], "--seed"),
        "seed, a word": ([*ok, "--seed", "lucky"], "--seed"),
        "solver": ([*ok, "--solver", "magic"], "--solver"),
        "device": ([*ok, "--device", "abacus"], "--device"),
        "device, absent": ([*ok, "--device", "cuda:99"], "--device"),
        "dtype": ([*ok, "--dtype", "int3"], "--dtype"),
        "model, absent": (["generate", PROMPT, "--model", "no/such"], "no/such does not exist"),
        "model, empty folder": ([*ok, "--model", str(folder)], str(folder)),
        "model, a text": ([*ok, "--model", str(folder / "notes.txt")], "notes.txt"),
        "image, absent": ([*ok, "--image", "no.png"], "no.png does not exist"),
        "image, a text": ([*ok, "--image", str(folder / "notes.txt")], "notes.txt"),
        "output, suffix": ([*out, "a.mkv"], ".mp4, .gif, .webp, .png"),
        "output, no folder": ([*out, "no/such/a.mp4"], "no/such does not exist"),
        "output, a folder": ([*out, str(folder / "folder.mp4")], "is a folder"),
        "output, empty": ([*out, ""], "empty"),
        "output, not writable": ([*out, "/proc/a.mp4"], "/proc"),
        "output, .png of frames": ([*out, str(folder / "a.png"), "--frames", "5"], "one frame"),
        "output, fast .gif": ([*out, str(folder / "a.gif"), *SMALL, "--fps", "90"], "at most 50"),
    }


def test_every_bad_value_is_one_line_and_exit_code_2(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = bad_values(model, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for name, (arguments, words) in cases.items():
        code = main(last(arguments))
        captured = capsys.readouterr()
        assert code == 2, (name, captured)
        assert captured.err.startswith("sora: error: "), name
        assert captured.err.count("\n") == 1, (name, captured.err)
        assert words in captured.err, (name, captured.err)
        assert "Traceback" not in captured.err + captured.out, name
        assert sorted(tmp_path.rglob("*")) == before, name


def test_without_a_model_it_takes_sprites_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def refuse(model: str, **_options: object) -> None:
        asked.append(model)
        raise CheckpointError("stop here")

    monkeypatch.setattr("sora_engine.runtime.engine.Engine.from_pretrained", refuse)
    assert main(["generate", PROMPT, "-o", str(tmp_path / "a.mp4")]) == 2
    assert asked == ["sprites"]
    assert "sprites, the bundled checkpoint" in capsys.readouterr().out.splitlines()[0]


def test_an_image_becomes_the_first_frame(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sora_engine.runtime.engine import Engine

    Image.new("RGB", (9, 7), (250, 3, 3)).save(tmp_path / "first.png")
    seen = []
    submit = Engine.submit
    monkeypatch.setattr(
        Engine,
        "submit",
        lambda self, request, **kw: seen.append(request) or submit(self, request, **kw),
    )
    generate(model, "-o", tmp_path / "a.mp4", *SMALL, "--image", tmp_path / "first.png")
    assert [(clip.frames, clip.at) for clip in seen[0].clips] == [(str(tmp_path / "first.png"), 0)]


def test_a_failure_at_work_is_one_line_and_exit_code_1(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("sora_engine.runtime.executor.decoding", fail)
    assert generate(model, "-o", tmp_path / "a.mp4", *SMALL) == 1
    errors = capsys.readouterr().err
    assert "no room" in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("sora: error: ")
    # Half a video is no video; the finished latents are kept, from which decoding goes on.
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4.latents.safetensors"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_and_leaves_nothing(
    tmp_path: Path, model: str, number: signal.Signals, code: int
) -> None:
    run = start(
        "generate", PROMPT, "--model", model, "-o", str(tmp_path / "a.mp4"),
        "--size", "128x128", "--frames", "33", "--steps", "1000",
    )  # fmt: skip
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("making"):  # minutes of steps, of which some have been done
            break
    time.sleep(1)
    run.send_signal(number)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == code
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_cancels_the_job(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []

    def interrupt(job: Job) -> None:
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr("sora_engine.cli.work.follow", interrupt)
    assert generate(model, "-o", tmp_path / "a.mp4", *SMALL, "--steps", "1000") == 130
    assert jobs[0].state == "cancelled"
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split("  ")[0].strip(): line for line in lines}
    for part in ("CPU", "GPU", "memory", "torch", "Triton", "csrc", "FFmpeg", "sprites", "onnx"):
        assert part in found
        assert "cannot be asked" not in found[part]
    assert torch.__version__ in found["torch"]
    assert av.__version__ in found["FFmpeg"]


def test_doctor_survives_a_broken_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["doctor"]) == 0
    assert re.search(r"FFmpeg +cannot be asked: .*av", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--steps", "2", "--steps", "3"], "--steps"),
        (["--seed", "1", "--frames", "5", "--seed", "1"], "--seed"),
        (["-o", "a.mp4", "--output", "b.mp4"], "--output"),
        (["--size", "64x64", "--size=32x32"], "--size"),
        (["--loop", "--loop"], "--loop"),
        (["--negative-prompt", "", "--negative-prompt", "x"], "--negative-prompt"),
    ],
)
def test_an_option_given_twice_is_named(
    model: str, options: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", PROMPT, "--model", model, *options]) == 2
    said = capsys.readouterr()
    assert said.err == f"sora: error: {name} is given 2 times; it takes one value\n"
    assert said.out == ""


def test_options_of_other_commands_are_given_once_too(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["bench", "--only", "ops", "--only", "block"],
        ["plan", "--gpus", "2", "--gpus", "4"],
        ["decode", "x", "--device", "cpu", "--device", "cuda"],
        ["export-vae", "x", "--sizes", "480x832", "--sizes", "720x1280"],
        ["extend", "clip.mp4", "--after", "1", "--after", "2"],
        ["animate", "a.png", "-p", "x", "--prompt", "y"],
    ):
        assert main(arguments) == 2
        assert "is given 2 times; it takes one value" in capsys.readouterr().err


def test_two_models_are_two_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def refuse(model: object, **_options: object) -> None:
        asked.append(model)
        raise CheckpointError("stop here")

    monkeypatch.setattr("sora_engine.runtime.engine.Engine.from_pretrained", refuse)
    files = [str(tmp_path / name) for name in ("high.safetensors", "low.safetensors")]
    for file in files:
        Path(file).touch()
    command = ["generate", PROMPT, "--model", files[0], "--model", files[1]]
    assert main([*command, "-o", str(tmp_path / "a.mp4")]) == 2
    assert asked == [tuple(files)]
    capsys.readouterr()
    monkeypatch.undo()
    command = ["generate", PROMPT, "--model", str(tmp_path), "--model", files[1]]
    assert main([*command, "-o", str(tmp_path / "a.mp4")]) == 2
    assert "two paths are two experts, each a file of weights" in capsys.readouterr().err


PAGES = """
import resource, sys, threading
from sora_engine.io.system import keep_memory
kept = keep_memory() if sys.argv[1] == "kept" else None

def work():
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        first, second = b"x" * (48 << 20), b"x" * (24 << 20)
        del first, second
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc's")
def test_what_a_step_frees_serves_the_next():
    """In a thread, as the engine's own is one; by default every page is found anew."""

    def run(how, **environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", PAGES, how],
            env={**clean, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        said, faults = done.stdout.split()
        return said, int(faults)

    said, faults = run("kept")
    assert said == "True"
    assert faults < 100
    assert run("as ever")[1] > 1000
    assert run("kept", MALLOC_MMAP_THRESHOLD_="131072")[0] == "False"
