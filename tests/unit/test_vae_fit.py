"""Coding within a memory budget: what is promised, and tiles exactly where frames do not fit."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch

import sora_engine as sora
from sora_engine.errors import RequestError
from sora_engine.vae import TiledCoder, TilePlan
from sora_engine.vae.fit import FittedCoder
from sora_engine.vae.free_memory import free_bytes
from sora_engine.vae.meter import NoScores, StorageMeter
from sora_engine.vae.rehearsal import (
    decode_memory,
    decode_peak_bytes,
    encode_memory,
    encode_peak_bytes,
    plan_tiles,
    surely_fits,
)
from sora_engine.vae.state import VAEState
from sora_engine.vae.tiling import starts
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig
from tests.parity.oracles import tiny_pipeline
from tests.parity.vae_models import LAYOUTS, make_pair

WAN21 = WanVAEConfig()
WAN22 = WanVAEConfig.from_dict(
    LAYOUTS["wan22-deep"] | {"base_dim": 160, "decoder_base_dim": 256, "clip_output": True}
)
CPU = torch.device("cpu")


def fitted(vae: WanVAE, budget: int | None = None) -> FittedCoder:
    return FittedCoder(vae, dtype=torch.float32, device=CPU, budget_bytes=budget)


@pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan21", "wan22"])
@pytest.mark.parametrize("side", ["decode", "encode"])
@pytest.mark.parametrize(
    ("pixels_h", "pixels_w"), [(1088, 1920), pytest.param(2048, 2048, marks=pytest.mark.slow)]
)
def test_large_frames_fit_a_small_card(config, side, pixels_h, pixels_w):
    height, width = pixels_h // config.factor_spatial, pixels_w // config.factor_spatial
    budget = 4 << 30
    options = {"dtype": torch.bfloat16, "offload": True}
    plan = plan_tiles(config, height, width, budget, encode=side == "encode", **options)
    peak_bytes = encode_peak_bytes if side == "encode" else decode_peak_bytes
    dtype = torch.bfloat16
    assert peak_bytes(config, (16, 21, height, width), dtype) > budget
    assert plan is not None
    assert peak_bytes(config, (height, width), dtype, plan, offload=True) <= budget
    # Waiting tiles' caches are all that tiles without offloading hold more.
    assert peak_bytes(config, (height, width), dtype, plan) > budget


@pytest.mark.parametrize(
    ("config", "pixels_h", "pixels_w"), [(WAN21, 2048, 2048), (WAN22, 1088, 1920)]
)
def test_tiles_of_large_frames_hold_what_was_planned(config, pixels_h, pixels_w, monkeypatch):
    # All tiles of three latent frames, on meta tensors: the host's memory is a place not counted.
    def to(state, device):
        if str(device) == "cpu":
            moved = [None if cache is None else cache.shape for cache in state.caches]
        else:
            moved = [None if s is None else latent.new_empty(s) for s in state.caches]
        return VAEState(tuple(moved), state.latent_frames)

    height, width = pixels_h // config.factor_spatial, pixels_w // config.factor_spatial
    budget, dtype = 4 << 30, torch.bfloat16
    plan = plan_tiles(config, height, width, budget, dtype=dtype, offload=True)
    promised = decode_peak_bytes(config, (height, width), dtype, plan, offload=True)
    monkeypatch.setattr(VAEState, "to", to)
    with torch.device("meta"):
        vae = WanVAE(config).to(dtype).requires_grad_(False).prepare(onednn=False)
    small = torch.empty(1, config.z_dim, 3, 4, 4, dtype=dtype, device="meta")
    with torch.no_grad(), NoScores():
        vae.decode_chunk(small)  # lays out the weights, which are not counted
    tiled = TiledCoder(vae, plan, offload=True)
    calls, peaks, state = [], [], None
    latent = torch.empty(1, config.z_dim, 1, height, width, dtype=dtype, device="meta")
    plain = vae.decode_chunk
    monkeypatch.setattr(
        vae, "decode_chunk", lambda x, *a, **kw: calls.append(x.shape[3:]) or plain(x, *a, **kw)
    )
    with torch.no_grad(), NoScores():
        for _ in range(3):
            with StorageMeter(vae.parameters()) as meter:
                frames, state = tiled.decode_chunk(latent, state, consume=True)
            peaks.append(meter.peak)
    assert frames.shape == (1, 3, 4, pixels_h, pixels_w)
    tops, lefts = (
        starts(side, tile, plan.overlap)
        for side, tile in ((height, plan.height), (width, plan.width))
    )
    assert calls == [(plan.height, plan.width)] * (3 * len(tops) * len(lefts))
    assert len(calls) > 3
    assert plan.overlap == 8
    # The largest tiles that fit: half as much again would not.
    assert promised > budget / 2
    assert 0.9 * promised < max(peaks) <= promised <= budget


def test_the_promise_is_that_of_the_layers():
    whole = decode_memory(WAN21, 30, 52)
    assert decode_peak_bytes(WAN21, (16, 81, 30, 52)) == whole.peak
    assert decode_peak_bytes(WAN21, (30, 52), loop=True) == whole.peak + whole.cache
    # A tile as large as the frame is the frame.
    assert decode_peak_bytes(WAN21, (30, 52), tiles=TilePlan(32, 64, 8)) == whole.peak
    assert encode_peak_bytes(WAN21, (30, 52)) == encode_memory(WAN21, 30, 52).peak


@pytest.mark.parametrize("layout", [*LAYOUTS, {}, {"dim_mult": [8, 1, 1, 1]}], ids=str)
def test_what_surely_fits_does_fit(layout):
    values = LAYOUTS[layout] if isinstance(layout, str) else layout
    config = WanVAEConfig.from_dict(values)
    for height, width in ((2, 2), (9, 16)):
        for memory in (decode_memory, encode_memory):
            peak = memory(config, height, width).peak
            assert not surely_fits(config, height, width, peak - 1)
    assert surely_fits(config, 8, 8, 1 << 40)


def test_what_fits_is_untouched_and_what_does_not_goes_in_tiles(caplog):
    vae = make_pair("wan21")[1]
    latents = torch.randn(1, 16, 2, 32, 40)
    want = vae.decode(latents)
    roomy = fitted(vae)
    assert roomy.tiles("decode", 32, 40) is None
    assert torch.equal(roomy.decode(latents), want)
    assert torch.equal(roomy.encode(want), vae.encode(want))

    budget = decode_peak_bytes(vae.config, (32, 40)) * 19 // 20
    tight = fitted(vae, budget)
    with caplog.at_level(logging.WARNING):
        got = tight.decode(latents)
    plan = tight.tiles("decode", 32, 40)
    assert plan is not None
    assert f"decode 32x40 latents in {plan}" in caplog.text
    assert decode_peak_bytes(vae.config, (32, 40), tiles=plan) <= budget
    assert torch.equal(got, TiledCoder(vae, plan).decode(latents))
    assert not torch.equal(got, want)
    # Smaller frames still go whole.
    assert torch.equal(tight.decode(latents[..., :8, :8]), vae.decode(latents[..., :8, :8]))
    # Encoding is planned by itself, also for sizes between two latents.
    tight.limit(encode_peak_bytes(vae.config, (32, 40)) * 3 // 4)
    assert tight.encode(want[..., :-3, :-5]).shape == (1, 16, 2, 31, 39)
    assert tight.tiles("encode", 32, 40) is not None
    tight.limit(None)
    assert tight.tiles("decode", 32, 40) is None


def test_a_size_is_coded_in_one_way_for_good(monkeypatch):
    vae = make_pair("wan21")[1]
    coder = fitted(vae)
    assert coder.tiles("decode", 32, 40) is None
    monkeypatch.setattr("sora_engine.vae.fit.free_bytes", lambda device: 1 << 10)
    assert coder.tiles("decode", 32, 40) is None
    with pytest.raises(RequestError, match="MiB even in tiles"):
        coder.tiles("decode", 40, 32)


def test_free_memory_is_that_of_this_machine():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1 << 26 < free_bytes(CPU) <= total


def test_free_memory_is_no_more_than_limits_leave(monkeypatch):
    monkeypatch.setattr("sora_engine.vae.free_memory.left_under_limits", lambda: 1 << 20)
    assert free_bytes(CPU) == 1 << 20


def test_the_engine_keeps_to_its_limit_and_says_so(tmp_path):
    tiny_pipeline("ti2v-5b", 0).save_pretrained(tmp_path)
    request = sora.VideoRequest(
        "a cat", height=640, width=640, num_frames=1, num_inference_steps=1, seed=1
    )
    with sora.Engine.from_pretrained(tmp_path, device="cpu") as engine:
        whole = engine.generate(request)
        config = engine.model.vae.config
    assert whole.receipt.vae_tiles == {}
    budget = decode_peak_bytes(config, (40, 40)) * 17 // 20
    limits = sora.Limits(vae_memory_bytes=budget)
    with sora.Engine.from_pretrained(tmp_path, device="cpu", limits=limits) as engine:
        tiled = engine.generate(request)
        plan = engine.model.vae.tiles("decode", 40, 40)
    assert tiled.receipt.vae_tiles == {"decode": str(plan)}
    assert decode_peak_bytes(config, (40, 40), tiles=plan) <= budget
    assert torch.equal(tiled.latents, whole.latents)
    difference = (tiled.frames.astype(int) - whole.frames).astype(float)
    assert 0 < (difference**2).mean() ** 0.5 < 30


def test_what_is_kept_is_what_is_decoded(tmp_path, monkeypatch):
    # To the bit: frames hide a difference in their rounding, a longer video would show it.
    tiny_pipeline("ti2v-5b", 0).save_pretrained(tmp_path)
    decoded = []
    plain = FittedCoder.decode_chunk

    def spy(coder, latents, state=None, *, consume=False):
        decoded.append(latents.clone())
        return plain(coder, latents, state, consume=consume)

    monkeypatch.setattr(FittedCoder, "decode_chunk", spy)
    request = sora.VideoRequest(
        "a cat", height=64, width=96, num_frames=9, num_inference_steps=2, seed=1
    )
    with sora.Engine.from_pretrained(tmp_path, device="cpu") as engine:
        video = engine.generate(request)
        normalised = engine.model.vae.normalise(video.latents[None])
    assert torch.equal(torch.cat(decoded, dim=2), normalised)


_PEAK = """
import re, torch
from sora_engine.vae import TiledCoder, TilePlan, stream_decode
from sora_engine.vae.wan_config import WanVAEConfig
from sora_engine.vae.wan import WanVAE
torch.set_num_threads(1)
torch.manual_seed(0)
vae = WanVAE(WanVAEConfig(base_dim=8, num_res_blocks=1)).requires_grad_(False).prepare()
tiled = TiledCoder(vae, TilePlan(20, 24, 4))
def resident(kind):
    with open("/proc/self/status") as file:
        return int(re.search(kind + r":\\s*(\\d+) kB", file.read())[1]) * 1024
list(stream_decode(vae, torch.randn(1, 16, 3, 2, 2)))
before = resident("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts again
for frames in stream_decode(tiled, torch.randn(1, 16, 4, 32, 40)):
    pass
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_tiles_keep_their_promise():
    config = WanVAEConfig(base_dim=8, num_res_blocks=1)
    promised = decode_peak_bytes(config, (32, 40), tiles=TilePlan(20, 24, 4))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout)
    assert 0.7 * promised < measured < 1.1 * promised + (16 << 20), (measured, promised)
