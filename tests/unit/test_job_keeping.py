"""What a job leaves on the disk while it runs, and what it holds of its frames."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import sora_engine as sora
from tests.faults.engines import engine

REQUEST = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 5, "seed": 3}


def kept_at(tmp_path, **options: object) -> list[int]:
    """The steps that `save_to` was written after."""
    path = tmp_path / "job.safetensors"
    seen: list[int] = []

    def look(progress: sora.Progress) -> None:
        if path.exists():
            seen.append(progress.steps_done)
            path.unlink()

    with engine() as made:
        job = made.submit(
            sora.VideoRequest("a red circle", **REQUEST),
            save_to=path,
            on_progress=look,
            **options,
        )
        job.result(60)
    return seen


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"save_every": 2}, [2, 4, 5]),
        ({"save_every": 100}, [5]),
        ({"save_every_s": 1000.0}, [5]),
        ({"save_every_s": 1e-9}, [1, 2, 3, 4, 5]),
        ({"save_every": 2, "save_every_s": 1e-9}, [2, 4, 5]),
        ({"save_every_s": 1000.0, "save_last_s": 1000.0}, []),
        ({"save_every_s": 1000.0, "save_last_s": 1e-9}, [5]),
        ({"save_last_s": 1000.0}, [1, 2, 3, 4]),
    ],
)
def test_a_job_is_saved_as_often_as_asked_and_after_its_last_step(tmp_path, options, steps):
    assert kept_at(tmp_path, **options) == steps


def test_seconds_count_from_the_last_time(tmp_path, monkeypatch):
    """By a clock that goes 10 s a step."""
    from sora_engine.runtime import job, saving

    now = [0.0]

    class Steady:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    monkeypatch.setattr(saving, "time", Steady)
    monkeypatch.setattr(
        sora.Job, "begin", lambda self, canvas: (begin(self, canvas), setattr(self, "kept_at", 0.0))
    )
    monkeypatch.setattr(job.Job, "count_step", lambda self: (count(self), advance(self)))

    def advance(job: sora.Job) -> None:
        now[0] += 10.0
        job.unkept_s = now[0] - job.kept_at  # as where it works alone

    assert kept_at(tmp_path, save_every_s=15.0) == [2, 4, 5]
    now[0] = 0.0
    assert kept_at(tmp_path, save_every_s=15.0, save_last_s=10.0) == [2, 4, 5]
    now[0] = 0.0
    assert kept_at(tmp_path, save_every_s=15.0, save_last_s=11.0) == [2, 4]


begin, count = sora.Job.begin, sora.Job.count_step


def test_a_jobs_work_is_its_share_of_the_time_of_its_steps(monkeypatch):
    """By a clock that goes 12 s a step: alone it is all of them, of two alike each has half."""
    from sora_engine.runtime import executor, worker

    now = [0.0]

    class Steady:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    plain = executor.LocalExecutor.step

    def step(self, canvases, limit):
        now[0] += 12.0
        return plain(self, canvases, limit)

    monkeypatch.setattr(worker, "time", Steady)
    monkeypatch.setattr(executor.LocalExecutor, "step", step)
    request = sora.VideoRequest("a red circle", **REQUEST)
    with engine() as made:
        alone = made.submit(request)
        alone.result(60)
        hold = threading.Event()
        first = made.submit(request, on_progress=lambda _told: hold.wait(60))
        second = made.submit(request)
        hold.set()
        first.result(60), second.result(60)
    assert alone.unkept_s == 60.0
    together = [job.result().receipt.most_in_company for job in (first, second)]
    assert together == [2, 2]
    assert first.unkept_s + second.unkept_s == pytest.approx(now[0] - 60.0)
    assert 30.0 <= first.unkept_s < 60.0


def test_frames_that_were_given_are_not_held():
    given: list[np.ndarray] = []
    request = sora.VideoRequest("a red circle", **REQUEST)
    with engine() as made:
        want = made.generate(request)
        video = made.submit(request, on_frames=given.append, keep_frames=False).result(60)
        assert video.frames.shape == (0, 32, 32, 3)
        assert np.array_equal(np.concatenate(given), want.frames)
        assert np.array_equal(video.latents, want.latents)
        assert video.receipt.seed == want.receipt.seed
        for options, said in (
            ({"keep_frames": False}, "on_frames must take the frames"),
            ({"keep_frames": "no", "on_frames": given.append}, "keep_frames must be True or False"),
            ({"save_every_s": 0}, "save_every_s must be over 0"),
            ({"save_last_s": -1}, "save_last_s must be seconds, 0 or more, got -1"),
        ):
            with pytest.raises(sora.RequestError, match=said):
                made.submit(request, **options)
