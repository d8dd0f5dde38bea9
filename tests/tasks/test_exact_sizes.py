"""Sizes and lengths off the grid: the middle of what a larger canvas on the grid becomes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import sora_engine as sora
from sora_engine import tasks
from tests.parity.oracles import tiny_pipeline

KINDS = ("t2v", "i2v", "flf2v", "vace", "ti2v-5b")
HEIGHT, WIDTH, NUM_FRAMES = 41, 55, 10  # on a canvas of 48 x 64 (TI2V: 64 x 64), 13 frames


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        tiny_pipeline(kind, 0).save_pretrained(folder)
        made[kind] = sora.Engine.from_pretrained(folder, device="cpu")
    yield made
    for engine in made.values():
        engine.close()


def canvas_of(engine) -> tuple[int, int, int]:
    rows, columns = engine.model.grid.multiple
    return -(-HEIGHT // rows) * rows, -(-WIDTH // columns) * columns, 13


def padded(array: np.ndarray, size: tuple[int, int], tail: int = 0) -> np.ndarray:
    """By hand: each pixel of a larger frame takes that of the nearest place in the smaller one."""
    rows = np.clip(np.arange(size[0]) - (size[0] - HEIGHT) // 2, 0, HEIGHT - 1)
    columns = np.clip(np.arange(size[1]) - (size[1] - WIDTH) // 2, 0, WIDTH - 1)
    times = np.clip(np.arange(len(array) + tail), 0, len(array) - 1)
    return array[times][:, rows][:, :, columns]


def middle(frames: np.ndarray) -> np.ndarray:
    top, left = (frames.shape[1] - HEIGHT) // 2, (frames.shape[2] - WIDTH) // 2
    return frames[:NUM_FRAMES, top : top + HEIGHT, left : left + WIDTH]


def noise_frames(n: int, seed: int = 0) -> np.ndarray:
    shape = (n, HEIGHT, WIDTH, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def cases(kind: str, size: tuple[int, int]):
    """Requests of the exact size, each with the same one on the grid, made up by hand."""
    first, last, whole = noise_frames(1), noise_frames(4, 1), noise_frames(NUM_FRAMES, 2)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, :30] = True
    at = NUM_FRAMES - 4
    placed = sora.Clip(padded(first, size)), sora.Clip(padded(last, size, 3), at)
    if kind == "i2v":
        yield {"clips": [sora.Clip(first)]}, {"clips": placed[:1]}
    elif kind != "flf2v":
        yield {}, {}
        yield (
            {"init": whole, "strength": 0.6},
            {"init": padded(whole, size, 3), "strength": 0.6},
        )
        big = padded(mask[None], size)[0]
        yield (
            {"clips": [sora.Clip(whole, mask=mask)]},
            {"clips": [sora.Clip(padded(whole, size, 3), mask=big)]},
        )
        yield {"clips": [sora.Clip(last, at)]}, {"clips": placed[1:]}
    yield {"clips": [sora.Clip(first), sora.Clip(last, at)]}, {"clips": placed}


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_the_middle_of_one_on_the_grid(engines, kind):
    """Clips, masks and start videos too: they lie where they would in a larger video."""
    engine = engines[kind]
    height, width, num_frames = canvas_of(engine)
    request = sora.VideoRequest("a red circle", seed=3, num_inference_steps=2)
    for exact, on_grid in cases(kind, (height, width)):
        small = engine.generate(
            replace(request, height=HEIGHT, width=WIDTH, num_frames=NUM_FRAMES, **exact)
        )
        large = engine.generate(
            replace(request, height=height, width=width, num_frames=num_frames, **on_grid)
        )
        assert small.frames.shape == (NUM_FRAMES, HEIGHT, WIDTH, 3)
        if kind in ("i2v", "flf2v"):
            # CLIP is shown the picture itself, not the canvas round it: close, and not the same.
            assert small.frames.std() > 1
        else:
            np.testing.assert_array_equal(small.frames, middle(large.frames))
        assert small.receipt.canvas == f"{width}x{height}, {num_frames} frames"
        assert large.receipt.canvas is None


def test_company_hooks_streams_and_saved_jobs_see_the_exact_size(engines, tmp_path):
    engine = engines["ti2v-5b"]
    exact = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES}
    request = sora.VideoRequest("a red circle", seed=3, num_inference_steps=3, **exact)
    alone = engine.generate(request)
    streamed: list[np.ndarray] = []
    job = engine.submit(request, on_frames=streamed.append, save_to=tmp_path / "job", save_every=2)
    job.result(300)
    np.testing.assert_array_equal(np.concatenate(streamed), alone.frames)
    assert job.progress.num_frames == job.progress.frames_decoded == NUM_FRAMES
    resumed = engine.resume(tmp_path / "job").result(300)
    np.testing.assert_array_equal(resumed.frames, alone.frames)
    videos = engine.generate([request, replace(request, seed=4, height=33)])
    assert videos[1].frames.shape == (NUM_FRAMES, 33, WIDTH, 3)
    assert np.abs(videos[0].frames.astype(int) - alone.frames).max() <= 1
    with pytest.raises(sora.RequestError, match="a multiple of 4, got 10; the nearest are 8 or 12"):
        engine.generate(replace(request, loop=True))
    looped = engine.generate(replace(request, loop=True, num_frames=12))
    assert looped.frames.shape == (12, HEIGHT, WIDTH, 3)


def test_shots_of_any_length(engines):
    request = tasks.shots(["a red circle", "a blue square"], [5, 5], seed=1, num_inference_steps=2)
    video = engines["t2v"].generate(replace(request, height=HEIGHT, width=WIDTH))
    longer = tasks.shots(["a red circle", "a blue square"], [5, 8], seed=1, num_inference_steps=2)
    expected = engines["t2v"].generate(replace(longer, height=48, width=64))
    np.testing.assert_array_equal(video.frames, middle(expected.frames))
