"""The engine awaited: results, progress, frames as they come, and cancelling a task."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

import sora_engine as sora
from tests.faults.engines import engine
from tests.parity.oracles import tiny_pipeline

SMALL = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3, "seed": 1}
REQUEST = sora.VideoRequest("a cat", **SMALL)
SPRITE = sora.VideoRequest(
    "a red circle", height=16, width=16, num_frames=5, num_inference_steps=1, seed=1
)
LONG = sora.VideoRequest("a cat", **{**SMALL, "num_inference_steps": 900})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ti2v")
    tiny_pipeline("ti2v-5b", 0).save_pretrained(path)
    return path


def run(folder, work):
    async def main():
        async with await sora.AsyncEngine.from_pretrained(folder, device="cpu") as engine:
            return await work(engine)

    return asyncio.run(main())


def test_requests_at_once_equal_the_synchronous_engine(folder):
    async def work(engine):
        return await asyncio.gather(*(engine.generate(REQUEST) for _ in range(3)))

    videos = run(folder, work)
    with sora.Engine.from_pretrained(folder, device="cpu") as engine:
        alone = engine.generate(REQUEST)
    for video in videos:
        assert (video.latents - alone.latents).abs().max() < 1e-4


def test_progress_ends_with_everything_done(folder):
    async def work(engine):
        job = engine.submit(REQUEST)
        return [p async for p in engine.progress(job, interval_s=0.001)]

    seen = run(folder, work)
    assert (seen[-1].state, seen[-1].steps_done, seen[-1].frames_decoded) == ("completed", 3, 9)
    assert [p.steps_done for p in seen] == sorted(p.steps_done for p in seen)


def test_frames_come_while_they_are_decoded(folder):
    async def work(engine):
        chunks = [chunk async for chunk in engine.frames(REQUEST)]
        return chunks, await engine.generate(REQUEST)

    chunks, video = run(folder, work)
    assert [len(chunk) for chunk in chunks] == [1, 4, 4]
    assert np.array_equal(np.concatenate(chunks), video.frames)


def test_a_loop_that_is_gone_is_told_nothing(caplog):
    """A caller leaves, and its loop ends before the job does: nothing is logged, and the engine
    serves on. The job's last frame and its end both come to a loop that is closed."""
    left, go_on = threading.Event(), threading.Event()

    def hold(frames, _span):
        left.set()
        assert go_on.wait(60)
        return frames

    with engine(hooks=sora.Hooks(check_frames=hold)) as made:
        served = sora.AsyncEngine(made)

        async def leave():
            frames = served.frames(SPRITE)
            first = asyncio.ensure_future(anext(frames))
            await asyncio.to_thread(left.wait)
            waits = asyncio.ensure_future(served.wait(made.submit(SPRITE)))
            await asyncio.sleep(0)
            first.cancel()
            waits.cancel()

        asyncio.run(leave())
        go_on.set()
        assert made.generate(SPRITE).frames.any()
    assert [line for line in caplog.messages if "raised" in line or "failed" in line] == []


def test_cancelling_a_task_cancels_its_job(folder):
    async def work(engine):
        task = asyncio.create_task(engine.generate(LONG))
        while not engine.engine.num_running:
            await asyncio.sleep(0.01)
        task.cancel()
        started = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await task
        while engine.engine.num_running:
            await asyncio.sleep(0.01)
        assert time.monotonic() - started < 20
        return await engine.generate(REQUEST)

    assert run(folder, work).frames.any()


def test_errors_are_raised_where_they_are_awaited(folder):
    async def work(engine):
        with pytest.raises(sora.RequestError, match="height"):
            await engine.generate(sora.VideoRequest("a cat", height=1, strict_grid=True))
        clip = sora.Clip("/nowhere.png")
        bad = sora.VideoRequest("a cat", clips=[clip], **SMALL)
        with pytest.raises(sora.MediaError, match=r"nowhere\.png"):
            await engine.generate(bad)
        with pytest.raises(sora.MediaError, match=r"nowhere\.png"):
            async for _ in engine.frames(bad):
                pass
        return True

    assert run(folder, work)
