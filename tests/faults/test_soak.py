"""Mixed requests at concurrency 16, with cancels, deadlines and bad requests among them."""

from __future__ import annotations

import gc
import random
import threading
import time

import numpy as np
import pytest
import torch

import sora_engine as sora
from tests.faults.engines import comes_true, difference, engine, random_request

CONCURRENCY = 16
BAD = (
    {"height": 17},
    {"num_frames": 6},
    {"num_inference_steps": 0},
    {"seed": -1},
    {"guidance_scale": float("nan")},
    {"clips": [sora.Clip("/nowhere.png")]},
)


class Soak:
    """Callers, each with one request at a time, and what became of each request."""

    def __init__(self, made: sora.Engine, rng: random.Random, pool: int) -> None:
        self.engine, self.rng = made, rng
        self.requests = [random_request(rng, most=48, steps=4) for _ in range(pool)]
        self.alone: dict[int, torch.Tensor] = {}
        self.ended: list[str] = []
        self.worst = 0.0
        self.wrong: list[object] = []
        self.lock = threading.Lock()

    def draw(self) -> tuple[int, str, float]:
        with self.lock:
            kind = self.rng.choices(["good", "cancel", "deadline", "bad"], [70, 15, 8, 7])[0]
            return self.rng.randrange(len(self.requests)), kind, self.rng.random()

    def one(self) -> None:
        index, kind, chance = self.draw()
        request = self.requests[index]
        try:
            if kind == "bad":
                bad = {
                    **{"height": 16, "width": 16, "num_frames": 1},
                    **BAD[int(chance * len(BAD))],
                }
                job = self.engine.submit(sora.VideoRequest("x", **bad))
                job.result(300)
            elif kind == "deadline":
                job = self.engine.submit(request, deadline_s=0.001 + 0.1 * chance)
            else:
                job = self.engine.submit(request, priority=index % 3 - 1)
            if kind == "cancel":
                time.sleep(0.3 * chance)
                job.cancel()
            video = job.result(300)
            outcome = "completed"
        except sora.JobCancelledError:
            outcome = "cancelled"
        except sora.DeadlineExceededError:
            outcome = "late"
        except (sora.RequestError, sora.MediaError):
            outcome = "refused"
        allowed = {
            "good": {"completed"},
            "cancel": {"cancelled", "completed"},
            "deadline": {"late", "completed"},
            "bad": {"refused"},
        }
        states = {"completed": "completed", "cancelled": "cancelled", "late": "failed"}
        with self.lock:
            self.ended.append(outcome)
            if outcome not in allowed[kind]:
                self.wrong.append((kind, outcome, request))
            if outcome in states and job.state != states[outcome]:
                self.wrong.append((outcome, job.state))
            if outcome == "completed":
                self.compare(index, video)

    def compare(self, index: int, video: sora.Video) -> None:
        error = difference(video, self.alone[index])
        self.worst = max(self.worst, error)
        if not error <= 1e-5:
            self.wrong.append(("pixels differ", error, self.requests[index], video.receipt))

    def run(self, more: object) -> None:
        """Callers take requests while `more()` says so."""

        def caller() -> None:
            while more():
                self.one()

        threads = [threading.Thread(target=caller) for _ in range(CONCURRENCY)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def tensor_bytes() -> int:
    gc.collect()
    found = {
        o.untyped_storage()._cdata: o.untyped_storage().nbytes()
        for o in gc.get_objects()
        if isinstance(o, torch.Tensor) and o.layout is torch.strided and not o.is_mkldnn
    }
    return sum(found.values())


def soak(pool: int, count: int | None, seconds: float | None) -> Soak:
    before = set(threading.enumerate())
    with engine(max_queued_jobs=64) as made:
        run = Soak(made, random.Random(11), pool)
        run.alone = {i: made.generate(r).latents for i, r in enumerate(run.requests)}
        began, left, lock = time.monotonic(), [count], threading.Lock()

        def more() -> bool:
            if seconds is not None:
                return time.monotonic() - began < seconds
            with lock:
                left[0] -= 1
                return left[0] >= 0

        if seconds is not None:  # memory is flat from here on
            run.run(lambda: len(run.ended) < 100)
        idle = tensor_bytes()
        run.run(more)
        assert made.num_queued == made.num_running == 0
        assert comes_true(lambda: tensor_bytes() <= idle + (1 << 16))
    assert set(threading.enumerate()) == before
    assert not run.wrong, run.wrong[:3]
    print({name: run.ended.count(name) for name in sorted(set(run.ended))}, f"{run.worst:.1e}")
    return run


def test_a_short_soak():
    run = soak(pool=6, count=30, seconds=None)
    assert len(run.ended) == 30
    assert {"completed", "refused"} <= set(run.ended)


@pytest.mark.slow
def test_300_mixed_requests():
    run = soak(pool=30, count=300, seconds=None)
    assert len(run.ended) == 300
    assert set(run.ended) == {"completed", "cancelled", "late", "refused"}


@pytest.mark.slow
def test_five_minutes():
    run = soak(pool=30, count=None, seconds=300)
    assert len(run.ended) > 300


@pytest.mark.parametrize("times", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_cancelled_in_every_state_at_random_moments(times):
    """Gone within one step or one latent frame of work; then a run that is the same to the bit."""
    rng = random.Random(5)
    rest = {"height": 48, "width": 48, "num_inference_steps": 3, "seed": 1}
    frames = np.zeros((13, 48, 48, 3), np.uint8)
    long = {"num_frames": 17, "num_inference_steps": 300}
    kinds = {
        "queued": [long],
        "encoding": [{"num_frames": 13, "init": frames}],
        "denoising": [long],
        "decoding": [{"num_frames": 33}, {"num_frames": 16, "loop": True}],
    }
    states = set()
    with engine(max_running_jobs=2) as made:
        request = sora.VideoRequest("a red circle", **{**rest, "num_frames": 9})
        want = made.generate(request)
        turns, turn = [], made._workers[0].turn
        watched, wanted, reached, go_on = [], "", threading.Event(), threading.Event()

        def watched_turn():
            turns.append(1)
            turn()
            if any(job.state == wanted for job in watched) and not reached.is_set():
                reached.set()
                if gated:  # not at a random moment, but in this state for sure
                    go_on.wait(60)

        made._workers[0].turn = watched_turn
        for i in range(times):
            gated = i < len(kinds)
            wanted = list(kinds)[i % len(kinds)]
            reached.clear()
            go_on.clear()
            # A third job keeps two running, so that one is queued.
            count = 3 if i % 3 == 0 or wanted == "queued" else 1
            jobs = watched = [
                made.submit(sora.VideoRequest("x", **{**rest, **rng.choice(kinds[wanted])}))
                for _ in range(count)
            ]
            assert reached.wait(60), wanted
            if not gated:
                time.sleep(rng.uniform(0, 0.02))
            for job in jobs:
                states.add(str(job.state))
                job.cancel()
            asked = len(turns)
            go_on.set()
            for job in jobs:
                try:
                    job.result(60)
                except sora.JobCancelledError:
                    assert job.state == "cancelled"
            # The turn that was under way, and the one that sees the cancel.
            assert len(turns) - asked <= 2
            watched = []
        assert made.num_running == made.num_queued == 0
        again = made.generate(request)
        assert torch.equal(again.latents, want.latents)
        assert np.array_equal(again.frames, want.frames)
    assert {"queued", "encoding", "denoising", "decoding"} <= states
