"""The engine as callers see it: jobs, progress, cancellation, errors that stay where they are."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sora_engine as sora
from sora_engine.models import video_model
from sora_engine.models.wan.model import WanTransformer
from sora_engine.runtime import executor as executor_module
from tests.parity.oracles import tiny_pipeline
from tests.unit.test_checkpoint import original_name

SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ti2v")
    tiny_pipeline("ti2v-5b", 0).save_pretrained(path)
    return path


@pytest.fixture
def engine(folder):
    with sora.Engine.from_pretrained(folder, device="cpu") as made:
        yield made


def test_a_job_counts_finished_work_and_hands_out_frames_as_they_come(engine):
    chunks = []
    job = engine.submit(sora.VideoRequest("a cat", **SMALL), on_frames=chunks.append)
    video = job.result(timeout_s=60)
    assert job.done()
    assert job.state == "completed"
    progress = job.progress
    assert (progress.steps_done, progress.num_steps) == (3, 3)
    assert (progress.frames_decoded, progress.num_frames) == (5, 5)
    assert [len(chunk) for chunk in chunks] == [1, 4]
    assert np.array_equal(np.concatenate(chunks), video.frames)
    assert video.frames.dtype == np.uint8
    assert video.frames.shape == (5, 32, 32, 3)
    assert video.latents.dtype == torch.float32
    assert video.latents.shape == (48, 2, 2, 2)
    assert set(video.timings_s) >= {"queued", "encoding", "denoising", "decoding"}


def test_the_same_request_gives_the_same_bits(engine):
    request = sora.VideoRequest("a cat", **SMALL)
    first, second = engine.generate(request), engine.generate(request)
    assert torch.equal(first.latents, second.latents)
    assert np.array_equal(first.frames, second.frames)
    other = engine.generate(sora.VideoRequest("a cat", **{**SMALL, "seed": 2}))
    assert not torch.equal(first.latents, other.latents)


def test_initial_noise_can_be_given(engine):
    noise = torch.randn(1, 48, 2, 2, 2, generator=torch.Generator().manual_seed(1))[0]
    given = engine.generate(sora.VideoRequest("a cat", latents=noise, **{**SMALL, "seed": 77}))
    drawn = engine.generate(sora.VideoRequest("a cat", **SMALL))
    assert torch.equal(given.latents, drawn.latents)


def test_cancel_while_denoising_stops_within_a_step(engine, monkeypatch):
    reached, go_on = threading.Event(), threading.Event()
    step = executor_module.denoise_step

    def gated(canvases, *rest):
        failures = step(canvases, *rest)
        if canvases[0].step == 2:
            reached.set()
            go_on.wait(30)
        return failures

    monkeypatch.setattr(executor_module, "denoise_step", gated)
    job = engine.submit(sora.VideoRequest("a cat", **{**SMALL, "num_inference_steps": 50}))
    assert reached.wait(30)
    job.cancel()
    go_on.set()
    with pytest.raises(sora.JobCancelledError, match="while denoising"):
        job.result(timeout_s=30)
    assert job.state == "cancelled"
    assert job.progress.steps_done == 2
    assert engine.generate(sora.VideoRequest("a cat", **SMALL)).frames.any()


def test_cancel_while_decoding_stops_within_a_latent_frame(engine):
    jobs = []
    seen = []

    def stop(frames):
        seen.append(len(frames))
        jobs[0].cancel()

    started = threading.Event()
    preparing = executor_module.preparing

    def late(*arguments):
        started.wait(30)
        return preparing(*arguments)

    executor_module.preparing, saved = late, preparing
    try:
        jobs.append(engine.submit(sora.VideoRequest("a cat", **SMALL), on_frames=stop))
        started.set()
        with pytest.raises(sora.JobCancelledError, match="while decoding"):
            jobs[0].result(timeout_s=30)
    finally:
        executor_module.preparing = saved
    assert seen == [1]


def test_an_error_in_one_job_is_its_own(engine, monkeypatch):
    def fail(frames):
        raise OSError("disk full")

    good = sora.VideoRequest("a cat", **SMALL)
    jobs = [engine.submit(good), engine.submit(good, on_frames=fail), engine.submit(good)]
    with pytest.raises(sora.JobFailedError, match="OSError: disk full"):
        jobs[1].result(timeout_s=60)
    assert jobs[1].state == "failed"
    # They are not lost; what else is in a batch may move the last bits (law: 1e-5).
    torch.testing.assert_close(jobs[1].latents, jobs[0].result(60).latents, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        jobs[0].result(60).latents, jobs[2].result(60).latents, rtol=1e-5, atol=1e-4
    )


def test_a_bad_request_is_refused_before_any_work(engine):
    good = sora.VideoRequest("a cat", **SMALL)
    with pytest.raises(sora.RequestError, match="height must be a multiple of 32"):
        engine.generate([good, sora.VideoRequest("a cat", height=33, strict_grid=True)])
    with pytest.raises(sora.RequestError, match="must be a VideoRequest, got str"):
        engine.submit("a cat")
    clip = sora.Clip(np.zeros((5, 32, 32, 3), np.uint8), at=3)
    with pytest.raises(sora.RequestError, match="ends at frame 8; the video has 5: at most 2 fit"):
        engine.generate(sora.VideoRequest("a cat", clips=[clip], **SMALL))


def test_the_queue_is_bounded(folder, monkeypatch):
    hold = threading.Event()
    preparing = executor_module.preparing

    def held(*arguments):
        hold.wait(30)
        return (yield from preparing(*arguments))

    monkeypatch.setattr(executor_module, "preparing", held)
    limits = sora.Limits(max_queued_jobs=2, max_running_jobs=1)
    with sora.Engine.from_pretrained(folder, device="cpu", limits=limits) as engine:
        request = sora.VideoRequest("a cat", **SMALL)
        jobs = [engine.submit(request)]
        while engine.num_queued:
            pass
        jobs += [engine.submit(request), engine.submit(request)]
        with pytest.raises(sora.QueueFullError, match="2 jobs are queued") as caught:
            engine.submit(request)
        assert caught.value.retry_after_s > 0
        jobs[1].cancel()
        hold.set()
        assert jobs[0].result(60).frames.any()
        assert jobs[2].result(60).frames.any()
        with pytest.raises(sora.JobCancelledError, match="while queued"):
            jobs[1].result(60)


def test_closing_cancels_what_is_left(folder):
    engine = sora.Engine.from_pretrained(folder, device="cpu")
    jobs = [
        engine.submit(sora.VideoRequest("a cat", **{**SMALL, "num_inference_steps": 200}))
        for _ in range(3)
    ]
    engine.close()
    assert all(job.done() for job in jobs)
    with pytest.raises(sora.JobCancelledError):
        jobs[0].result()
    with pytest.raises(sora.EngineClosedError):
        engine.submit(sora.VideoRequest("a cat", **SMALL))
    assert "sora-engine" not in [thread.name for thread in threading.enumerate()]


def test_result_times_out_and_callbacks_are_called(engine):
    called = []
    job = engine.submit(sora.VideoRequest("a cat", **{**SMALL, "num_inference_steps": 40}))
    job.add_done_callback(called.append)
    with pytest.raises(TimeoutError, match="still"):
        job.result(timeout_s=0.001)
    job.result(timeout_s=60)
    job.add_done_callback(called.append)
    assert called == [job, job]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda:9"}, "'cuda:9' is not there"),
        ({"device": "gpu"}, "'gpu' is not one; use auto, cpu, cuda"),
        ({"device": "mps"}, "'mps' is not supported"),
        ({"dtype": "int4"}, "'int4' is not supported; use auto, float32"),
        ({"attention_backend": "fast"}, "must be auto, reference, .*, got 'fast'"),
    ],
)
def test_bad_engine_arguments(folder, arguments, message):
    with pytest.raises((sora.BackendError, ValueError), match=message):
        sora.Engine.from_pretrained(folder, **arguments)


def test_half_precision_runs_close_to_single(folder):
    request = sora.VideoRequest("a cat", **SMALL)
    with sora.Engine.from_pretrained(folder, device="cpu", dtype="bfloat16") as engine:
        half = engine.generate(request)
    with sora.Engine.from_pretrained(folder, device="cpu") as engine:
        single = engine.generate(request)
    error = (half.latents - single.latents).norm() / single.latents.norm()
    assert 1e-5 < error < 0.2


def test_texts_are_encoded_once_a_request(engine, monkeypatch):
    """Cross-attention's keys and values are made once, whatever the number of steps."""
    request = sora.VideoRequest("a cat", **{**SMALL, "num_inference_steps": 7})
    engine.generate(request)  # its memory is planned by a rehearsal, once
    calls = []
    encode = WanTransformer.encode_contexts
    monkeypatch.setattr(
        WanTransformer,
        "encode_contexts",
        lambda self, *arguments: calls.append(1) or encode(self, *arguments),
    )
    engine.generate(request)
    assert len(calls) == 1


def test_the_second_expert_is_let_go_of_where_memory_is_short(tmp_path, monkeypatch):
    pipe = tiny_pipeline("a14b-t2v", 0)
    pipe.save_pretrained(tmp_path)
    request = sora.VideoRequest(
        "a cat", height=32, width=32, num_frames=5, num_inference_steps=8, seed=1
    )
    with sora.Engine.from_pretrained(tmp_path, device="cpu") as engine:
        roomy = engine.generate(request)
        assert all(expert.transformer is not None for expert in engine.model.experts)
    monkeypatch.setattr(video_model, "free_bytes", lambda device: 1)
    with sora.Engine.from_pretrained(tmp_path, device="cpu") as engine:
        tight = engine.generate(request)
        assert [expert.transformer is not None for expert in engine.model.experts] == [False, True]
        again = engine.generate(request)
    assert torch.equal(roomy.latents, tight.latents)
    assert torch.equal(roomy.latents, again.latents)


def test_single_files_make_what_the_folder_makes(folder, tmp_path):
    """A file under Wan's own names with its components beside it, and two experts as two files."""
    pipe = tiny_pipeline("a14b-t2v", 3)
    pipe.save_pretrained(tmp_path / "folder")
    files = []
    for name in ("transformer", "transformer_2"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "expert.safetensors"
        state = getattr(pipe, name).state_dict()
        save_file({original_name(key): value for key, value in state.items()}, file)
        # Heads of 12 channels: what shapes do not tell, a config.json beside the file does.
        config = (tmp_path / "folder" / name / "config.json").read_text()
        (tmp_path / name / "config.json").write_text(config)
        files.append(file)
    request = sora.VideoRequest(
        "a cat", height=32, width=32, num_frames=5, num_inference_steps=8, seed=1
    )
    with sora.Engine.from_pretrained(tmp_path / "folder", device="cpu") as engine:
        expected = engine.generate(request)
    with sora.Engine.from_pretrained(files, components=tmp_path / "folder", device="cpu") as engine:
        actual = engine.generate(request)
    assert torch.equal(actual.latents, expected.latents)
