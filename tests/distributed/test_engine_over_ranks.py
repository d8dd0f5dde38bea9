"""An engine that starts and owns its ranks, against one that is alone."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import sora_engine as sora
from tests.faults.engines import save_midway
from tests.faults.processes import descendants, listeners

SMALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "seed": 1}
REQUESTS = [
    sora.VideoRequest("a red circle moves right on a white background", **SMALL),
    sora.VideoRequest("a blue square", guidance_scale=1.0, **{**SMALL, "num_frames": 8}, loop=True),
    sora.VideoRequest(
        "a green square moves up",
        clips=[sora.Clip(np.full((1, 32, 48, 3), 200, np.uint8), at=0)],
        window=sora.WindowPlan(2, 1),
        **SMALL,
    ),
    sora.VideoRequest(
        "a red circle",
        window=sora.WindowPlan(3, 2, schedule="chained", anchors=1),
        solver="euler",
        **{**SMALL, "num_frames": 17},
    ),
]


@pytest.fixture(scope="module")
def alone():
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        yield engine.generate(REQUESTS)


@pytest.fixture(scope="module")
def engine():
    parallel = sora.ParallelConfig(ulysses=2, guidance=2)
    with sora.Engine.from_pretrained("sprites", device="cpu", parallel=parallel) as made:
        yield made
    assert descendants() == []


def test_videos_are_those_of_one_process(engine, alone):
    chunks, latents = [], []
    first = engine.submit(REQUESTS[0], on_frames=chunks.append, on_latents=latents.append)
    others = [engine.submit(request) for request in REQUESTS[1:]]
    for job, expected in zip([first, *others], alone, strict=True):
        video = job.result(300)
        error = (video.latents - expected.latents).abs().max() / expected.latents.abs().max()
        assert error < 1e-5
        # Of latents that differ in the seventh place, one pixel in thousands rounds the other way.
        differ = np.abs(video.frames.astype(int) - expected.frames)
        assert differ.max() <= 1
        assert (differ > 0).mean() < 1e-3
        assert video.provenance == expected.provenance
    assert [len(chunk) for chunk in chunks] == [1, 4, 4]
    assert np.array_equal(np.concatenate(chunks), first.result().frames)
    assert latents[0].shape == alone[0].latents.shape
    assert first.progress.steps_done == 3
    assert first.result().receipt.solver == alone[0].receipt.solver
    assert first.result().receipt.ops["packed_attention"]
    waited_s = engine._workers[0].executor.waited_s
    assert len(waited_s) == 4
    assert min(waited_s) > 0


def test_two_replicas_whose_ranks_share_the_weights_out(alone):
    """Each serves a request of its own, and makes the same video."""
    parallel = sora.ParallelConfig(ulysses=2, data=2, shard_weights=True)
    with sora.Engine.from_pretrained("sprites", device="cpu", parallel=parallel) as replicas:
        jobs = [replicas.submit(request) for request in REQUESTS[:2]]
        for job, expected in zip(jobs, alone, strict=False):
            made = job.result(300).latents
            assert (made - expected.latents).abs().max() / expected.latents.abs().max() < 1e-5
        served = [worker.executor.sent_bytes for worker in replicas._workers]
    assert len(served) == 2
    assert all(sent[0]["ulysses"] > 0 and sent[0]["weights"] > 0 for sent in served)


def test_refused_requests_leave_the_ranks_as_they_were(engine):
    before = descendants()
    clip = sora.Clip(np.zeros((5, 32, 48, 3), np.uint8), at=7)
    with pytest.raises(sora.RequestError, match="ends at frame 12; the video has 9"):
        engine.generate(sora.VideoRequest("a", clips=[clip], **SMALL))
    with pytest.raises(sora.RequestError, match="height must be a multiple"):
        engine.generate(sora.VideoRequest("a", height=33, strict_grid=True))
    assert engine.generate(REQUESTS[0]).frames.any()
    assert descendants() == before


def test_a_job_saved_over_ranks_goes_on_over_others(engine, alone, tmp_path):
    """Each way: its result is that of a job that ran in one go."""
    path = tmp_path / "job.safetensors"
    save_midway(engine, REQUESTS[2], path, 2)
    for made in (engine.resume(path).result(300), resumed_alone(path)):
        assert made.receipt.resumed_at == 2
        error = (made.latents - alone[2].latents).abs().max() / alone[2].latents.abs().max()
        assert error < 1e-5
        assert made.provenance == alone[2].provenance


def resumed_alone(path):
    with sora.Engine.from_pretrained("sprites", device="cpu") as one:
        return one.resume(path).result(300)


def test_a_damaged_job_is_refused_by_all_ranks(engine, tmp_path):
    path = tmp_path / "job.safetensors"
    engine.submit(REQUESTS[0], save_to=path).result(300)
    before = descendants()
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = file.metadata()
    save_file({**tensors, "latents": tensors["latents"][:, :1].contiguous()}, path, told)
    with pytest.raises(sora.CheckpointError, match="damaged as a saved job"):
        engine.resume(path).result(300)
    assert descendants() == before


def test_cancel_stops_all_ranks_in_the_same_step(engine):
    """Ranks step when the engine says so: what it counts is what each of them did."""
    reached = threading.Event()
    jobs = []

    def stop(progress):
        if progress.steps_done == 2:
            jobs[0].cancel()
            reached.set()

    request = sora.VideoRequest("a", **{**SMALL, "num_inference_steps": 50})
    hold = threading.Event()
    jobs.append(engine.submit(request, on_progress=lambda p: hold.wait(300) and stop(p)))
    hold.set()
    assert reached.wait(300)
    with pytest.raises(sora.JobCancelledError):
        jobs[0].result(300)
    assert jobs[0].progress.steps_done == 2
    again = engine.generate(REQUESTS[0])
    assert torch.equal(again.latents, engine.generate(REQUESTS[0]).latents)


def test_listeners_are_on_the_loopback_and_nothing_is_shared(engine):
    ranks = descendants()
    assert len(ranks) == 5  # a launcher and four ranks
    found = listeners(ranks)
    assert found  # gloo's
    assert {address for address in found if not address.startswith("127.")} == set()
    for rank in ranks:
        maps = Path(f"/proc/{rank}/maps").read_text()
        assert "/dev/shm" not in maps


def test_impossible_layouts_start_nothing():
    before = descendants()
    with pytest.raises(sora.LayoutError, match="has 4; over 8 ranks these would work"):
        sora.Engine.from_pretrained("sprites", parallel=sora.ParallelConfig(ulysses=8))
    assert descendants() == before


def test_a_checkpoint_that_cannot_be_loaded_leaves_nothing(tmp_path):
    before = descendants()
    with pytest.raises(sora.CheckpointError):
        sora.Engine.from_pretrained(tmp_path, parallel=sora.ParallelConfig(ulysses=2))
    assert descendants() == before
