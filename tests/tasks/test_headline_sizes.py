"""Sora's sizes and others off the grid, with every task that takes clips: each result is, to the
bit, the middle of the same world laid out by hand on the larger grid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import sora_engine as sora
from sora_engine import tasks
from tests.parity.oracles import tiny_pipeline

pytestmark = pytest.mark.slow

SETTINGS = {"num_inference_steps": 1, "guidance_scale": 1.0, "seed": 5, "fps": 8}
HD = [(1080, 1920), (1920, 1080)]


@pytest.fixture(scope="module", params=["sprites", "t2v", "vace", "ti2v-5b"])
def engine(request, tmp_path_factory):
    folder = request.param
    if folder != "sprites":
        folder = tmp_path_factory.mktemp("model")
        tiny_pipeline(request.param, 0).save_pretrained(folder)
    with sora.Engine.from_pretrained(folder, device="cpu") as made:
        yield made


def world(num_frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Frames in which no two pixels' neighbourhoods are alike."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


def nearest(size: int, inner: int) -> np.ndarray:
    """For each place on an axis of the grid, the nearest of the `inner` ones in its middle."""
    return np.clip(np.arange(size) - (size - inner) // 2, 0, inner - 1)


def on_grid(request: sora.VideoRequest, model: sora.VideoModel) -> sora.VideoRequest:
    """The request of a larger size, whose middle holds this one's clips, masks and start video."""
    multiple, time = model.grid.multiple, model.grid.time
    sides = zip((request.height, request.width), multiple, strict=True)
    height, width = (-(-side // unit) * unit for side, unit in sides)
    length = request.num_frames
    num_frames = length if request.loop else -(-(length - 1) // time) * time + 1
    rows, columns = nearest(height, request.height), nearest(width, request.width)

    def place(pixels: np.ndarray, tail: int) -> np.ndarray:
        times = np.clip(np.arange(len(pixels) + tail), 0, len(pixels) - 1)
        return pixels[times][:, rows][:, :, columns]

    clips = []
    for clip in request.clips:
        frames = np.asarray(clip.frames)
        tail = num_frames - length if clip.at + len(frames) == length else 0
        mask = clip.mask
        if mask is not None:
            if mask.ndim == 1:
                mask = np.concatenate([mask, mask[-1:].repeat(tail)])
            else:
                mask = place(mask[None] if mask.ndim == 2 else mask, tail if mask.ndim == 3 else 0)
                mask = mask[0] if clip.mask.ndim == 2 else mask
        clips.append(sora.Clip(place(frames, tail), clip.at, mask))
    init = None if request.init is None else place(np.asarray(request.init), num_frames - length)
    return replace(
        request, clips=clips, init=init, height=height, width=width, num_frames=num_frames
    )


def requests(model: sora.VideoModel, height: int, width: int, num_frames: int):
    """Each task at this size and, where a task has a say in it, of this length."""
    size = {"height": height, "width": width, **SETTINGS}
    clip = world(num_frames, height, width)
    half = num_frames // 2
    hole = np.zeros((height, width), bool)
    hole[height // 3 : height // 2, width // 5 : width // 2] = True
    yield "animate", tasks.animate(model, clip[:1], "a", num_frames=num_frames, **size)
    rest = (num_frames - half) / 8
    yield "extend after", tasks.extend(model, clip[:half], "a", after_s=rest, **size)
    yield "extend before", tasks.extend(model, clip[:half], "a", before_s=rest, **size)
    yield "extend both", tasks.extend(model, clip[:5], "a", before_s=0.5, after_s=rest, **size)
    gap = max(4, num_frames - 5) / 8
    yield "connect", tasks.connect(model, clip[:1], clip[-4:], "a", gap_s=gap, **size)
    yield "loop", tasks.loop(model, clip[:1], "a", gap_s=0.5, **size)
    yield "fill", tasks.fill(model, clip, [range(1, 5)], "a", **size)
    yield "inpaint", tasks.inpaint(model, clip, hole, "a", **size)
    two = {**size, "num_inference_steps": 2}
    yield "edit", tasks.edit(model, clip, "a", strength=0.6, **two)


def check(engine: sora.Engine, height: int, width: int, num_frames: int) -> None:
    for name, request in requests(engine.model, height, width, num_frames):
        exact = engine.generate(request).frames
        large = engine.generate(on_grid(request, engine.model)).frames
        assert exact.shape == (request.num_frames, height, width, 3), name
        top, left = (large.shape[1] - height) // 2, (large.shape[2] - width) // 2
        middle = large[: len(exact), top : top + height, left : left + width]
        np.testing.assert_array_equal(exact, middle, err_msg=name)


@pytest.mark.parametrize("num_frames", [33, 34])
def test_500x281(engine, num_frames):
    check(engine, 281, 500, num_frames)


@pytest.mark.parametrize(("height", "width"), HD)
def test_1080p_and_upright(engine, height, width):
    check(engine, height, width, 6)
