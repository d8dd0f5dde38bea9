"""Kernels compiled when a model is loaded: that nothing is left to compile, and who does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sora_kernels as sk
from sora_engine.config import Limits
from sora_engine.models.loading import load_video_model
from sora_engine.runtime import engine as engine_module
from sora_engine.runtime.engine import Engine
from sora_kernels.warming import Notes, warm_up

ROOT = Path(__file__).parents[2]

VARIANTS = """
import json, torch
from unittest import mock
from triton import knobs
from sora_engine.config import Limits
from sora_engine.models.loading import load_video_model
from sora_engine.request import VideoRequest, resolve_request
from sora_engine.runtime.memory import MemoryPlanner
from sora_engine.runtime.warming import rehearsed_calls
from sora_engine.samplers import SOLVERS
from sora_engine.vae.rehearsal import decode_memory, encode_memory
from sora_kernels.testing.launches.card import pretend
from sora_kernels.warming import Notes, warm_up

model = load_video_model("sprites", device="cpu")
planner = MemoryPlanner(model, 1 << 20, None)
calls = rehearsed_calls(model, planner, Limits())

def request(height, width, frames, guidance):
    made = VideoRequest(prompt="a ball", height=height, width=width, num_frames=frames,
                        guidance_scale=guidance)
    return resolve_request(made, model, Limits(), solvers=SOLVERS)

sizes = [(64, 64, 17, 5.0), (16, 16, 1, 1.0), (80, 64, 33, 3.0)]
requests = [request(*size) for size in sizes]
batches = [requests[:1], requests[1:2], requests, [requests[0]] * 3]
with Notes() as notes:
    for batch in batches:
        planner.rehearse_step(batch)
    for height, width in ((8, 8), (12, 6)):
        decode_memory(model.vae.config, height, width, model.vae_dtype)
        encode_memory(model.vae.config, height, width, model.vae_dtype)

seen = {}
def note(*, key, fn, **others):
    seen.setdefault((fn.name, str(key)))
    return True  # neither compiled nor launched

card, counts = torch.device("cuda", 0), []
with pretend(90), mock.patch.object(knobs.runtime, "jit_cache_hook", note):
    for some in (calls, notes.calls):
        warm_up(some, card, threads=1)
        counts.append(len(seen))
print(json.dumps([len(calls), len(notes.calls), *counts]))
"""


def test_later_requests_compile_nothing():
    """Requests of other sizes, guided and not, alone and packed, on a pretended card: all that they
    launch was compiled with the small requests of the warm-up."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", VARIANTS],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    warmed, later, compiled, after = json.loads(done.stdout)
    assert later > warmed > 0
    assert compiled >= 10
    assert after == compiled


def test_a_model_on_a_gpu_is_warmed_up_and_no_other(monkeypatch):
    model = load_video_model("sprites", device="cpu")
    asked = []

    def compile_kernels(model, planner, limits):
        asked.append((model.device.type, limits))
        raise RuntimeError("warmed")

    monkeypatch.setattr(engine_module, "compile_kernels", compile_kernels)
    limits = Limits(memory_bytes=1 << 30)
    Engine(model, limits=limits).close()
    assert asked == []
    with pytest.raises(RuntimeError, match="warmed"):
        Engine(replace(model, device=torch.device("cuda")), limits=limits)
    assert asked == [("cuda", limits)]


def test_calls_are_noted_once_and_made_again():
    x, table = torch.randn(5, 16, device="meta"), torch.randn(1, 16, device="meta")
    with Notes() as notes:
        for tokens in (5, 5, 3):
            sk.norm_modulate(x[:tokens], table, table)
        sk.norm_modulate(x, table, None)
    assert len(notes.calls) == 3
    with Notes() as again:
        assert warm_up(notes.calls, torch.device("cpu"), threads=1) == 3
    made = [args[0] for _, args in again.calls]
    assert [(tensor.device.type, *tensor.shape) for tensor in made] == [
        ("cpu", 5, 16), ("cpu", 3, 16), ("cpu", 5, 16),
    ]  # fmt: skip
    assert all(bool((tensor == 0).all()) for tensor in made)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", [([4, 6], [1, 2]), ([5, 5, 5], [3, 3, 3]), ([7], [1])])
def test_attention_is_warmed_up_on_segments_that_could_be(backend, lengths, padded):
    """Offsets are read where a backend splits by them, and must hold all tokens. Padding is there
    as it was, so that the same kernel is compiled."""
    q_lens, k_lens = lengths
    q, k = (torch.randn(sum(lens), 2, 16, device="meta") for lens in lengths)
    cu_q, cu_k = (torch.zeros(len(lens) + 1, dtype=torch.int32, device="meta") for lens in lengths)
    counts = torch.zeros(len(q_lens), dtype=torch.int32, device="meta")
    padding = sk.Padding(q[0], q[0], counts) if padded else None
    with Notes() as notes:
        sk.packed_attention(
            q, k, k, cu_q, cu_k, max_seqlen_q=max(q_lens), max_seqlen_k=max(k_lens),
            padding=padding, return_lse=True, backend="auto",
        )  # fmt: skip
    ((function, args),) = notes.calls
    with Notes() as again:
        warm_up([(function, (*args[:-1], backend))], torch.device("cpu"), threads=1)
    ((_, made),) = again.calls
    for offsets, lens in zip(made[3:5], lengths, strict=True):
        assert offsets.dtype == torch.int32
        assert offsets[0] == 0
        assert offsets[-1] == sum(lens)
        assert 0 <= int(offsets.diff().min()) <= int(offsets.diff().max()) <= max(lens)
    assert [part is not None for part in made[11:14]] == [padded] * 3
    assert not padded or (made[13].dtype == torch.int32 and int(made[13].min()) == 0)


def test_kernels_are_compiled_at_a_time():
    """Each of two calls waits for the other: one thread would wait for ever."""
    meeting = threading.Barrier(2, timeout=30)
    calls = [(lambda: meeting.wait(), ()), (lambda: meeting.wait(), ())]
    assert warm_up(calls, torch.device("cpu"), threads=2) == 2


def test_what_fails_to_compile_is_raised():
    def refuses():
        raise ValueError("out of registers")

    with pytest.raises(ValueError, match="out of registers"):
        warm_up([(refuses, ()), (refuses, ())], torch.device("cpu"), threads=2)
