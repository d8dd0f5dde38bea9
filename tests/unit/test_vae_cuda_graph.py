"""The steady step of an autoencoder that is recorded once and replayed, by a stand-in."""

from __future__ import annotations

import logging

import pytest
import torch

from sora_engine.errors import BackendError
from sora_engine.vae import TiledCoder, TilePlan, stream_decode, stream_encode
from sora_engine.vae.cuda_graph import EAGER_LATENTS, GraphedVAE, graphed
from sora_engine.vae.fit import FittedCoder
from sora_engine.vae.meter import NoScores, StorageMeter
from sora_engine.vae.rehearsal import decode_memory, encode_memory
from sora_engine.vae.state import FixedFeatureCache, VAEState
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig
from tests.parity.vae_models import make_pair, relative
from tests.recorder import WORKSPACE, Recorder


@pytest.fixture(params=["wan21", "wan22"])
def vae(request) -> WanVAE:
    return make_pair(request.param)[1]


def latents_of(vae: WanVAE, count: int, seed: int = 0, size: tuple[int, int] = (3, 2)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, vae.z_dim, count, *size, generator=generator)


def test_replayed_videos_are_the_same_bits(vae):
    recorder = Recorder()
    coder = GraphedVAE(vae, recorder=recorder)
    latents = latents_of(vae, 8)
    want = vae.decode(latents)
    assert torch.equal(torch.cat(list(stream_decode(coder, latents)), dim=2), want)
    assert (recorder.recordings, recorder.replays) == (1, 8 - EAGER_LATENTS)
    encoded = torch.cat(list(stream_encode(coder, [want])), dim=2)
    assert torch.equal(encoded, vae.encode(want))
    assert (recorder.recordings, recorder.replays) == (2, 2 * (8 - EAGER_LATENTS))
    # In any chunking.
    state, parts = None, []
    for chunk in latents.split([1, 5, 2], dim=2):
        frames, state = coder.decode_chunk(chunk, state)
        parts.append(frames)
    assert state.latent_frames == 8
    assert torch.equal(torch.cat(parts, dim=2), want)


def test_videos_that_take_turns_share_a_graph_and_nothing_else(vae):
    recorder = Recorder()
    coder = GraphedVAE(vae, recorder=recorder)
    videos = [latents_of(vae, 7, seed) for seed in range(3)]
    streams = [stream_decode(coder, video) for video in videos]
    turns = list(zip(*streams, strict=True))
    for video, frames in zip(videos, zip(*turns, strict=True), strict=True):
        assert torch.equal(torch.cat(frames, dim=2), vae.decode(video))
    assert recorder.recordings == 1


def test_a_state_that_is_kept_stays_what_it_was(vae):
    coder = GraphedVAE(vae, recorder=Recorder())
    latents = latents_of(vae, 7)
    want = vae.decode(latents)
    _, state = coder.decode_chunk(latents[:, :, :5])
    assert state.home is not None
    last = 1 + 4 * vae.scale_factor_temporal
    for _ in range(2):
        assert torch.equal(coder.decode_chunk(latents[:, :, 5:], state)[0], want[:, :, last:])
    assert torch.equal(vae.decode_chunk(latents[:, :, 5:], state)[0], want[:, :, last:])
    assert torch.equal(coder.decode_chunk(latents[:, :, 5:], state.to("cpu"))[0], want[:, :, last:])
    coder.decode_chunk(latents[:, :, 5:6], state, consume=True)
    with pytest.raises(ValueError, match="consumed"):
        coder.decode_chunk(latents[:, :, 5:6], state)


def test_a_graph_lives_as_long_as_its_videos(vae):
    recorder = Recorder()
    coder = GraphedVAE(vae, recorder=recorder)
    fitted = FittedCoder(coder, dtype=torch.float32, device=torch.device("cpu"))
    assert fitted.layers is vae
    assert fitted.replays
    streams = [stream_decode(fitted, latents_of(vae, 7, size=size)) for size in ((3, 2), (2, 2))]
    for stream in streams:
        for _ in range(5):
            next(stream)
    assert recorder.recordings == 2
    assert coder.workspace_bytes == 2 * WORKSPACE
    streams[0].close()
    assert coder.workspace_bytes == WORKSPACE
    list(streams[1])
    assert coder.workspace_bytes == 0


def test_tiles_whose_caches_wait_elsewhere_share_a_graph(vae, monkeypatch):
    # As on a GPU, where the caches of waiting tiles are moved to the host.
    def to(state, device):
        return VAEState(tuple(c.clone() for c in state.caches), state.latent_frames, state.home)

    latents = latents_of(vae, 7, size=(16, 20))
    plan = TilePlan(16, 16, 8)
    want = torch.cat(list(stream_decode(TiledCoder(vae, plan), latents)), dim=2)
    monkeypatch.setattr(VAEState, "to", lambda s, d: to(s, d) if None not in s.caches else s)
    recorder = Recorder()
    tiled = TiledCoder(GraphedVAE(vae, recorder=recorder), plan, offload=True)
    assert torch.equal(torch.cat(list(stream_decode(tiled, latents)), dim=2), want)
    assert (recorder.recordings, recorder.replays) == (1, 2 * (7 - EAGER_LATENTS))


@pytest.mark.parametrize("by_time", [True, False])
@pytest.mark.parametrize("of_host", [True, False])
def test_cudnn_picks_by_time_in_steady_steps_alone(vae, monkeypatch, by_time, of_host):
    """Shapes that come once are not worth the trials; a recording may not make any."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", of_host)
    seen = []
    step = vae.decode_step

    def watched(x, cache):
        seen.append(torch.backends.cudnn.benchmark)
        return step(x, cache)

    monkeypatch.setattr(vae, "decode_step", watched)
    coder = GraphedVAE(vae, recorder=Recorder(), by_time=by_time)
    for _ in stream_decode(coder, latents_of(vae, 6)):
        pass
    steady = of_host or by_time
    assert seen == [of_host, of_host, *[steady] * (EAGER_LATENTS - 2), steady]
    assert torch.backends.cudnn.benchmark == of_host


def test_a_step_that_cannot_be_recorded_is_named(vae, caplog):
    tried = []

    def refuse(step, device):
        tried.append(device)
        raise RuntimeError("operation not permitted when stream is capturing")

    latents = latents_of(vae, 7)
    coder = GraphedVAE(vae, recorder=refuse)
    with caplog.at_level(logging.WARNING):
        got = [coder.decode(latents) for _ in range(2)]
    assert torch.equal(got[0], vae.decode(latents))
    assert torch.equal(got[1], got[0])
    assert len(tried) == 1
    assert caplog.text.count("cannot be a CUDA graph: operation not permitted") == 1
    with pytest.raises(BackendError, match="cannot be a CUDA graph"):
        GraphedVAE(vae, recorder=refuse, required=True).decode(latents)


def test_the_setting(vae):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert graphed(vae, "auto", cpu) is graphed(vae, "off", cpu) is graphed(vae, "off", cuda) is vae
    assert isinstance(graphed(vae, "auto", cuda), GraphedVAE)
    with pytest.raises(BackendError, match="need a CUDA device, not cpu"):
        graphed(vae, "on", cpu)
    with pytest.raises(BackendError, match="auto, on, off, not 'always'"):
        graphed(vae, "always", cuda)


@pytest.mark.parametrize("side", ["decode", "encode"])
def test_a_step_in_place_takes_no_more_than_was_promised(side):
    # On meta tensors, so to the byte; the caches of a layer are there twice for a moment.
    config = WanVAEConfig()
    with torch.device("meta"):
        vae = WanVAE(config).requires_grad_(False).prepare(onednn=False)
    measure, run, step = {
        "decode": (decode_memory, vae.decode_chunk, vae.decode_step),
        "encode": (encode_memory, vae.encode_chunk, vae.encode_step),
    }[side]
    size = (12, 20) if side == "decode" else (96, 160)
    first, later = (
        torch.empty(1, 16 if side == "decode" else 3, n, *size, device="meta")
        for n in (1, 1 if side == "decode" else 4)
    )
    with torch.no_grad(), NoScores():
        _, state = run(first)
        for _ in range(2):
            _, state = run(later, state)
        with StorageMeter([later, *vae.parameters()]) as meter:
            meter.count(state.caches)
            held = meter.now
            output = step(later, FixedFeatureCache(state.caches))
            assert meter.now == held + output.nbytes
    promised = measure(config, 12, 20)
    assert held == promised.cache
    assert 0.9 * promised.peak < meter.peak < 1.05 * promised.peak


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_equal_the_steps_they_record(vae, dtype):
    vae = vae.to("cuda", dtype).prepare()
    coder = GraphedVAE(vae, required=True)
    videos = [latents_of(vae, 9, seed).to("cuda", dtype) for seed in range(2)]
    wants = [vae.decode(video) for video in videos]
    streams = [stream_decode(coder, video) for video in videos]
    turns = []
    for frames in zip(*streams, strict=True):
        turns.append(frames)
        if len(turns) > EAGER_LATENTS:
            assert coder.workspace_bytes > 0
    for got, want in zip(zip(*turns, strict=True), wants, strict=True):
        assert relative(torch.cat(got, dim=2).cpu(), want.cpu()) < 1e-5
    encoded = torch.cat(list(stream_encode(coder, [wants[0]])), dim=2)
    assert relative(encoded.cpu(), vae.encode(wants[0]).cpu()) < 1e-5
    assert coder.workspace_bytes == 0
