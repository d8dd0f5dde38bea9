"""Sessions beside each other and beside jobs, what they hold, and how they keep time."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine.request.keys import Keys
from sora_engine.runtime import executor as executor_module
from sora_engine.runtime.recall import Moment
from sora_engine.runtime.standing import Standing
from sora_engine.runtime.worker import Worker
from sora_engine.vae.meter import StorageMeter
from tests.unit.world_folder import BUTTONS, WORLD, latents, played, same, save_world

LIMITS = sora.Limits(pack_tokens=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def engine(folder) -> Iterator[sora.Engine]:
    with sora.Engine.from_pretrained(folder, device="cpu", limits=LIMITS) as made:
        yield made


# Company.


def packed(engine: sora.Engine, monkeypatch, works) -> list:
    """What the works give, which all begin while a step of another job is under way, so that they
    are packed."""
    reached, go_on = threading.Event(), threading.Event()
    step = executor_module.denoise_step

    def gated(canvases, *rest):
        failures = step(canvases, *rest)
        if canvases[0].fps == 3 and canvases[0].step == 1:
            reached.set()
            assert go_on.wait(60)
        return failures

    monkeypatch.setattr(executor_module, "denoise_step", gated)
    first = engine.submit(
        sora.VideoRequest("a cat", height=32, width=32, num_frames=1, num_inference_steps=2, fps=3)
    )
    assert reached.wait(60)
    found = [None] * len(works)

    def run(i: int) -> None:
        found[i] = works[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    while engine.num_queued < len(works):
        threading.Event().wait(0.005)
    go_on.set()
    for thread in threads:
        thread.join(60)
    first.result(60)
    return found


def test_sessions_and_a_job_in_one_pack_are_each_as_alone(engine, monkeypatch):
    job = sora.VideoRequest("a cat", height=32, width=48, num_frames=5, seed=1)
    video = engine.generate(job)
    with engine.open_session(WORLD) as one, engine.open_session(replace(WORLD, seed=8)) as two:
        played(one, "right*3 act left*3")
        played(two, "down")
        alone = []
        for world, text in ((one, "left"), (two, "up")):
            mark = world.mark()
            assert world.stats.company == 1
            played(world, text)
            alone.append(latents(world))
            world.rewind(mark)
        *_, together = packed(
            engine,
            monkeypatch,
            [
                lambda: one.step(sora.Action("left")),
                lambda: two.step(sora.Action("up")),
                lambda: engine.generate(job),
            ],
        )
        assert min(one.stats.company, two.stats.company) >= 3
        assert together.receipt.most_in_company >= 3
        for world, expected in zip((one, two), alone, strict=True):
            assert (latents(world) - expected).norm() / expected.norm() < 1e-5
        error = (together.latents - video.latents).norm() / video.latents.norm()
        assert error < 1e-5


def test_an_exact_session_is_packed_with_nobody(engine, monkeypatch):
    exact = replace(WORLD, exact=True)
    with engine.open_session(exact) as one, engine.open_session(replace(exact, seed=8)) as two:
        played(one, "right")
        mark = one.mark()
        expected = played(one, "act")
        one.rewind(mark)
        frames, _ = packed(
            engine, monkeypatch, [lambda: one.step(sora.Action("act")), lambda: two.step()]
        )
        assert np.array_equal(frames, expected[0])
        assert one.stats.company == two.stats.company == 1


def test_a_step_waits_for_no_place_among_jobs(folder):
    limits = replace(LIMITS, max_running_jobs=1)
    with (
        sora.Engine.from_pretrained(folder, device="cpu", limits=limits) as engine,
        engine.open_session(WORLD) as world,
    ):
        job = engine.submit(
            sora.VideoRequest("a cat", height=32, width=32, num_frames=1, num_inference_steps=900)
        )
        played(world, "right*3")
        assert not job.done()
        job.cancel()


# Memory.


def test_what_one_session_makes_the_other_sees(engine):
    with engine.open_session(WORLD) as one:
        played(one, "right act")
        here = replace(WORLD, seed=9, place=(0.0, 40.0))
        with engine.open_session(here, memory=one.memory) as two:
            assert two.memory is one.memory
            stays = two.mark()
            played(two, "left")  # where the other's view ended
            with engine.open_session(here) as by_itself:
                assert np.array_equal(by_itself.frames, stays.standing_for(two, 0).frames)
                played(by_itself, "left")
                assert not torch.equal(latents(by_itself), latents(two))
            known = one.stats.num_places
            assert two.stats.num_places == known == 4 * 9
            two.rewind(stays)  # what the other has seen stays seen
            assert one.stats.num_places == known
            # What the other has seen since is recalled, though one's own context shows it too.
            for text, place, seen in (
                ("still", 1.0, []),
                ("", 1.0, []),
                ("right*2", 4.0, [4.0]),
            ):
                played(one, text)
                picked = one.memory.index.pick((0.0, place), 4, one._standing.context)
                assert [m.place[1] for m in picked] == seen
            two.step()
            picked = one.memory.index.pick((0.0, 3.0), 4, one._standing.context)
            assert [m.place[1] for m in picked] == [5.0]
    with pytest.raises(sora.SessionError, match="cannot be shared"):
        engine.open_session(replace(WORLD, height=48), memory=one.memory)


def test_a_memory_keeps_to_its_room(engine):
    room = 24 * 1024
    with engine.open_session(replace(WORLD, memory_bytes=room)) as world:
        for _ in range(6):
            played(world, "right*3 down")
            assert world.memory.nbytes <= room
        stats = world.stats
        assert stats.num_lost > 0
        assert stats.num_moments <= 22
        assert stats.num_places + stats.num_lost >= 100


def live_bytes() -> int:
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    # (Plain ones alone: other tests leave such about as have no storage.)
    plain = [
        x.untyped_storage()
        for x in tensors
        if type(x) in (torch.Tensor, torch.nn.Parameter)
        and not x.is_mkldnn
        and x.layout is torch.strided
        and x.device.type == "cpu"
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in plain}.values())


def walk(engine: sora.Engine, steps: int, every: int) -> list[int]:
    rng = random.Random(0)
    found = []
    small = replace(
        WORLD, num_inference_steps=1, first_steps=1, memory_bytes=24 * 1024, rewind=3, recall=1
    )
    with engine.open_session(small) as world:
        for k in range(steps):
            world.step(sora.Action(rng.choice(BUTTONS)))
            world.mark()
            if k % every == every - 1:
                found.append(live_bytes())
    return found


def test_steps_keep_memory_flat(engine):
    held = walk(engine, 500, 100)
    assert max(held) - min(held) < 64 * 1024, held


@pytest.mark.slow
def test_ten_thousand_steps_keep_memory_flat(engine):
    held = walk(engine, 10_000, 1000)
    assert max(held) - min(held) < 64 * 1024, held


def test_sessions_that_end_leave_nothing(engine):
    worker, planner = engine._workers[0], engine._planner
    with engine.open_session(replace(WORLD, first_steps=1)):
        pass  # what an engine makes once
    threads, limit, before = threading.active_count(), planner.limit, live_bytes()
    kept = None
    for i in range(200):
        world = engine.open_session(replace(WORLD, first_steps=1, seed=i))
        if i % 50 < 2:
            world.step()
            kept = world.mark()
        if i % 2:
            world.close()
            assert i % 50 > 1 or kept.forgotten
        del world
    gc.collect()
    assert threading.active_count() == threads
    assert planner.limit == limit
    assert not worker.jobs
    for _ in range(200):
        if not worker.executor._packer._layouts:
            break
        threading.Event().wait(0.01)
    del kept
    assert live_bytes() - before < 64 * 1024
    for kind in (sora.Session, Standing, Moment):
        assert not [x for x in gc.get_objects() if isinstance(x, kind)], kind


@pytest.mark.parametrize("change", [{}, {"guidance_scale": 2.0, "recall": 5, "rewind": 9}])
def test_a_plan_is_kept_to(engine, monkeypatch, change):
    """Live tensors above the idle engine's, as the engine's thread makes them, at their most."""
    request = replace(WORLD, memory_bytes=20_000, rewind=2)
    request = replace(request, **change)
    with engine.open_session(request) as world:
        played(world, "right")  # layers lay their weights out when they first run
    plan, turn = engine.plan(request), Worker.turn
    before = [
        x for x in gc.get_objects() if isinstance(x, torch.Tensor) and torch._C._has_storage(x)
    ]
    meter, idle = StorageMeter(before), live_bytes()

    def metered(worker: Worker) -> None:
        with meter:
            turn(worker)

    monkeypatch.setattr(Worker, "turn", metered)
    with engine.open_session(request) as world:
        for k in range(4):
            played(world, "right*3 down act")
            world.step(sora.Action(prompt="a red circle moves left"[: 5 + 6 * k]))
        monkeypatch.setattr(Worker, "turn", turn)
        held = live_bytes() - idle
        assert world.stats.bytes_held <= plan.held
    assert 0.3 * plan.held < held <= plan.held
    assert 0.3 * plan.peak < meter.peak <= plan.peak


# Time.


def test_a_stream_gives_each_tick_when_it_is_due(engine):
    now = [0.0]
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    keys = Keys(clock=lambda: now[0])
    with engine.open_session(WORLD) as world:
        keys.press("right")
        keys.tap("act")
        shown = []
        for tick in world.stream(keys, fps=16, clock=lambda: now[0], sleep=sleep):
            shown.append(tick)
            if len(shown) == 2:
                now[0] += 0.3  # whoever shows them takes more than a latent frame's time
                keys.release("right")
            if len(shown) == 4:
                keys.stop()
        assert [sorted(t.action.press) for t in shown] == [["act", "right"], ["right"], [], []]
        assert [t.step for t in shown] == [1, 2, 3, 4]
        # Each begins `RESERVE_S` before it is due, as making one takes no time by this clock.
        assert slept == pytest.approx([0.23, 0.02, 0.18, 0.02, 0.23])
        assert [round(t.late_s, 3) for t in shown] == [0, 0, 0.05, 0]
        assert shown[0].frames.shape == (4, 32, 32, 3)
        stats = world.stats
        assert (stats.late, stats.stalls, stats.num_steps) == (1, 0, 4)
        assert stats.fps > 0
        assert 0 < stats.step_ms <= stats.step_p95_ms
        actions = world.actions.parse("left*2")
        assert [t.action for t in world.stream(actions, fps=1000)] == actions


def test_a_session_is_awaited(folder, tmp_path):
    async def play() -> None:
        async with await sora.AsyncEngine.from_pretrained(
            folder, device="cpu", limits=LIMITS
        ) as engine:
            async with await engine.open_session(WORLD) as one:
                two = await engine.open_session(WORLD)
                a, b = await asyncio.gather(one.step(sora.Action("act")), two.step())
                assert a.shape == b.shape == (4, 32, 32, 3)
                mark = one.mark()
                with one.record(tmp_path / "play.mp4"):
                    async for tick in one.stream([sora.Action("left")] * 2, fps=500):
                        assert tick.frames.shape == (4, 32, 32, 3)
                last = one.frames
                await one.rewind(mark)
                async with await one.branch() as twin:
                    await twin.step(sora.Action("left"))
                    assert np.array_equal(await twin.step(sora.Action("left")), last)
                await one.save(tmp_path / "a.world")
                task = asyncio.create_task(one.step())
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await two.close()
            reopened = await engine.reopen_session(tmp_path / "a.world")
            await reopened.step(sora.Action("left"))
            assert np.array_equal(await reopened.step(sora.Action("left")), last)
            again = [frames async for frames in engine.replay(tmp_path / "play.mp4")]
            assert np.array_equal(again[-1], last)

    asyncio.run(play())


def test_a_step_that_is_cancelled_never_was(engine, monkeypatch):
    step = executor_module.denoise_step
    with engine.open_session(WORLD) as world:
        played(world, "right")
        mark = world.mark()
        expected = played(world, "act")
        world.rewind(mark)

        def cancelled(canvases, *rest):
            world.cancel()
            return step(canvases, *rest)

        monkeypatch.setattr(executor_module, "denoise_step", cancelled)
        with pytest.raises(sora.JobCancelledError):
            world.step(sora.Action("act"))
        monkeypatch.setattr(executor_module, "denoise_step", step)
        assert world.num_steps == 1
        assert same(expected, played(world, "act"))
