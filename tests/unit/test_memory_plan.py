"""Rehearsals of memory: what is not run again is counted as if it were, to the byte."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine.models.loading import load_video_model
from sora_engine.request import KnownMode, SparsePlan, WindowPlan, resolve_request
from sora_engine.runtime.memory import REHEARSED, MemoryPlanner
from sora_engine.runtime.repeats import Repeats
from sora_engine.vae.rehearsal import video_decode_memory, video_encode_memory
from tests.parity.oracles import tiny_pipeline

KINDS = (
    "sprites",
    "i2v",
    "vace",
    pytest.param("t2v", marks=pytest.mark.slow),
    pytest.param("ti2v-5b", marks=pytest.mark.slow),
    pytest.param("a14b", marks=pytest.mark.slow),
)
SIZE = {"height": 48, "width": 64, "num_frames": 21, "num_inference_steps": 6}
BLENDED = WindowPlan(length=4, overlap=2, schedule="moving")
CHAINED = WindowPlan(length=5, overlap=2, schedule="chained", anchors=1)
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unguided": {"guidance_scale": 1.0},
    "blended": {"window": BLENDED},
    "chained": {"window": CHAINED},
    "sparse": {"window": SparsePlan(reach=2, num_keys=1)},
    "noisy": {"solver": "renoise"},
}
CLIPS = (sora.Clip(np.zeros((1, 48, 64, 3), np.uint8)),)


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    if request.param == "sprites":
        return load_video_model("sprites", device="cpu")
    folder = tmp_path_factory.mktemp(request.param)
    tiny_pipeline(request.param, 0).save_pretrained(folder)
    return load_video_model(folder, device="cpu")


def run_all(monkeypatch):
    monkeypatch.setattr(
        Repeats, "_count", lambda self, known, key, method, *x, **named: method(*x, **named)
    )


def resolved(model, **settings):
    clips = CLIPS if model.image_encoder is not None else ()
    request = sora.VideoRequest("a red circle", clips=clips, **{**SIZE, **settings})
    return resolve_request(request, model, sora.Limits())


@pytest.mark.parametrize("name", REQUESTS)
def test_what_is_not_run_again_is_counted(model, name, monkeypatch):
    if name == "chained" and model.known_mode is not KnownMode.NOISE_LEVEL:
        pytest.skip("chained windows are for models that are told of known frames by noise levels")
    request = resolved(model, **REQUESTS[name])
    batches = (100, 100_000) if name == "blended" else (100_000,)

    def rehearsals():
        planner = MemoryPlanner(model, 100_000, None)
        return [planner._rehearse(request, 20, batch_tokens) for batch_tokens in batches]

    quick = rehearsals()
    run_all(monkeypatch)
    assert quick == rehearsals()


def test_texts_lie_under_the_line_from_the_shortest_to_the_longest(model):
    request = resolved(model)
    planner = MemoryPlanner(model, 100_000, None)
    most = model.prompt_encoder.max_tokens - 1
    low, high = (planner._rehearse(request, n, 100_000) for n in (1, most))
    for n in (2, most // 3, most - 1):
        exact = planner._rehearse(request, n, 100_000)
        line = low.towards(high, (n - 1) / (most - 1))
        assert all(a <= b for a, b in zip(exact, line, strict=True)), (exact, line)
        # These models are small beside their texts: at Wan's own sizes it is within 0.1%.
        assert max(line.denoise, line.decode) <= 1.1 * max(exact.denoise, exact.decode)


def test_one_size_is_rehearsed_twice_whatever_its_texts(model, monkeypatch):
    planner = MemoryPlanner(model, 100_000, None)
    rehearse, seen = planner._rehearse, []
    monkeypatch.setattr(
        planner, "_rehearse", lambda *inputs: seen.append(inputs[1]) or rehearse(*inputs)
    )
    for words in range(1, 60, 7):
        planner.plan(resolved(model, negative_prompt="no " * words))
    assert len(seen) == 2


@pytest.mark.parametrize("wraps", [False, True])
def test_decoding_and_encoding_take_no_more_after_the_frames_that_are_rehearsed(model, wraps):
    config = model.vae.config
    for height, width in ((4, 6), (9, 5)):
        decoded, encoded = (
            [
                measure(config, height, width, torch.float32, length, *more)
                for length in (REHEARSED, 7)
            ]
            for measure, more in ((video_decode_memory, [wraps]), (video_encode_memory, []))
        )
        assert decoded[0] == decoded[1]
        assert encoded[0] == encoded[1]
