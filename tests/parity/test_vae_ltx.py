"""LTX-Video's autoencoder against diffusers: three published layouts, whole and streamed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_ltx

from sora_engine.errors import BackendError, RequestError
from sora_engine.vae import ltx_blocks
from sora_engine.vae.backend import open_coder
from sora_engine.vae.coder import stream_decode, stream_encode
from sora_engine.vae.ltx import LTXVAE, latent_noise
from sora_engine.vae.ltx_blocks import NOISE_SEED, Resnet
from sora_engine.vae.ltx_checkpoint import to_own_name
from sora_engine.vae.ltx_config import LTXVAEConfig
from sora_engine.vae.onnx_export import export_onnx
from sora_engine.vae.rehearsal import decode_memory
from sora_kernels import causal_norm_silu
from tests.parity.ltx_models import VAES, tiny_ltx_vae
from tests.parity.vae_models import relative

TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ours_of(oracle, **changes) -> LTXVAE:
    config = LTXVAEConfig.from_dict(dict(oracle.config))
    config = replace(
        config, latents_mean=oracle.latents_mean.tolist(), latents_std=oracle.latents_std.tolist(),
        **changes,
    )  # fmt: skip
    ours = LTXVAE(config)
    ours.load_state_dict({to_own_name(k): v for k, v in oracle.state_dict().items()})
    return ours.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pairs():
    """By version an oracle, and ours, which mixes no noise into latents."""
    oracles = {version: tiny_ltx_vae(version) for version in VAES}
    return {v: (oracle, ours_of(oracle, decode_noise_scale=0.0)) for v, oracle in oracles.items()}


def decoded(oracle, ours, latents, monkeypatch) -> torch.Tensor:
    """By diffusers, at the level of `ours`; where its blocks add noise, that is the one of ours."""
    numbers = [
        2 * block.number + which
        for block in ours.decoder.modules()
        if isinstance(block, Resnet) and block.per_channel_scale1 is not None
        for which in (0, 1)
    ]
    queue = iter(numbers)

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def randn(self, shape, **_):
            generator = torch.Generator().manual_seed(NOISE_SEED + next(queue))
            return torch.randn(shape, generator=generator)

    level = torch.tensor([0.05]) if ours.config.timestep_conditioning else None
    with monkeypatch.context() as patched:
        patched.setattr(autoencoder_kl_ltx, "torch", Torch())
        made = oracle.decode(ours.denormalise(latents), level).sample
    assert next(queue, None) is None
    return made


@pytest.mark.parametrize("version", VAES)
def test_encoding_equals_diffusers(pairs, version):
    oracle, ours = pairs[version]
    video = torch.rand(1, 3, 25, 32, 48) * 2 - 1
    want = oracle.encode(video).latent_dist
    for per_call in (1, None):
        mean, logvar = ours.encode_moments(video, latents_per_call=per_call)
        assert relative(mean, want.mean) < TOLERANCE
        assert relative(logvar, want.logvar) < TOLERANCE
    streamed = torch.cat(list(stream_encode(ours, video.split(7, dim=2))), dim=2)
    assert relative(streamed, ours.normalise(want.mean)) < TOLERANCE


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("version", VAES)
def test_decoding_equals_diffusers(pairs, version, frames, monkeypatch):
    oracle, ours = pairs[version]
    latents = torch.randn(1, 8, frames, 4, 6)
    want = decoded(oracle, ours, latents, monkeypatch)
    whole = ours.decode(latents, latents_per_call=None)
    assert want.shape == (1, 3, 8 * frames - 7, 32, 48)
    assert relative(whole, want) < TOLERANCE
    streamed = torch.cat(list(stream_decode(ours, latents)), dim=2)
    assert relative(streamed, whole) < 1e-5
    assert relative(ours.decode(latents, latents_per_call=2), whole) < 1e-5


@pytest.mark.parametrize("version", VAES)
def test_frames_of_long_videos_come_before_their_end(pairs, version):
    """As soon as the decoder has seen far enough; after that it holds the same at each step."""
    _, ours = pairs[version]
    ahead = ours.config.look_ahead
    latents = torch.randn(1, 8, ahead + 6, 2, 2)
    state, made, held = None, [], []
    for latent in latents.split(1, dim=2):
        frames, state = ours.decode_chunk(latent, state)
        made.append(frames)
        held.append(state.nbytes)
    frames, _ = ours.decode_chunk(latents[:, :, :0], state)
    assert [part.shape[2] for part in made[-4:]] == [8] * 4
    assert 0 < frames.shape[2] <= 8 * ahead
    assert len(set(held[-4:])) == 1
    whole = ours.decode(latents, latents_per_call=None)
    assert relative(torch.cat([*made, frames], dim=2), whole) < 1e-5
    # A state can be gone on from in several ways.
    again, _ = ours.decode_chunk(latents[:, :, :0], state)
    assert torch.equal(again, frames)


def test_levelled_decoders_mix_noise_into_latents():
    """The same for every decode, and another for each latent frame."""
    oracle = tiny_ltx_vae("0.9.5")
    ours, plain = ours_of(oracle), ours_of(oracle, decode_noise_scale=0.0)
    latents = torch.randn(1, 8, 3, 2, 2)
    raw = ours.denormalise(latents)
    mixed = raw + 0.025 * (latent_noise(raw, 0) - raw)
    assert relative(ours.decode(latents), plain.decode(plain.normalise(mixed))) < 1e-5
    streamed = torch.cat(list(stream_decode(ours, latents)), dim=2)
    assert relative(streamed, ours.decode(latents)) < 1e-5
    assert relative(plain.decode(latents), ours.decode(latents)) > 1e-3
    level = ours_of(oracle, decode_timestep=0.5)
    assert relative(level.decode(latents), ours.decode(latents)) > 1e-3


def test_what_a_stream_cannot_do_is_refused(pairs):
    _, ours = pairs["0.9.0"]
    with pytest.raises(RequestError, match="t of 1 or more"):
        ours.decode_chunk(torch.zeros(1, 8, 0, 2, 2))
    with pytest.raises(BackendError, match="not exported to ONNX, as its decoder looks ahead"):
        export_onnx(ours, "nowhere")
    with pytest.raises(BackendError, match="CUDA graphs"):
        open_coder("torch", ours, device="cpu", cuda_graphs="on")


def test_memory_of_a_decode_counts_what_is_seen_ahead(pairs):
    _, ours = pairs["0.9.0"]
    small, large = (decode_memory(ours.config, side, side) for side in (2, 4))
    assert 3.5 * small.peak < large.peak < 4.5 * small.peak
    latents = torch.randn(1, 8, ours.config.look_ahead + 3, 4, 4)
    state = None
    for latent in latents.split(1, dim=2):
        _, state = ours.decode_chunk(latent, state, consume=True)
    assert state.nbytes <= large.cache


@pytest.mark.parametrize("version", VAES)
def test_fused_passes_are_those_op_by_op(pairs, version, monkeypatch):
    """Whole, and in stretches of one latent frame, with a past and ends of their own."""
    _, ours = pairs[version]
    latents = torch.randn(1, ours.z_dim, 3, 3, 2, generator=torch.Generator().manual_seed(8))
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return causal_norm_silu(*args, **kwargs)

    def both():
        return ours.decode(latents), torch.cat(list(stream_decode(ours, latents)), dim=2)

    monkeypatch.setattr(ltx_blocks, "causal_norm_silu", counted)
    with torch.inference_mode():
        fused = both()
        assert {call["before"] for call in calls} >= {0, 1}
        assert {call["after"] for call in calls} == {0, 1}
        before = len(calls)
        monkeypatch.setattr(ltx_blocks, "fuses", lambda *tensors: False)
        plain = both()
        assert len(calls) == before
    for got, want in zip(fused, plain, strict=True):
        assert relative(got, want) < 5e-6  # some sixty layers of fp32
