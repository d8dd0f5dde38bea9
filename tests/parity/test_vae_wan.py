"""The Wan autoencoder against diffusers' `AutoencoderKLWan`, whole and in chunks."""

from __future__ import annotations

import types

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan

from sora_engine.errors import RequestError
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig
from tests.parity.vae_models import LAYOUTS, make_pair, relative

TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _latents(vae: WanVAE, count: int, height: int = 5, width: int = 3, batch: int = 1):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(batch, vae.z_dim, count, height, width, generator=generator)


def _video(vae: WanVAE, frames: int, height: int = 3, width: int = 5, batch: int = 1):
    generator = torch.Generator().manual_seed(frames)
    factor = vae.scale_factor_spatial
    shape = (batch, 3, frames, height * factor, width * factor)
    return torch.rand(*shape, generator=generator) * 2 - 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_decode_equals_diffusers(layout, count):
    oracle, ours = make_pair(layout)
    latents = _latents(ours, count, batch=2 if count == 2 else 1)
    want = oracle.decode(ours.denormalise(latents)).sample
    assert want.abs().eq(1).float().mean() < 0.02  # little is clipped, so all of it is compared
    got = ours.decode(latents)
    frames = 1 + (count - 1) * ours.scale_factor_temporal
    factor = ours.scale_factor_spatial
    assert got.shape[2:] == (frames, 5 * factor, 3 * factor)
    assert relative(got, want) < TOLERANCE
    # Frame by frame too: an error in a dark corner must not hide in the whole.
    for t in range(frames):
        assert relative(got[:, :, t], want[:, :, t]) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [1, 5, 9, 17])
def test_encode_equals_diffusers(layout, frames):
    oracle, ours = make_pair(layout)
    video = _video(ours, frames, batch=2 if frames == 5 else 1)
    want = oracle.encode(video).latent_dist
    mean, logvar = ours.encode_moments(video)
    assert mean.shape[2] == 1 + (frames - 1) // ours.scale_factor_temporal
    assert relative(mean, want.mean) < TOLERANCE
    assert relative(logvar, want.logvar) < TOLERANCE
    statistics = [torch.tensor(s)[:, None, None, None] for s in
                  (ours.config.latents_mean, ours.config.latents_std)]  # fmt: skip
    assert relative(ours.encode(video), (want.mean - statistics[0]) / statistics[1]) < TOLERANCE
    assert relative(ours.denormalise(ours.encode(video)), want.mean) < TOLERANCE


@pytest.mark.parametrize("layout", ["wan21", "wan21-deep", "wan22", "wan22-deep"])
def test_21_latent_frames(layout):
    oracle, ours = make_pair(layout, seed=1)
    latents = _latents(ours, 21, 2, 3)
    want = oracle.decode(ours.denormalise(latents)).sample
    got = ours.decode(latents)
    assert relative(got, want) < TOLERANCE
    assert relative(got[:, :, -8:], want[:, :, -8:]) < TOLERANCE
    # In chunks of other lengths, the same bits.
    state, parts = None, []
    for chunk in latents.split([2, 8, 1, 10], dim=2):
        frames, state = ours.decode_chunk(chunk, state)
        parts.append(frames)
    assert torch.equal(torch.cat(parts, dim=2), got)
    mean = oracle.encode(want).latent_dist.mean
    assert mean.shape[2] == 21
    encoded = ours.encode_moments(want)[0]
    assert relative(encoded, mean) < TOLERANCE
    assert relative(encoded[:, :, -2:], mean[:, :, -2:]) < TOLERANCE


@pytest.mark.parametrize("layout", ["wan21-deep", "wan22-deep"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (7, 3)])
def test_odd_sizes(layout, height, width):
    oracle, ours = make_pair(layout, seed=2)
    latents = _latents(ours, 3, height, width)
    want = oracle.decode(ours.denormalise(latents)).sample
    assert relative(ours.decode(latents), want) < TOLERANCE
    mean = oracle.encode(want).latent_dist.mean
    assert mean.shape[3:] == (height, width)
    assert relative(ours.encode_moments(want)[0], mean) < TOLERANCE


def test_sizes_between_latents_round_down_as_in_diffusers():
    oracle, ours = make_pair("wan21")
    video = _video(ours, 5)[..., :19, :37]
    want = oracle.encode(video).latent_dist.mean
    assert want.shape[-2:] == (2, 4)
    assert relative(ours.encode_moments(video)[0], want) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_chunking_gives_the_same_bits(layout):
    _, ours = make_pair(layout)
    latents = _latents(ours, 5)
    whole = ours.decode(latents)
    for cuts in ([1, 1, 1, 1, 1], [2, 3], [1, 4], [5]):
        state, parts = None, []
        for chunk in latents.split(cuts, dim=2):
            frames, state = ours.decode_chunk(chunk, state)
            parts.append(frames)
        assert state.latent_frames == 5
        assert torch.equal(torch.cat(parts, dim=2), whole), cuts
    factor = ours.scale_factor_temporal
    encoded = ours.encode(whole)
    for latent_cuts in ([1, 1, 1, 1, 1], [2, 3], [1, 4], [5]):
        cuts = [n * factor for n in latent_cuts]
        cuts[0] -= factor - 1
        state, parts = None, []
        for chunk in whole.split(cuts, dim=2):
            part, state = ours.encode_chunk(chunk, state)
            parts.append(part)
        assert torch.equal(torch.cat(parts, dim=2), encoded), cuts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("latents_per_call", [2, 3, None])
def test_several_latents_a_call(layout, latents_per_call):
    oracle, ours = make_pair(layout, prepared=False)
    latents = _latents(ours, 5)
    want = oracle.decode(ours.denormalise(latents)).sample
    assert relative(ours.decode(latents, latents_per_call=latents_per_call), want) < TOLERANCE
    mean = ours.encode_moments(want)[0]
    several = ours.encode_moments(want, latents_per_call=latents_per_call)[0]
    assert relative(several, mean) < TOLERANCE


def test_a_state_can_be_continued_twice():
    _, ours = make_pair("wan22")
    latents = _latents(ours, 3)
    whole = ours.decode(latents)
    _, state = ours.decode_chunk(latents[:, :, :2])
    again = [ours.decode_chunk(latents[:, :, 2:], state)[0] for _ in range(2)]
    assert torch.equal(again[0], whole[:, :, 5:])
    assert torch.equal(again[1], whole[:, :, 5:])


def test_the_state_does_not_grow():
    _, ours = make_pair("wan21")
    latents = _latents(ours, 6)
    state, sizes = None, []
    for t in range(6):
        _, state = ours.decode_chunk(latents[:, :, t : t + 1], state)
        sizes.append(state.nbytes)
        for cache in state.caches:  # nothing larger hides behind a view
            assert cache is None or cache.untyped_storage().nbytes() == cache.nbytes
    assert sizes[0] < sizes[1] == sizes[-1]


@pytest.mark.parametrize("layout", ["wan21", "wan22", "three-stages"])
@pytest.mark.parametrize("latents_per_call", [1, None])
def test_gradients_equal_diffusers(layout, latents_per_call):
    oracle, ours = make_pair(layout, dtype=torch.float64, prepared=False)
    oracle.requires_grad_(True)
    ours.requires_grad_(True)
    video = _video(ours, 9, 2, 3, batch=2).double()
    weights = torch.randn(video.shape, dtype=torch.float64)

    want = oracle.encode(video).latent_dist
    loss = (oracle.decode(want.mean).sample * weights).sum() + want.logvar.square().sum()
    loss.backward()
    mean, logvar = ours.encode_moments(video, latents_per_call=latents_per_call)
    frames = ours.decode(ours.normalise(mean), latents_per_call=latents_per_call)
    ((frames * weights).sum() + logvar.square().sum()).backward()

    expected = dict(oracle.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        # diffusers' upsampling goes through fp32, hence not 1e-12.
        assert relative(parameter.grad, expected[name].grad) < 1e-5, name


def test_attention_between_stages(monkeypatch):
    # diffusers builds these blocks, but then hands them a cache that they do not take.
    block = autoencoder_kl_wan.WanAttentionBlock
    plain = block.forward
    monkeypatch.setattr(block, "forward", lambda self, x, **_: plain(self, x))
    oracle, ours = make_pair(LAYOUTS["three-stages"] | {"attn_scales": [0.5]})
    assert "encoder.down_blocks.3.to_qkv.weight" in ours.state_dict()
    video = _video(ours, 5)
    assert relative(ours.encode_moments(video)[0], oracle.encode(video).latent_dist.mean) < 1e-5


def test_parameters_are_those_of_the_published_models():
    for values in (
        {},
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
            "scale_factor_spatial": 16,
        },
    ):
        with torch.device("meta"):
            oracle = AutoencoderKLWan(**values)
            ours = WanVAE(WanVAEConfig.from_dict(dict(oracle.config)))
        want = {name: tuple(p.shape) for name, p in oracle.state_dict().items()}
        assert {name: tuple(p.shape) for name, p in ours.state_dict().items()} == want


def test_weights_assigned_to_a_model_on_meta():
    _, ours = make_pair("wan21")
    with torch.device("meta"):
        empty = WanVAE(ours.config)
    empty.load_state_dict(ours.state_dict(), assign=True)
    empty.requires_grad_(False)
    latents = _latents(ours, 2)
    assert torch.equal(empty.prepare().decode(latents), ours.decode(latents))


def test_training_and_new_weights_undo_the_layouts():
    # A layout is a copy: it must not survive what changes the weights.
    _, ours = make_pair("wan21")
    latents = _latents(ours, 2)
    before = ours.decode(latents)
    changed = {name: tensor * 1.5 for name, tensor in ours.state_dict().items()}
    ours.load_state_dict(changed)
    after = ours.decode(latents)
    assert not torch.allclose(before, after)
    assert relative(ours.prepare().decode(latents), after) < 1e-5
    ours.train().requires_grad_(True)
    ours.decode(latents).sum().backward()
    assert ours.decoder.conv_in.weight.grad.abs().max() > 0


def test_time_factor_of_one_and_of_eight_round_trip():
    # diffusers cuts frames in fours whatever the factor, so it is no oracle here: a model that
    # keeps every frame apart must equal one that saw the frames before it only.
    for flags, factor in (([False, False, False], 1), ([True, True, True], 8)):
        config = WanVAEConfig(base_dim=4, num_res_blocks=1, temperal_downsample=tuple(flags))
        torch.manual_seed(0)
        vae = WanVAE(config).requires_grad_(False)
        assert vae.scale_factor_temporal == factor
        video = _video(vae, 1 + 2 * factor, 2, 2)
        latents = vae.encode(video)
        assert latents.shape[2] == 3
        assert relative(vae.encode(video[:, :, : 1 + factor]), latents[:, :, :2]) < 1e-6
        assert vae.decode(latents).shape == video.shape


def test_bfloat16_stays_close():
    _, ours = make_pair("wan21")
    latents = _latents(ours, 3)
    want = ours.decode(latents)
    got = ours.to(torch.bfloat16).prepare().decode(latents.bfloat16())
    assert got.dtype == torch.bfloat16
    assert 1e-4 < relative(got.float(), want) < 0.05


def test_what_does_not_fit_is_refused():
    _, ours = make_pair("wan22")
    video = _video(ours, 5)
    _, state = ours.encode_chunk(video[:, :, :1])
    bad = types.SimpleNamespace(
        four_frames=lambda: ours.encode(video[:, :, :4]),
        five_more=lambda: ours.encode_chunk(video, state),
        size=lambda: ours.encode(video[..., :40]),
        channels=lambda: ours.encode(video[:, :2]),
        latents=lambda: ours.decode(torch.zeros(1, 16, 1, 4, 4)),
        no_latents=lambda: ours.decode(torch.zeros(1, 48, 0, 4, 4)),
    )
    for call, words in (
        (bad.four_frames, "4 frames .* 1 or 5"),
        (bad.five_more, "5 frames .* 4 or 8"),
        (bad.size, "40 pixels .* 32 or 48"),
        (bad.channels, "2 channels"),
        (bad.latents, r"\[B, 48, t, h, w\]"),
        (bad.no_latents, "t of 1 or more"),
    ):
        with pytest.raises(RequestError, match=words):
            call()
