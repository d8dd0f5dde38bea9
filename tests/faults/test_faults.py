"""What fails, fails alone: a job's own data, the device, memory, hooks, callbacks, a full queue."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import sora_engine as sora
from sora_engine.denoise.canvas import Canvas
from sora_engine.models.wan.model import WanTransformer
from sora_engine.runtime import executor as executor_module
from sora_engine.runtime import worker as worker_module
from sora_engine.samplers import UniPCSolver
from tests.faults.engines import comes_true, difference, engine

SMALL = {
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "num_inference_steps": 4,
    "solver": "unipc",
}


def small(seed=1, **more):
    return sora.VideoRequest("a red circle", **{**SMALL, "seed": seed, **more})


def held(made):
    """Jobs that are submitted together are admitted together: the first waits for the last."""
    return made._workers[0]._wake


def test_bad_data_in_a_batch_fails_its_own_job(monkeypatch):
    """Once in the packed part, once in the job's own: the others end as they do alone."""
    segment, step = Canvas.segment, UniPCSolver._step

    def bad_segment(self, *arguments, **options):
        if self.seed == 2 and self.step == 2:
            raise ValueError("bad tokens")
        return segment(self, *arguments, **options)

    def bad_step(self, state, i, sample, *rest):
        if i == 1 and sample.shape[1] == 3 and not sample.is_meta:
            raise ValueError("bad step")
        return step(self, state, i, sample, *rest)

    with engine() as made:
        alone = [made.generate(small(seed)) for seed in (1, 3)]
        monkeypatch.setattr(Canvas, "segment", bad_segment)
        monkeypatch.setattr(UniPCSolver, "_step", bad_step)
        with held(made):
            jobs = [made.submit(small(seed)) for seed in (1, 2, 3)]
            jobs.append(made.submit(small(4, num_frames=9)))
        with pytest.raises(sora.JobFailedError, match="ValueError: bad tokens"):
            jobs[1].result(300)
        with pytest.raises(sora.JobFailedError, match="ValueError: bad step"):
            jobs[3].result(300)
        for job, want in zip((jobs[0], jobs[2]), alone, strict=True):
            video = job.result(300)
            assert video.receipt.packed
            assert difference(video, want) < 1e-5


def test_a_device_error_fails_those_in_flight_and_the_engine_recovers(monkeypatch):
    forward = WanTransformer.forward
    left = [1]

    def broken(self, batch):
        if not batch.video.tokens.is_meta and left and left.pop():
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return forward(self, batch)

    with engine() as made:
        monkeypatch.setattr(WanTransformer, "forward", broken)
        with held(made):
            jobs = [made.submit(small(seed)) for seed in (1, 2)]
        for job in jobs:
            with pytest.raises(sora.DeviceError, match="illegal memory access"):
                job.result(300)
        assert made.generate(small()).frames.any()


def test_a_device_that_stays_broken_is_said_to_be_dead(monkeypatch):
    def broken(*_):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    with engine(max_running_jobs=1) as made:
        monkeypatch.setattr(executor_module, "denoise_step", broken)
        monkeypatch.setattr(worker_module.Worker, "_free_memory", broken)
        with held(made):
            jobs = [made.submit(small(seed)) for seed in (1, 2)]
        with pytest.raises(sora.DeviceError):
            jobs[0].result(300)
        with pytest.raises(sora.EngineDeadError, match="start a new process"):
            jobs[1].result(300)
        with pytest.raises(sora.EngineDeadError):
            made.submit(small())


def test_out_of_memory_goes_on_in_smaller_batches(monkeypatch):
    forward = WanTransformer.forward
    sizes = []

    def tight(self, batch):
        if batch.video.tokens.is_meta:
            return forward(self, batch)
        sizes.append(len(batch.video.tokens))
        if sizes[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, batch)

    # Of the first four seeds, seed 1 comes to 1.06e-5 with the native attention (sdpa: 5e-6).
    request = small(2, height=32, width=32, num_frames=33, window=sora.WindowPlan(3, 1))
    with engine() as made:
        want = made.generate(request)
        monkeypatch.setattr(WanTransformer, "forward", tight)
        video = made.generate(request)
        assert difference(video, want) < 1e-5
        assert max(sizes[-10:]) <= 16 < max(sizes)  # learnt once, and kept to
        with pytest.raises(sora.JobMemoryError, match="memory ran out"):
            made.generate(small(height=64, width=64))
        assert difference(made.generate(request), want) < 1e-5


def test_a_decode_that_runs_out_of_memory_keeps_the_latents(monkeypatch):
    def full(*_, **__):
        yield None
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")

    with engine() as made:
        want = made.generate(small())
        monkeypatch.setattr(executor_module, "decoding", full)
        job = made.submit(small())
        with pytest.raises(sora.JobMemoryError):
            job.result(300)
        assert torch.equal(job.latents, want.latents)


def test_a_deadline_ends_a_job_with_its_own_error():
    with engine(max_running_jobs=1) as made:
        slow = made.submit(small(num_inference_steps=900), deadline_s=0.3)
        queued = made.submit(small(2, num_inference_steps=1000), deadline_s=0.05)
        for job in (slow, queued):
            with pytest.raises(sora.DeadlineExceededError, match="when its deadline of"):
                job.result(300)
            assert job.state == "failed"
        assert made.submit(small(), deadline_s=1000).result(300).frames.any()
        for bad in (0, -1, float("nan"), "soon"):
            with pytest.raises(sora.RequestError, match="deadline_s"):
                made.submit(small(), deadline_s=bad)
        for bad in (9, -9, 0.5, True):
            with pytest.raises(sora.RequestError, match="priority"):
                made.submit(small(), priority=bad)


def test_hooks_refuse_requests_and_alter_or_stop_frames_before_they_leave():
    def check_request(request):
        if "red" not in request.prompt or request.clips:
            raise sora.RefusedError("no such thing here")

    spans = []

    def check_frames(frames, span):
        spans.append((span.start, span.stop))
        if span.request.seed == 13 and span.start:
            raise sora.RefusedError("not these frames")
        marked = frames.copy()
        marked[:, :4, :4] = 255
        return marked

    seen = []
    hooks = sora.Hooks(check_request=check_request, check_frames=check_frames)
    with engine(hooks=hooks) as made:
        clip = sora.Clip(np.zeros((1, 16, 16, 3), np.uint8))
        for bad in (sora.VideoRequest("a blue square", **SMALL), small(clips=[clip])):
            with pytest.raises(sora.RefusedError, match="no such thing"):
                made.submit(bad)
        job = made.submit(small(), on_frames=seen.append)
        video = job.result(300)
        assert spans == [(0, 1), (1, 5)]
        for frames in (video.frames, np.concatenate(seen)):
            assert (frames[:, :4, :4] == 255).all()
        assert job.latents is None
        assert job.preview is None
        assert video.latents.numel() == 0
        with pytest.raises(sora.RequestError, match="on_latents"):
            made.submit(small(), on_latents=print)
        seen.clear()
        stopped = made.submit(small(13), on_frames=seen.append)
        with pytest.raises(sora.RefusedError, match="not these frames"):
            stopped.result(300)
        assert [len(frames) for frames in seen] == [1]
    with engine() as made:
        assert not (made.generate(small()).frames[:, :4, :4] == 255).all()


def test_limits_on_clips_fail_the_job_that_brings_a_larger_one(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.full((32, 40, 3), 90, np.uint8)).save(path)
    request = small(clips=[sora.Clip(path)])
    with engine(max_clip_pixels=32 * 40, max_clip_bytes=16 * 16 * 3) as made:
        made.generate(request)
    for limit in ({"max_clip_pixels": 32 * 40 - 1}, {"max_clip_bytes": 16 * 16 * 3 - 1}):
        with engine(**limit) as made, pytest.raises(sora.MediaError):
            made.generate(request)


def test_previews_pass_beside_checked_frames_where_a_hook_says_so():
    def same(frames, span):
        return frames

    def darkened(preview, request):
        if request.seed == 13:
            raise sora.RefusedError("not this preview")
        return preview // 2

    def preview_of(seed: int = 7, **hooks: object) -> np.ndarray | None:
        with engine(hooks=sora.Hooks(**hooks)) as made:
            job = made.submit(small(seed))
            job.result(300)
            return job.preview

    open_ = preview_of()
    assert open_ is not None
    assert open_.max() > 50
    assert preview_of(check_frames=same) is None
    np.testing.assert_array_equal(preview_of(check_frames=same, previews=True), open_)
    checked = {"check_frames": same, "check_previews": darkened}
    np.testing.assert_array_equal(preview_of(**checked), open_ // 2)
    np.testing.assert_array_equal(preview_of(check_previews=darkened), open_ // 2)
    with pytest.raises(sora.RefusedError, match="not this preview"):
        preview_of(13, **checked)
    with pytest.raises(sora.JobFailedError, match=r"check_previews must return uint8 \[2, 2, 2, 3"):
        preview_of(check_previews=lambda preview, request: preview[:1])


def test_a_full_queue_says_when_to_try_again_and_a_cancel_frees_its_place():
    with engine(max_queued_jobs=2, max_running_jobs=1) as made:
        with held(made):
            jobs = [made.submit(small(seed)) for seed in (1, 2)]
            with pytest.raises(sora.QueueFullError, match="try again in") as told:
                made.submit(small(3))
        assert told.value.retry_after_s >= 1.0
        for job in jobs:
            job.result(300)
        long = made.submit(small(num_inference_steps=900))
        with held(made):
            queued = [
                made.submit(small(4, num_inference_steps=990)) for _ in range(2 - made.num_queued)
            ]
            queued[0].cancel()
        with pytest.raises(sora.JobCancelledError):
            queued[0].result(300)
        last = made.submit(small(5))
        for job in (long, *queued[1:]):  # a thousand steps each, which nothing waits for
            job.cancel()
        assert last.result(300).frames.any()


def test_done_callbacks_that_raise_harm_nobody():
    with engine() as made:
        job = made.submit(small())
        job.add_done_callback(lambda _: 1 / 0)
        assert job.result(300).frames.any()
        assert made.generate(small()).frames.any()


def test_nothing_is_left_after_200_jobs():
    """No job, no canvas and no tensor outlives its caller's interest."""
    with engine() as made:
        made.generate(small())
        gc.collect()
        tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
        threads = threading.active_count()
        alive = []
        for batch in range(20):
            requests = [small(seed, num_inference_steps=1, num_frames=1) for seed in range(10)]
            jobs = [made.submit(request) for request in requests]
            for i, job in enumerate(jobs):
                if i == batch % 10:
                    job.cancel()
                with contextlib.suppress(sora.JobCancelledError):
                    job.result(300)
                alive.append(weakref.ref(job))
            del job, jobs

        def gone():
            gc.collect()
            return not [ref for ref in alive if ref() is not None]

        assert comes_true(gone)
        assert sum(isinstance(o, torch.Tensor) for o in gc.get_objects()) <= tensors
        assert threading.active_count() <= threads
