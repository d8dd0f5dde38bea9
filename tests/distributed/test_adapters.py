"""Adapters of requests over ranks: each as by one rank, whatever is packed, however it is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sora_engine as sora
from sora_engine import CheckpointError, Clip, Lora, ParallelConfig, RequestError, VideoRequest
from tests.faults.processes import descendants
from tests.unit.test_adapters_engine import make_adapter

REQUEST = VideoRequest(
    "a red circle", height=32, width=48, num_frames=9, num_inference_steps=3, seed=1
)
PACKED = sora.Limits(pack_tokens=1 << 15)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    made = []
    for seed in range(3):
        path = folder / f"style{seed}.safetensors"
        make_adapter(path, seed=seed, layers=range(seed, 6), scale=0.25)
        made.append(path)
    return made


@pytest.fixture(scope="module")
def requests(files):
    return [
        replace(REQUEST, loras=[Lora(files[0])]),
        REQUEST,
        replace(REQUEST, loras=[Lora(files[1], -0.5), Lora(files[2])], height=48, seed=2),
        replace(REQUEST, loras=[Lora(files[2], 0.7)], guidance_scale=1.0, num_frames=13),
    ]


@pytest.fixture(scope="module")
def alone(requests):
    with sora.Engine.from_pretrained("sprites", device="cpu", limits=PACKED) as engine:
        plain = engine.generate(replace(requests[0], loras=())).latents
        found = [engine.generate(request).latents for request in requests]
    assert (found[0] - plain).norm() > 1e-3 * plain.norm()
    return found


def close(found, want):
    return (found - want).norm() < 1e-5 * want.norm()


LAYOUTS = {
    "tokens and branches": ParallelConfig(ulysses=2, guidance=2),
    "a ring, shared weights": ParallelConfig(ring=2, shard_weights=True),
}


@pytest.mark.parametrize(
    "layout",
    ["tokens and branches", pytest.param("a ring, shared weights", marks=pytest.mark.slow)],
)
def test_videos_are_those_of_one_rank(requests, alone, layout):
    parallel = LAYOUTS[layout]
    options = {"device": "cpu", "parallel": parallel, "limits": PACKED}
    with sora.Engine.from_pretrained("sprites", **options) as engine:
        videos = engine.generate(requests)  # packed: a rank's cut goes through a request
        for video, want in zip(videos, alone, strict=True):
            assert close(video.latents, want)
        assert videos[2].receipt.loras == ["style1.safetensors:-0.5", "style2.safetensors:1"]
    assert descendants() == []


def test_names_saved_jobs_and_what_cannot_be(requests, files, alone, tmp_path):
    broken, changed = tmp_path / "broken.safetensors", tmp_path / "style.safetensors"
    broken.write_bytes(files[0].read_bytes()[:-9])
    make_adapter(changed, seed=8)
    saved = tmp_path / "job.safetensors"
    options = {"device": "cpu", "parallel": ParallelConfig(guidance=2), "limits": PACKED}
    with sora.Engine.from_pretrained("sprites", **options) as engine:
        assert engine.load_lora(files[0], "style") == "style"
        named = replace(REQUEST, loras=[Lora("style")])
        job = engine.submit(named, save_to=saved)
        assert close(job.result().latents, alone[0])
        engine.unload_lora("style")
        with pytest.raises(RequestError, match="no adapter 'style': no such file"):
            engine.submit(named)
        with pytest.raises(CheckpointError, match=r"style0\.safetensors .* is not loaded"):
            engine.resume(saved)
        engine.load_lora(files[0], "again")
        assert close(engine.resume(saved).result().latents, alone[0])
        with pytest.raises(CheckpointError, match="truncated") as told:
            engine.load_lora(broken)
        assert told.value.path == broken
        engine.load_lora(changed, "changed")
        make_adapter(changed, seed=9)
        job = engine.submit(replace(REQUEST, loras=[Lora("changed")]))
        with pytest.raises(CheckpointError, match="has changed since the job was taken"):
            job.result()
        assert engine.loras == ("again", "changed")
        assert close(engine.generate(requests[1]).latents, alone[1])  # the ranks go on
    with sora.Engine.from_pretrained("sprites", device="cpu", limits=PACKED) as engine:
        engine.load_lora(files[0], "other name")
        assert close(engine.resume(saved).result().latents, alone[0])


@pytest.mark.slow
def test_a_clip_and_an_adapter(files):
    clip = Clip(torch.full((1, 32, 48, 3), 200, dtype=torch.uint8).numpy(), at=0)
    request = replace(REQUEST, clips=[clip], loras=[Lora(files[1])])
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        want = engine.generate(request).latents
    options = {"device": "cpu", "parallel": ParallelConfig(ulysses=3)}
    with sora.Engine.from_pretrained("sprites", **options) as engine:
        assert close(engine.generate(request).latents, want)
