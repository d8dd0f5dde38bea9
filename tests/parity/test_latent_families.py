"""Models of latent diffusion: memory as promised, half precision, adapters."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import sora_engine as sora
from tests.parity.latent_models import (
    tiny_dit_pipeline,
    tiny_latte_pipeline,
    tiny_pixart_pipeline,
)
from tests.parity.ltx_models import tiny_ltx_pipeline
from tests.parity.metering import measured, saved_midway
from tests.parity.vae_models import relative

SMALL = {"num_inference_steps": 2, "seed": 1}
MODELS = {
    "classes": (tiny_dit_pipeline, {"label": 3, "height": 96, "width": 64}),
    "pictures of texts": (
        tiny_pixart_pipeline,
        {"prompt": "a red panda", "height": 96, "width": 64, "num_frames": 1},
    ),
    "texts": (tiny_latte_pipeline, {"prompt": "a red panda", "height": 48, "width": 32}),
    "flows": (
        tiny_ltx_pipeline,
        {"prompt": "a red panda", "height": 48, "width": 32, "num_frames": 33},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_measured_peak_is_under_the_promise(kind, tmp_path, monkeypatch):
    make, values = MODELS[kind]
    make().save_pretrained(tmp_path)
    request = sora.VideoRequest(**values, **SMALL)
    others = {"prompt": "the blue sea"} if "prompt" in values else {}  # texts are kept
    first = sora.VideoRequest(**{**values, **others}, **SMALL)
    made = {}
    for dtype in ("float32", "bfloat16"):
        made[dtype], peak = measured(monkeypatch, tmp_path, first, request, dtype)
        promised = made[dtype].receipt.promised_bytes
        assert 0.5 * promised < peak <= promised
    # Two steps of bf16, whose eight bits of a value make about this.
    assert relative(made["bfloat16"].latents, made["float32"].latents) < 0.1


TARGETS = {
    "pictures of texts": [
        "transformer_blocks.1.attn2.to_k", "transformer_blocks.0.attn1.to_v",
        "caption_projection.linear_2",
    ],
    "classes": ["transformer_blocks.1.attn1.to_q", "transformer_blocks.0.ff.net.0.proj"],
    "texts": [
        "transformer_blocks.1.attn2.to_k", "temporal_transformer_blocks.0.attn1.to_v",
        "caption_projection.linear_1",
    ],
    "flows": [
        "transformer_blocks.1.attn2.to_k", "transformer_blocks.0.attn1.to_q", "proj_in",
        "caption_projection.linear_1",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_changes_the_weights_that_it_names(kind, tmp_path):
    """Merged, and of a request: both as weights that were changed before they were saved."""
    make, values = MODELS[kind]
    pipeline = make()
    plain, changed, adapter = tmp_path / "plain", tmp_path / "changed", {}
    pipeline.save_pretrained(plain)
    for i, name in enumerate(TARGETS[kind]):
        weight = pipeline.transformer.get_submodule(name).weight
        generator = torch.Generator().manual_seed(i)
        down = torch.randn(2, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], 2, generator=generator)
        adapter[f"transformer.{name}.lora_A.weight"] = down
        adapter[f"transformer.{name}.lora_B.weight"] = up
        weight.data += 0.5 * up @ down
    pipeline.save_pretrained(changed)
    file = tmp_path / "adapter.safetensors"
    save_file(adapter, file)
    request = sora.VideoRequest(**values, **SMALL)
    lora = sora.Lora(file, 0.5)
    with sora.Engine.from_pretrained(changed, device="cpu") as engine:
        want = engine.generate(request).latents
    with sora.Engine.from_pretrained(plain, device="cpu", loras=[lora]) as engine:
        merged = engine.generate(request).latents
    with sora.Engine.from_pretrained(plain, device="cpu") as engine:
        own = engine.generate(sora.VideoRequest(**values, **SMALL, loras=[lora])).latents
        without = engine.generate(request).latents
    assert relative(merged, want) < 1e-5
    assert relative(own, want) < 1e-5
    assert relative(without, want) > 1e-2


@pytest.mark.parametrize("option", [{"offload": "blocks"}, {"exact": True}])
@pytest.mark.parametrize("kind", MODELS)
def test_it_runs_as_the_engine_runs_others(kind, option, tmp_path):
    make, values = MODELS[kind]
    make().save_pretrained(tmp_path)
    request = sora.VideoRequest(**values, **SMALL)
    made = []
    for options in ({}, option):
        with sora.Engine.from_pretrained(tmp_path, device="cpu", **options) as engine:
            made.append(engine.generate(request).latents)
            if options.get("exact"):
                others = [request, sora.VideoRequest(**{**values, "height": 32}, **SMALL)]
                assert torch.equal(engine.generate(others)[0].latents, made[-1])
    assert relative(made[1], made[0]) < 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_job_goes_on_where_it_was(kind, tmp_path):
    make, values = MODELS[kind]
    make().save_pretrained(tmp_path / "model")
    request = sora.VideoRequest(**values, num_inference_steps=4, seed=1)
    with sora.Engine.from_pretrained(tmp_path / "model", device="cpu") as engine:
        whole, again = saved_midway(engine, request, tmp_path / "job.safetensors")
    assert 0 < again.receipt.resumed_at < 4
    assert torch.equal(again.latents, whole.latents)
