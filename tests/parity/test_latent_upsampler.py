"""Latent upsamplers against diffusers, by themselves and as a stage of a cascade."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import LTXConditionPipeline
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel

import sora_engine as sora
from sora_engine import tasks
from sora_engine.errors import CheckpointError, RequestError
from sora_engine.samplers.noise import initial_noise
from sora_engine.vae.latent_upsampler import open_latent_upsampler, upsampled
from tests.parity.ltx_models import tiny_ltx_pipeline
from tests.parity.vae_models import relative

TOLERANCE = 1e-4
LAYOUTS = {
    "space": {"dims": 3},
    "pictures": {"dims": 2},
    "time": {"dims": 3, "spatial_upsample": False, "temporal_upsample": True},
    "both": {"dims": 3, "temporal_upsample": True},
}


def tiny_upsampler(**layout) -> LTXLatentUpsamplerModel:
    torch.manual_seed(0)
    model = LTXLatentUpsamplerModel(
        in_channels=8, mid_channels=32, num_blocks_per_stage=1, **layout
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_equals_diffusers(layout, tmp_path):
    oracle = tiny_upsampler(**LAYOUTS[layout])
    oracle.save_pretrained(tmp_path / "latent_upsampler")
    ours = open_latent_upsampler(tmp_path, torch.device("cpu"), torch.float32)
    latents = torch.randn(8, 3, 4, 6)
    want = oracle(latents[None])[0]
    assert relative(upsampled(ours, latents), want) < TOLERANCE
    with pytest.raises(RequestError, match=r"takes 8 channels; these latents are \[4, 3, 4, 6\]"):
        upsampled(ours, latents[:4])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mid_channels": 20}, "mid_channels is 20; norms need a multiple of 32"),
        ({"dims": 2, "temporal_upsample": True}, "dims is 2; 3, or 2 without temporal_upsample"),
        ({"spatial_upsample": False}, "are both false"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
        ({"_class_name": "UNet2DModel"}, "a latent upsampler is LTXLatentUpsamplerModel"),
        ({"num_blocks_per_stage": 2}, r"missing tensors: .*res_blocks\.1"),
    ],
)
def test_bad_folders_are_refused(tmp_path, values, message):
    tiny_upsampler().save_pretrained(tmp_path)
    place = tmp_path / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **values}))
    with pytest.raises(CheckpointError, match=message):
        open_latent_upsampler(tmp_path, torch.device("cpu"), torch.float32)


def test_a_cascade_equals_diffusers(tmp_path, monkeypatch):
    """A small pass, its latents made larger, and a second pass from there: what diffusers does with
    three pipelines."""
    pipeline, oracle = tiny_ltx_pipeline(LTXConditionPipeline, "0.9.5"), tiny_upsampler()
    pipeline.save_pretrained(tmp_path / "model")
    oracle.save_pretrained(tmp_path / "upsampler")
    words = {"prompt": "a red panda", "negative_prompt": "ugly", "guidance_scale": 3.0}
    base = sora.VideoRequest(
        **words, height=32, width=32, num_frames=9, num_inference_steps=3, seed=5
    )
    stage = tasks.Stage(scale=2, strength=0.6, steps=5, upsampler=tmp_path / "upsampler")
    with sora.Engine.from_pretrained(tmp_path / "model", device="cpu") as engine:
        small = engine.generate(base)
        job = sora.submit_cascade(tasks.cascade(base, [stage]), engine)
        made = job.result(120)
    vae, module = pipeline.vae, "diffusers.pipelines.ltx.pipeline_ltx_condition"
    larger = pipeline._normalize_latents(
        oracle(small.latents[None]), vae.latents_mean, vae.latents_std
    )
    noise = initial_noise(5, tuple(larger.shape[1:]))[None]
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: noise.clone())
    want = pipeline(
        **words, height=64, width=64, num_frames=9, num_inference_steps=5, latents=larger,
        denoise_strength=0.6, output_type="latent",
    ).frames  # fmt: skip
    want = pipeline._denormalize_latents(want, vae.latents_mean, vae.latents_std)[0]
    assert made.frames.shape == (9, 64, 64, 3)
    assert relative(made.latents, want) < TOLERANCE
    assert relative(made.latents, pipeline._denormalize_latents(
        larger, vae.latents_mean, vae.latents_std)[0]) > 100 * TOLERANCE  # fmt: skip
    assert job.progress.steps_done == job.progress.num_steps == 3 + 3
    assert [stage["noise"] for stage in made.receipt.stages] == ["seed"]


def test_latents_of_another_size_are_refused(tmp_path):
    pipeline = tiny_ltx_pipeline(LTXConditionPipeline, "0.9.5")
    pipeline.save_pretrained(tmp_path / "model")
    tiny_upsampler().save_pretrained(tmp_path / "upsampler")
    base = sora.VideoRequest(
        "waves", height=32, width=32, num_frames=9, num_inference_steps=1, guidance_scale=1.0
    )
    stage = tasks.Stage(scale=3, strength=0.6, steps=2, upsampler=tmp_path / "upsampler")
    message = r"makes latents of \[8, 2, 8, 8\].*\[8, 2, 12, 12\]"
    with (
        sora.Engine.from_pretrained(tmp_path / "model", device="cpu") as engine,
        pytest.raises(RequestError, match=message),
    ):
        sora.submit_cascade(tasks.cascade(base, [stage]), engine).result(60)
