"""What a host or a terminal has changed makes no difference: torch's defaults, streams, signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine.io.video_reader import read_video
from tests.faults.engines import difference

SMALL = {"height": 16, "width": 16, "num_inference_steps": 2, "seed": 1}
CLIP = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
WINDOWS = {"num_frames": 33, "window": sora.WindowPlan(5, 2, free_noise=True, schedule="moving")}
CHAIN = {"num_frames": 33, "window": sora.WindowPlan(5, 2, schedule="chained", anchors=1)}
REQUESTS = [
    sora.VideoRequest("a red circle", num_frames=5, solver="dpm++sde", **SMALL),
    sora.VideoRequest("a red circle", **WINDOWS, **SMALL),
    sora.VideoRequest("a red circle", **CHAIN, **SMALL),
    sora.VideoRequest("a red circle", num_frames=33, window=sora.SparsePlan(3), **SMALL),
    sora.VideoRequest("a red circle", num_frames=8, loop=True, **SMALL),
    sora.VideoRequest("a red circle", num_frames=9, clips=[sora.Clip(CLIP)], **SMALL),
    sora.VideoRequest("a red circle", num_frames=5, init=CLIP, strength=0.7, **SMALL),
    *(
        sora.VideoRequest("a red circle", num_frames=1, solver=solver, **SMALL)
        for solver in ("euler", "unipc", "dpm++", "ddim", "ddpm", "renoise")
    ),
]


def made(then=contextlib.nullcontext):
    """All requests one after another, by an engine that is loaded before `then` or in it."""
    limits = sora.Limits(pack_tokens=512)
    with sora.Engine.from_pretrained("sprites", device="cpu", limits=limits) as engine, then():
        return [engine.generate(request) for request in REQUESTS]


@pytest.fixture(scope="module")
def plain():
    return made()


@contextlib.contextmanager
def dtype(kind):
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def check(videos, plain):
    for video, want in zip(videos, plain, strict=True):
        assert torch.equal(video.latents, want.latents)
        assert np.array_equal(video.frames, want.frames)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_default_dtype_changes_no_bit(plain, kind):
    check(made(lambda: dtype(kind)), plain)
    with dtype(kind):
        check(made(), plain)


def test_a_default_device_changes_no_bit(plain):
    """Meta stands for any: a tensor that is made there has no values at all."""
    check(made(lambda: device("meta")), plain)
    with device("meta"):
        check(made(), plain)


def test_another_number_of_threads_stays_within_rounding(plain):
    """Sums are split in other places: the last bits move, and by no more than company moves
    them. (At two steps ddim's last one divides by a sixth, which takes it to 3e-5.)"""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        videos = made()
    finally:
        torch.set_num_threads(before)
    for video, want in zip(videos, plain, strict=True):
        bound = 1e-4 if video.receipt.solver == "DDIMSolver" else 1e-5
        assert difference(video, want) < bound


QUICK = ["--size", "16x16", "--frames", "5", "--steps", "1", "--seed", "1"]
COMMAND = [sys.executable, "-m", "sora_engine", "generate"]


def environment(**more):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def run(script, *arguments, **more):
    """A command in a shell, which can close streams before it starts."""
    return subprocess.run(
        ["sh", "-c", script, "sh", *arguments], capture_output=True, env=environment(**more)
    )


def whole(path):
    return read_video(path)[0].shape == (5, 16, 16, 3)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_nothing_to_write_into(tmp_path, closed):
    """Else files that are opened take their numbers, and what libraries print goes into them."""
    output = tmp_path / "a.mp4"
    done = run(f'"$@" {closed}', *COMMAND, "a red circle", *QUICK, "-o", str(output))
    assert done.returncode == 0
    assert whole(output)
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_narrow_streams_escape_what_they_do_not_have(tmp_path):
    output = tmp_path / "红🦊.mp4"
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    arguments = ["a red circle é", *QUICK, "-o", str(output)]
    done = run('"$@"', *COMMAND, *arguments, **{**ascii_only, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    assert whole(output)
    assert rb"\u7ea2\U0001f98a.mp4" in done.stdout
    done = run('"$@"', *COMMAND, *arguments[:-1], "红/a.mp4", **ascii_only)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("stream", ["a full disk", "a reader that goes"])
def test_an_output_that_ends_loses_no_video(tmp_path, stream):
    """The exit code tells that not all was said."""
    output = tmp_path / "a.mp4"
    arguments = [*COMMAND, "a red circle", *QUICK, "-o", str(output)]
    if stream == "a full disk":
        done = run('"$@" > /dev/full', *arguments)
        assert done.returncode == 1
        assert b"standard output cannot be written: [Errno 28]" in done.stderr
        assert done.stderr.count(b"\n") == 1
    else:
        done = run('"$@" | head -n 1', *arguments)
        assert b"Traceback" not in done.stderr
    assert whole(output)


@pytest.mark.parametrize(
    ("ignored", "code"), [(False, 129), (True, 0)], ids=["a terminal that closes", "nohup"]
)
def test_a_hangup(tmp_path, ignored, code):
    def before():
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)

    steps = ["--size", "32x32", "--frames", "17", "--steps", "40" if ignored else "1000"]
    run = subprocess.Popen(
        [*COMMAND, "a red circle", *steps, "--seed", "1", "-o", str(tmp_path / "a.gif")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=before,
    )
    for line in run.stdout:
        if line.startswith("making"):
            break
    run.send_signal(signal.SIGHUP)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == code, errors
    assert os.listdir(tmp_path) == (["a.gif"] if ignored else [])
    assert "Traceback" not in errors
