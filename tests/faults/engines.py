"""What the fault tests share: the bundled checkpoint, loaded once, and random requests for it."""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine.models.loading import load_video_model
from sora_engine.models.video_model import VideoModel

PROMPTS = (
    "a red circle moves right on a white background",
    "a blue square",
    "a green triangle grows",
    "two circles",
)
PACK = 512


@functools.cache
def sprites(dtype: str = "float32") -> VideoModel:
    return load_video_model("sprites", device="cpu", dtype=dtype)


def engine(dtype: str = "float32", hooks: sora.Hooks | None = None, **limits: int) -> sora.Engine:
    """A new engine on the shared weights. The saturation point is given: nothing is measured."""
    bounds = sora.Limits(**{"pack_tokens": PACK, **limits})
    return sora.Engine(sprites(dtype), limits=bounds, hooks=hooks)


def comes_true(condition: Callable[[], bool], timeout_s: float = 60.0) -> bool:
    """Whether it does in time. A caller that is told of its job's end may be ahead of the engine's
    own tidying, which on a loaded machine takes a moment."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def save_midway(made: sora.Engine, request: sora.VideoRequest, path: Path, steps: int) -> None:
    """Leave a job's state in `path` after so many of its steps: it is cancelled then."""
    jobs: list[sora.Job] = []
    submitted = threading.Event()

    def stop(now: sora.Progress) -> None:
        if now.steps_done == steps:
            submitted.wait(60)
            jobs[0].cancel()

    jobs.append(made.submit(request, save_to=path, save_every=steps, on_progress=stop))
    submitted.set()
    with pytest.raises(sora.JobCancelledError):
        jobs[0].result(300)


def difference(video: sora.Video, want: sora.Video | torch.Tensor) -> float:
    """The largest difference of two videos' latents, over the largest latent."""
    latents = want if isinstance(want, torch.Tensor) else want.latents
    return ((video.latents - latents).abs().max() / latents.abs().max()).item()


def random_request(rng: random.Random, *, most: int = 64, steps: int = 5) -> sora.VideoRequest:
    """An image, a clip, a long video in windows, an edit, a loop or shots, of a random size."""
    height, width = (rng.choice([s for s in (16, 32, 48, 64, 96) if s <= most]) for _ in "hw")
    frames = rng.choice([1, 5, 9, 17])
    more: dict[str, object] = {}
    task = rng.choice(
        ["image", "text", "text", "long", "clip", "both ends", "init", "loop", "shots"]
    )
    if task == "image":
        frames = 1
    elif task == "long":
        frames = rng.choice([25, 33])
        schedule = rng.choice(["static", "chained"])
        overlap = 2 if schedule == "chained" else rng.choice([1, 2])
        anchors = rng.choice([0, 2]) if schedule == "chained" else 0
        more["window"] = sora.WindowPlan(
            rng.choice([3, 4, 5]), overlap, schedule=schedule, anchors=anchors
        )
    elif task in ("clip", "both ends"):
        frames = max(9, frames)
        more["clips"] = [sora.Clip(_frames(rng, 5, height, width))]
        if task == "both ends":
            more["clips"] += [sora.Clip(_frames(rng, 4, height, width), at=frames - 4)]
    elif task == "init":
        more |= {"init": _frames(rng, frames, height, width), "strength": 1.0}
    elif task == "loop":
        frames, more["loop"] = 8, True
    elif task == "shots":
        frames = 9
        more["shots"] = [sora.Shot(PROMPTS[0], 5), sora.Shot(PROMPTS[1], 4)]
    return sora.VideoRequest(
        rng.choice(PROMPTS),
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=rng.randint(1, steps),
        guidance_scale=rng.choice([1.0, 4.0]),
        solver=rng.choice([None, "euler", "dpm++", "dpm++sde"]),
        seed=rng.randrange(2**31),
        **more,
    )


def _frames(rng: random.Random, count: int, height: int, width: int) -> np.ndarray:
    generator = np.random.default_rng(rng.randrange(2**31))
    return generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
