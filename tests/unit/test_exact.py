"""`exact`: linear layers whose rows no company changes, where they are, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import sora_engine as sora
from sora_engine.config import NO_LIMIT
from sora_engine.errors import BackendError
from sora_engine.models.backends import exact_attention
from sora_engine.models.linear import (
    InvariantLinear,
    InvariantPatches,
    embed_patches,
    linear_gelu,
    make_invariant,
)
from sora_engine.models.loading import load_video_model
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_engine.testing.device import shadow_device
from sora_engine.testing.shadow import walk
from sora_kernels import backends
from tests.parity.oracles import TINY_TRANSFORMER

CONFIG = WanConfig(**TINY_TRANSFORMER)
BF16, FP32 = torch.bfloat16, torch.float32
REQUEST = sora.VideoRequest(
    "a red circle", seed=1, num_frames=5, height=48, width=48, num_inference_steps=2
)


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv3d))}


def through(layer, x):
    """A layer of either kind, with GELU where it is a product."""
    if isinstance(layer, nn.Conv3d):
        return embed_patches(x, layer)
    return linear_gelu(layer, x, "tanh")


@pytest.mark.parametrize(("dtype", "error"), [(FP32, 1e-5), (BF16, 2e-2)])
def test_no_rows_beside_it_change_a_row(dtype, error):
    torch.manual_seed(0)
    plain = WanTransformer(CONFIG).to(dtype).requires_grad_(False)
    model = plain.rebuild().to(dtype).requires_grad_(False)
    make_invariant(model)
    model.load_state_dict(plain.state_dict())
    layers, twins = layers_of(model), layers_of(plain)
    assert set(layers) == set(twins)
    assert {type(layer) for layer in layers.values()} == {InvariantLinear, InvariantPatches}
    for name, layer in layers.items():
        x = torch.randn(300, layer.weight.flatten(1).shape[1], dtype=dtype)
        y = through(layer, x)
        torch.testing.assert_close(y, through(twins[name], x), rtol=error, atol=error)
        for rows in (1, 2, 7, 64, 129, 299):
            assert torch.equal(through(layer, x[:rows]), y[:rows]), (name, rows)
            assert torch.equal(through(layer, x[-rows:]), y[-rows:]), (name, rows)


@pytest.mark.parametrize(
    ("device", "asked", "taken"),
    [
        ("cpu", "auto", "sdpa"),
        ("cpu", "reference", "reference"),
        ("cuda", "auto", "triton"),
        ("cuda", "gluon", "gluon"),
    ],
)
def test_attention_that_serves_every_batch_alike(device, asked, taken):
    assert exact_attention(torch.device(device), asked) == taken


@pytest.mark.parametrize(("device", "asked"), [("cpu", "native"), ("cuda", "flash")])
def test_attention_that_promises_no_bits_is_refused(device, asked):
    says = f"attention_backend '{asked}' promises no bits on {device}; auto, "
    with pytest.raises(BackendError, match=says):
        exact_attention(torch.device(device), asked)


def test_it_is_there_on_a_gpu_and_rehearsed():
    """On the shadow device, in bfloat16."""
    with shadow_device() as shadow:
        model = load_video_model("sprites", device="cuda", exact=True, cuda_graphs="off")
        kinds = {type(layer) for layer in layers_of(model.transformer(0)).values()}
        assert kinds == {InvariantLinear, InvariantPatches}
        hollow = layers_of(model.transformer(0).without_weights())
        assert {type(hollow[name]) for name in hollow if name.startswith("blocks")} == {
            InvariantLinear
        }
        model.vae.limit(NO_LIMIT)
        made = walk(model, REQUEST, shadow)
    assert made.latents.isfinite().all()
    with sora.Engine.from_pretrained("sprites", device="cpu", exact=True) as engine:
        due = engine.generate(REQUEST).latents
    assert float((made.latents - due).norm() / due.norm()) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cpu_company_changes_no_bit(dtype):
    sizes = [(48, 48, 9), (64, 32, 5), (16, 16, 1), (96, 80, 13)]
    requests = [
        replace(REQUEST, prompt="a ball " * i, height=h, width=w, num_frames=n, seed=i)
        for i, (h, w, n) in enumerate(sizes, 1)
    ]
    settings = {"device": "cpu", "dtype": dtype, "exact": True}
    settings["limits"] = sora.Limits(pack_tokens=4096)
    with sora.Engine.from_pretrained("sprites", **settings) as engine:
        alone = [engine.generate(request) for request in requests]
        together = engine.generate(requests)
    assert {video.receipt.most_in_company for video in alone} == {1}
    assert max(video.receipt.most_in_company for video in together) > 2
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert (one.frames == other.frames).all()


@pytest.mark.parametrize("name", ["reference", "sdpa", "native"])
def test_an_attention_backend_by_name_plans_and_serves(name):
    """Memory is planned on the meta device, where no backend but the reference could serve."""
    reason = backends("cpu")["packed_attention"][name]
    if reason is not None:
        pytest.skip(reason)
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        due = engine.generate(REQUEST).latents
    with sora.Engine.from_pretrained("sprites", device="cpu", attention_backend=name) as engine:
        video = engine.generate(REQUEST)
    assert video.receipt.ops["packed_attention"] == [name]
    assert float((video.latents - due).abs().max() / due.abs().max()) < 1e-5
