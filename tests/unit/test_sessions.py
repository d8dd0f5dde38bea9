"""Sessions: the latents that a rollout laid out by hand gives, marks, files, company, memory."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine.denoise.drive import sight
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.request.keys import Keys
from sora_engine.runtime import executor as executor_module
from sora_engine.runtime.recall import Moment
from sora_engine.runtime.session_step import seed_of_step
from sora_engine.runtime.standing import Standing
from sora_engine.samplers.noise import initial_noise, noise_for
from sora_engine.vae.decoding import to_uint8
from tests.unit.world_folder import BUTTONS, MOVES, save_world

WALK = "right*2 act down right act left*3 up*2 act"
LIMITS = sora.Limits(pack_tokens=512)
WORLD = sora.SessionRequest("a red circle", seed=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def engine(folder) -> Iterator[sora.Engine]:
    with sora.Engine.from_pretrained(folder, device="cpu", limits=LIMITS) as made:
        yield made


def played(world: sora.Session, text: str) -> list[np.ndarray]:
    return [world.step(action) for action in world.actions.parse(text)]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    assert len(one) == len(other) > 0
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def latents(world: sora.Session) -> torch.Tensor:
    return world._standing.context[-1].latent


# What a step is.


def by_hand(engine: sora.Engine, text: str, seed: int, context: int = 2, recall: int = 2):
    """A rollout from the transformer's segments alone: latents `[C, 1, H, W]` and frames."""
    model = engine.loaded_model
    transformer, packer = model.transformer(0), Packer((1, 2, 2), torch.device("cpu"))
    (words,) = transformer.encode_contexts(model.prompt_encoder.encode(["a red circle"]))
    made, rows, places, frames, state = [], [], [], [], None
    seen: dict[tuple[int, int], int] = {}
    actions = [None, *text]
    for k, button in enumerate(actions):
        down, right = MOVES.get(button, (0, 0))
        place = (places[-1][0] + down / 8, places[-1][1] + right / 8) if k else (0.0, 0.0)
        cells = {((place[0] + r) % 20, (place[1] + c) % 20) for r in range(4) for c in range(4)}
        before = list(range(max(0, k - context), k))
        owners = [seen[cell] for cell in cells if cell in seen and seen[cell] not in before]
        often = sorted(set(owners), key=lambda i: (owners.count(i), i), reverse=True)
        picked = sorted(often[:recall])
        rows.append([float(button == name) for name in BUTTONS])
        places.append(place)
        shown = [*picked, *before]
        steps = 2 if k else 3
        levels = [1 - i / steps for i in range(steps + 1)]
        own = seed if k == 0 else seed_of_step(seed, k)
        sample = initial_noise(own, (16, 1, 4, 4))
        told = torch.tensor([places[i] for i in [*shown, k]])
        near = (told - torch.tensor(place) + 10) % 20 - 10
        for i in range(steps):
            segment = Segment(
                torch.cat([*(made[j] for j in shown), sample], dim=1),
                torch.tensor([0.0] * len(shown) + [1000 * levels[i]]),
                ((words, len(shown) + 1),),
                sees=sight(len(picked), len(before)),
                num_anchors=len(picked),
                actions=torch.tensor([rows[j] for j in [*shown, k]]),
                places=near,
            )
            batch = packer.pack([segment])
            with torch.inference_mode():
                (predicted,) = packer.unpack(transformer(batch), batch, 16)
            clean = sample - levels[i] * predicted[:, -1:]
            fresh = noise_for(own, i, (16, len(before) + 1, 4, 4))[:, -1:]
            sample = (1 - levels[i + 1]) * clean + levels[i + 1] * fresh
        made.append(sample)
        seen |= dict.fromkeys(cells, k)
        with torch.inference_mode():
            chunk, state = model.vae.decode_chunk(sample[None], state)
        frames.append(to_uint8(chunk[0]).numpy())
    return made, frames


def test_a_session_is_the_rollout_that_is_laid_out_by_hand(engine):
    buttons = ["right", "right", "right", "act", "left", "left", "left", "down", "up", "up", "act"]
    expected, frames = by_hand(engine, buttons, seed=7)
    with engine.open_session(WORLD) as world:
        found, shown = [latents(world)], [world.frames]
        for button in buttons:
            shown.append(world.step(sora.Action(button)))
            found.append(latents(world))
        assert world.place == (-8.0, 0.0)
        assert world.log[:2] == [(sora.Action("right"), 3), (sora.Action("act"), 1)]
    for k, (own, reference) in enumerate(zip(found, expected, strict=True)):
        assert (own - reference).norm() / reference.norm() < 1e-5, k
    for own, reference in zip(shown, frames, strict=True):
        assert own.shape == reference.shape
        assert abs(own.astype(int) - reference).max() <= 1  # a rounding of a latent may be another
    assert [len(chunk) for chunk in shown] == [1] + [4] * len(buttons)


def test_the_first_frame_is_the_picture_of_its_seed(engine):
    picture = engine.generate(
        sora.VideoRequest("a red circle", seed=7, num_frames=1, sigmas=[1.0, 2 / 3, 1 / 3])
    )
    with engine.open_session(WORLD) as world:
        assert np.array_equal(world.frames, picture.frames)
        given = replace(WORLD, first=picture.frames[0], seed=3)
    with engine.open_session(given) as world:
        assert world.frames.shape == (1, 32, 32, 3)
        first = latents(world)
    video = torch.from_numpy(picture.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.inference_mode():
        assert torch.equal(engine.loaded_model.vae.encode(video)[0], first)


def test_each_of_its_inputs_counts(engine):
    way = "right*2 act left*3"

    def last(request: sora.SessionRequest, text: str = way) -> torch.Tensor:
        with engine.open_session(request) as world:
            played(world, text)
            return latents(world)

    usual = last(WORLD)
    assert torch.equal(last(WORLD), usual)
    for other in (
        {"seed": 8},
        {"prompt": "a blue square"},
        {"context": 1},
        {"recall": 0},
        {"num_inference_steps": 3},
        {"guidance_scale": 3.0, "negative_prompt": "blue"},
        {"solver": "euler"},
        {"sigmas": [1.0, 0.6]},
        {"memory_bytes": 0},
    ):
        assert not torch.equal(last(replace(WORLD, **other)), usual), other
    assert not torch.equal(last(WORLD, way + " left"), last(WORLD, way + " right"))
    with engine.open_session(WORLD) as world:
        played(world, "right*2 act left*2")
        world.step(sora.Action("left", prompt="a blue square"))
        assert world.prompt == "a blue square"
        assert not torch.equal(latents(world), usual)


# The past.


@pytest.mark.parametrize("seed", range(3))
def test_from_a_mark_the_same_actions_make_the_same_bytes(engine, seed):
    rng = random.Random(seed)
    words = [rng.choice(BUTTONS) for _ in range(12)]
    with engine.open_session(replace(WORLD, seed=seed)) as world:
        for _ in range(3):
            played(world, " ".join(words[: rng.randrange(1, 12)]))
            mark, m = world.mark(), rng.randrange(1, 10)
            then, stats, place = world.frames, world.stats, world.place
            way = " ".join(rng.choice(BUTTONS) for _ in range(m))
            once = played(world, way)
            memory = world.stats.num_places
            world.rewind(mark)
            assert np.array_equal(world.frames, then)
            assert (world.stats.num_places, world.place) == (stats.num_places, place)
            assert same(once, played(world, way))
            assert world.stats.num_places == memory
            world.rewind(steps=m)
            assert same(once, played(world, way))
            with world.branch(mark) as twin:
                assert twin.num_steps == mark.step
                assert same(once, played(twin, way))
                assert same(played(world, "act"), played(twin, "act"))
            world.rewind(mark)
            assert not same(once, played(world, " ".join(["still"] * m)))


def test_going_back_leads_to_what_was_before_that(engine):
    with engine.open_session(WORLD) as world:
        played(world, "right*4")
        early = world.mark()
        late = played(world, "left act*3")
        world.rewind(early)
        world.rewind(steps=2)  # what lay before the mark is still kept
        assert world.num_steps == 2
        world.rewind(early)
        assert same(late, played(world, "left act*3"))
        world.rewind(steps=0)
        assert world.num_steps == 8
    short = replace(WORLD, rewind=1)
    with engine.open_session(short) as world:
        played(world, "right*4")
        world.rewind(steps=1)
        with pytest.raises(
            sora.MarkError, match=r"1 steps back .* the oldest step .* is 3, 0 back"
        ):
            world.rewind(steps=1)


def test_a_saved_session_goes_on_in_another_process(engine, folder, tmp_path):
    path = tmp_path / "meadow.world"
    with engine.open_session(replace(WORLD, guidance_scale=2.0)) as world:
        played(world, WALK)
        mark = world.mark()
        world.step(sora.Action(prompt="a blue square"))
        assert world.save(path) == path
        world.save(tmp_path / "mark.world", mark)
        expected = played(world, "left act right*4")
        world.rewind(mark)
        from_mark = played(world, "up*2")
    code = f"""
import hashlib, sys
import numpy as np
import sora_engine as sora
engine = sora.Engine.from_pretrained({str(folder)!r}, device="cpu")
with engine.open_session(sora.SessionRequest("a cat")) as other:
    other.step()
with engine.reopen_session({str(path)!r}) as world:
    assert world.num_steps == 13 and world.prompt == "a blue square", world.log
    frames = [world.step(action) for action in world.actions.parse("left act right*4")]
print(hashlib.sha256(np.concatenate(frames).tobytes()).hexdigest())
engine.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    import hashlib

    digest = hashlib.sha256(np.concatenate(expected).tobytes()).hexdigest()
    assert done.stdout.strip() == digest
    with engine.reopen_session(tmp_path / "mark.world") as world:
        assert same(from_mark, played(world, "up*2"))
        with pytest.raises(sora.MarkError, match="the oldest step that is kept is 12, 2 back"):
            world.rewind(steps=3)


def test_a_recording_is_made_again_from_its_actions(engine, tmp_path):
    path, again = tmp_path / "play.mp4", tmp_path / "again.mp4"
    with engine.open_session(WORLD) as world:
        played(world, "right*3")
        with world.record(path):
            shown = played(world, "act right*2")
            world.rewind(steps=2)
            shown += [world.step(sora.Action("down", prompt="a blue square"))]
            assert not path.exists()
        played(world, "up")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["play.mp4"]
    frames = list(engine.replay(path, record=again))
    assert same(shown, frames)
    assert again.read_bytes() == path.read_bytes()
    from sora_engine.io.provenance import read_provenance
    from sora_engine.io.video_reader import read_video

    video, fps = read_video(path)[:2]
    assert (len(video), fps) == (16, 16)
    said = read_provenance(path)
    assert (said.prompt, said.seed) == ("a red circle", 7)
    assert said.settings["session"]["parts"][1] == [
        [[{"press": ["right"]}, 3], [{"press": ["act"]}, 1]],
        [[{"press": ["down"], "prompt": "a blue square"}, 1]],
    ]
    assert said.settings["session"]["alone"] is True


def test_a_recording_from_a_picture_holds_it(engine, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    with engine.open_session(replace(WORLD, first=picture)) as world:
        picture[:] = 0  # the session has its own
        with world.record(tmp_path / "play.mp4"):
            shown = played(world, "right act")
    assert same(shown, list(engine.replay(tmp_path / "play.mp4")))
    with engine.open_session(replace(WORLD, first=picture)) as world:
        assert not same(shown, played(world, "right act"))


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
    plain = [x.untyped_storage() for x in tensors if not x.is_mkldnn and x.device.type == "cpu"]
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


def test_a_plan_is_kept_to(engine):
    request = replace(WORLD, memory_bytes=20_000, rewind=2, guidance_scale=2.0)
    plan = engine.plan(request)
    before = live_bytes()
    with engine.open_session(request) as world:
        for _ in range(4):
            played(world, "right*3 down act")
        assert live_bytes() - before <= plan.held
        assert world.stats.bytes_held <= plan.held
    assert plan.peak > plan.held


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
        assert slept == pytest.approx([0.25, 0.2])
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


def test_a_session_is_told_as_json(engine):
    with engine.open_session(replace(WORLD, exact=True)) as world:
        said = json.loads(json.dumps(world.settings.to_json()))
        assert set(said) == set(sora.SessionRequest.__slots__) - {"first"}
