"""A process is killed, and another one goes on with its job: the video is the same to the bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import sora_engine as sora
from tests.faults.engines import engine, random_request

REQUEST = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 12, "seed": 3}
KILLED = """
import sys, time
import sora_engine as sora
job = sora.Engine.from_pretrained("sprites", device="cpu", dtype="float32").submit(
    sora.VideoRequest({prompt!r}, **{request!r}),
    save_to={path!r},
    on_progress=lambda p: (print(p.steps_done, flush=True), time.sleep(0.05)),
)
job.result()
"""


def test_killed_and_resumed_at_three_random_steps(tmp_path):
    request = {**REQUEST, "solver": "dpm++sde"}  # with history, and fresh noise at every step
    rng = random.Random(11)
    steps = sorted(rng.sample(range(1, 11), 3))
    path = tmp_path / "job.safetensors"
    code = KILLED.format(prompt="a red circle", request=request, path=str(path))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}"}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    kept = []
    with engine() as made:
        whole = made.generate(sora.VideoRequest("a red circle", **request))
        run = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
        )
        try:
            for line in run.stdout:
                if int(line) in steps:
                    kept.append(shutil.copy(path, tmp_path / f"{line.strip()}.safetensors"))
                if int(line) == steps[-1]:
                    break
        finally:
            run.send_signal(signal.SIGKILL)
            run.wait()
            run.stdout.close()
        assert len(kept) == 3
        for step, file in zip(steps, [*kept[:2], path], strict=True):
            video = made.resume(file).result(300)
            assert video.receipt.resumed_at >= step  # it went on while the file was copied
            assert torch.equal(video.latents, whole.latents)
            assert np.array_equal(video.frames, whole.frames)
            assert video.provenance == whole.provenance


def test_every_kind_of_job_is_saved_by_its_caller_and_resumed(tmp_path):
    rng = random.Random(7)
    with engine() as made:
        for i in range(6):
            request = random_request(rng, most=32, steps=6)
            ordered = threading.Event()
            job = made.submit(request, on_progress=lambda _, ordered=ordered: ordered.wait(300))
            with ThreadPoolExecutor(1) as pool:
                saved = pool.submit(job.save, tmp_path / f"{i}.safetensors", timeout_s=300)
                while not (job.save_orders or saved.done()):
                    time.sleep(0.001)
                ordered.set()
                path = saved.result(300)
            whole = job.result(300)
            again = made.resume(path).result(300)
            assert torch.equal(again.latents, whole.latents), request
            assert np.array_equal(again.frames, whole.frames)
        with pytest.raises(sora.JobFailedError, match="the job is completed"):
            job.save(path)


def test_a_job_that_is_being_decoded_is_saved_too(tmp_path):
    """Latents to the last bit: those of a video went through the VAE's scale and back."""
    with engine() as made:
        for seed in range(6):
            request = sora.VideoRequest("a red circle", **REQUEST | {"seed": seed})
            decoding, ordered = threading.Event(), threading.Event()

            def wait(_, decoding=decoding, ordered=ordered):
                decoding.set()
                ordered.wait(300)

            job = made.submit(request, on_frames=wait)
            assert decoding.wait(300)
            with ThreadPoolExecutor(1) as pool:
                saved = pool.submit(job.save, tmp_path / "job.safetensors", timeout_s=300)
                while not job.save_orders:
                    time.sleep(0.001)
                ordered.set()
                path = saved.result(300)
            whole, again = job.result(300), made.resume(path).result(300)
            assert again.receipt.resumed_at == REQUEST["num_inference_steps"]
            assert torch.equal(again.latents, whole.latents)
            assert np.array_equal(again.frames, whole.frames)


def test_what_is_no_saved_job_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "job.safetensors"
    with engine() as made:
        made.submit(sora.VideoRequest("x", **REQUEST), save_to=path).result(300)
        content = path.read_bytes()
        for bad in (
            b"",
            content[:1000],
            b"\0" * 100,
            content.replace(b"noise_given", b"noise_giver"),
        ):
            (tmp_path / "bad").write_bytes(bad)
            with pytest.raises(sora.CheckpointError):
                made.resume(tmp_path / "bad")
        monkeypatch.setattr(made.model, "weights_hash", "0" * 64)
        with pytest.raises(sora.CheckpointError, match="saved from another model"):
            made.resume(path)
        with pytest.raises(OSError, match="No such file"):
            made.submit(sora.VideoRequest("x", **REQUEST)).save("/nowhere/x", timeout_s=60)


@pytest.mark.parametrize(
    ("kind", "every"),
    [
        ("edit", 1),
        *(("text", 5), ("extended backward", 5)),
        pytest.param("text", 1, marks=pytest.mark.slow),
        pytest.param("extended backward", 1, marks=pytest.mark.slow),
    ],
)
def test_a_long_video_is_resumed_in_the_windows_that_it_had(kind, every, tmp_path):
    """Five windows of four steps, which blend an edit and are chained otherwise. `every` 5: at
    another step of each window. 1: at every step."""
    frames = np.random.default_rng(1).integers(0, 256, (41, 32, 32, 3), dtype=np.uint8)
    more = {
        "text": {},
        "extended backward": {"clips": [sora.Clip(frames[:8], at=33)]},
        "edit": {"init": frames, "strength": 0.8},
    }[kind]
    request = sora.VideoRequest(
        "a red circle", height=32, width=32, num_frames=41, num_inference_steps=4, seed=3, **more
    )
    path = tmp_path / "job.safetensors"
    kept = []

    def keep(progress):
        if progress.steps_done > len(kept) and path.exists():
            kept.append(shutil.copy(path, tmp_path / f"{len(kept)}.safetensors"))

    with engine() as made:
        whole = made.submit(request, save_to=path, on_progress=keep).result(300)
        assert len(kept) >= (3 if kind == "edit" else 11)
        for file in kept[::every]:
            video = made.resume(file).result(300)
            assert torch.equal(video.latents, whole.latents)
            assert np.array_equal(video.frames, whole.frames)


def test_a_saved_job_keeps_to_the_limits_of_who_takes_it_up(tmp_path):
    """As `submit` would have it: a file must not carry a request past an engine's limits."""
    path = tmp_path / "job.safetensors"
    request = sora.VideoRequest("a red circle", negative_prompt="a blue square", **REQUEST)
    with engine() as made:
        made.submit(request, save_to=path).result()
    for limits, says in (
        ({"max_pixels": 1000}, "32x32 is 1024 pixels; at most 1000"),
        ({"max_frames": 5}, "num_frames is 9; at most 5, so 5 would work"),
        ({"max_inference_steps": 11}, "num_inference_steps must be from 1 to 11, got 12"),
        ({"max_prompt_chars": 11}, "prompt has 12 characters; at most 11"),
        ({"max_prompt_chars": 12}, "negative_prompt has 13 characters; at most 12"),
    ):
        with engine(**limits) as made:
            with pytest.raises(sora.errors.RequestError, match=says):
                made.resume(path)
            with pytest.raises(sora.errors.RequestError, match=says):
                made.submit(request)
            assert made.num_queued + made.num_running == 0
