"""The whole path, from a prompt to final latents, against diffusers' pipelines."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from diffusers import WanVideoToVideoPipeline
from PIL import Image

import sora_engine as sora
from sora_engine.denoise import known as clips_module
from sora_engine.models.wan import model as model_module
from sora_engine.text.umt5 import UMT5Encoder
from tests.parity.oracles import KINDS, relative_error, takes_image, tiny_pipeline

PROMPT = "a red circle moves right"
NEGATIVE = "blue square"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Build a tiny pipeline, save it, load it here; each (kind, seed, scheduler) once."""
    made = {}

    def build(kind: str, seed: int = 0, scheduler: str = "unipc"):
        key = (kind, seed, scheduler)
        if key not in made:
            pipe = tiny_pipeline(kind, seed, scheduler)
            folder = tmp_path_factory.mktemp(f"{kind}-{seed}-{scheduler}")
            pipe.save_pretrained(folder)
            # What a test takes out of the model must not come from an earlier request's texts.
            limits = sora.Limits(text_cache_bytes=0)
            made[key] = pipe, sora.Engine.from_pretrained(folder, device="cpu", limits=limits)
        return made[key]

    yield build
    for _, engine in made.values():
        engine.close()


def an_image(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def run_both(pair, kind, *, seed=0, scheduler="unipc", size=(32, 48), frames=9, steps=6, **extra):
    """Final latents of diffusers and of the engine, both as the VAE decoder takes them."""
    pipe, engine = pair(kind, seed, scheduler)
    # TI2V-5B's VAE is 16x spatial, and its patch makes that 32.
    height, width = (s * 2 for s in size) if kind.startswith("ti2v") else size
    shared = {
        "prompt": extra.get("prompt", PROMPT),
        "negative_prompt": NEGATIVE,
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": steps,
        "guidance_scale": extra.get("guidance_scale", 4.0),
    }
    if kind.startswith("a14b"):
        shared["guidance_scale_2"] = extra.get("guidance_scale_2", 2.5)
    arguments, clips = dict(shared), []
    if takes_image(kind):
        arguments["image"] = an_image(width, height, seed)
        clips.append(sora.Clip(arguments["image"], at=0))
    if kind == "flf2v" or extra.get("last_image"):
        arguments["last_image"] = an_image(width, height, seed + 50)
        clips.append(sora.Clip(arguments["last_image"], at=frames - 1))
    expected = pipe(
        **arguments, output_type="latent", generator=torch.Generator().manual_seed(seed)
    ).frames[0]
    video = engine.generate(sora.VideoRequest(**shared, seed=seed, clips=clips))
    return denormalised(expected, pipe), video.latents, video, pipe


@pytest.fixture(scope="module")
def usual(pair):
    """What `run_both` makes of a kind by its defaults; each once."""
    return functools.cache(lambda kind: run_both(pair, kind))


def denormalised(latents, pipe):
    """diffusers' final latents, as its VAE's decoder takes them."""
    config = pipe.vae.config
    mean, std = (
        torch.tensor(values)[:, None, None, None]
        for values in (config.latents_mean, config.latents_std)
    )
    return latents * std + mean


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
@pytest.mark.parametrize("kind", KINDS)
def test_final_latents_equal_diffusers(pair, kind, scheduler):
    expected, actual, _, _ = run_both(pair, kind, scheduler=scheduler)
    assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize(
    ("kind", "seed", "size", "frames", "steps"),
    [
        ("t2v", 1, (16, 16), 1, 1),
        ("t2v", 2, (80, 16), 5, 10),
        ("i2v", 1, (48, 16), 5, 3),
        ("a14b-t2v", 1, (16, 112), 13, 8),
        ("a14b-i2v", 2, (48, 64), 5, 12),
        ("ti2v-5b", 2, (16, 48), 5, 4),
        ("ti2v-5b-i2v", 1, (48, 16), 17, 5),
    ],
)
def test_other_seeds_sizes_and_lengths(pair, kind, seed, size, frames, steps):
    expected, actual, _, _ = run_both(pair, kind, seed=seed, size=size, frames=frames, steps=steps)
    assert relative_error(actual, expected) < 1e-4


def test_last_image_without_image_embedding(pair):
    expected, actual, _, _ = run_both(pair, "a14b-i2v", last_image=True)
    assert relative_error(actual, expected) < 1e-4


def test_without_guidance(pair):
    expected, actual, _, _ = run_both(pair, "t2v", guidance_scale=1.0)
    assert relative_error(actual, expected) < 1e-4


def test_long_and_odd_prompts(pair):
    for prompt in ("", "cat &amp; “dog”  " * 3, "red " * 700):
        expected, actual, _, _ = run_both(pair, "t2v", prompt=prompt, steps=2)
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("kind", ["t2v", "ti2v-5b-i2v"])
def test_frames_equal_diffusers(usual, kind):
    """Decoded frames: diffusers' VAE on the engine's latents, and the engine's own."""
    _, latents, video, pipe = usual(kind)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents[None], return_dict=False)[0]
    frames = pipe.video_processor.postprocess_video(decoded, output_type="np")[0]
    expected = (frames * 255).round().astype(np.uint8)
    assert video.frames.shape == expected.shape
    difference = np.abs(video.frames.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_both_experts_are_used(pair):
    _, engine = pair("a14b-t2v")
    resolved = engine.resolve(sora.VideoRequest(PROMPT, num_inference_steps=6))
    from sora_engine.denoise.denoise import prepare

    timesteps = prepare(resolved, engine.model).solver.schedule.timesteps
    assert {engine.model.expert_at(t) for t in timesteps} == {0, 1}


def test_company_changes_nothing(pair):
    """Requests of several sizes, lengths, steps and tasks together, and each alone."""
    _, engine = pair("ti2v-5b-i2v")
    requests = [
        sora.VideoRequest(PROMPT, height=32, width=64, num_frames=5, num_inference_steps=4, seed=1),
        sora.VideoRequest("cat", height=64, width=32, num_frames=1, num_inference_steps=2, seed=2),
        sora.VideoRequest(
            "a blue square",
            height=96,
            width=32,
            num_frames=9,
            num_inference_steps=5,
            guidance_scale=1.0,
            seed=3,
        ),
        sora.VideoRequest(
            PROMPT,
            height=32,
            width=32,
            num_frames=13,
            num_inference_steps=3,
            clips=[sora.Clip(an_image(32, 32, 4), at=0)],
            seed=4,
        ),
    ]
    together = engine.generate(requests)
    for request, company in zip(requests, together, strict=True):
        alone = engine.generate(request)
        assert relative_error(company.latents, alone.latents) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left_out", ["rope", "text", "half a point of guidance", "image"])
def test_the_oracles_are_sharp(pair, usual, kind, left_out, monkeypatch):
    """Leaving out a part moves the latents by over 100 times the tolerance of parity."""
    if left_out == "image" and not takes_image(kind):
        pytest.skip("the task has no image")
    _, actual, _, _ = usual(kind)
    more = 0.0
    if left_out == "rope":
        flat = model_module.rope_tables

        def no_rotation(coords, config, places):
            cos, sin = flat(coords, config, places)
            return torch.ones_like(cos), torch.zeros_like(sin)

        monkeypatch.setattr(model_module, "rope_tables", no_rotation)
    elif left_out == "text":
        monkeypatch.setattr(
            UMT5Encoder, "encode", lambda self, prompts: [torch.zeros(1, 32) for _ in prompts]
        )
    elif left_out == "image":
        grey = lambda frames: torch.zeros(1, 3, *frames.shape[:3])  # noqa: E731
        monkeypatch.setattr(clips_module, "to_unit_range", grey)
    else:
        more = 0.5
    _, engine = pair(kind)
    height, width = (64, 96) if kind.startswith("ti2v") else (32, 48)
    clips = [sora.Clip(an_image(width, height, 0), at=0)] if takes_image(kind) else []
    if kind == "flf2v":
        clips.append(sora.Clip(an_image(width, height, 50), at=8))
    request = sora.VideoRequest(
        PROMPT,
        NEGATIVE,
        height=height,
        width=width,
        num_frames=9,
        num_inference_steps=6,
        guidance_scale=4.0 + more,
        guidance_scale_2=2.5 + more if kind.startswith("a14b") else None,
        seed=0,
        clips=clips,
    )
    assert relative_error(engine.generate(request).latents, actual) > 100 * 1e-4


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
@pytest.mark.parametrize("strength", [0.35, 0.8, 1.0])
def test_video_to_video(pair, scheduler, strength):
    """SDEdit: from a start video at the noise level of `strength`."""
    pipe, engine = pair("t2v", 0, scheduler)
    parts = ("text_encoder", "tokenizer", "vae", "scheduler", "transformer")
    oracle = WanVideoToVideoPipeline(**{name: getattr(pipe, name) for name in parts})
    oracle.set_progress_bar_config(disable=True)
    video = [an_image(48, 32, seed) for seed in range(9)]
    shared = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": 32,
        "width": 48,
        "num_inference_steps": 6,
        "guidance_scale": 4.0,
    }
    expected = oracle(
        video,
        strength=strength,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        **shared,
    ).frames[0]
    frames = np.stack([np.asarray(image) for image in video])
    actual = engine.generate(
        sora.VideoRequest(num_frames=9, init=frames, strength=strength, seed=3, **shared)
    )
    assert relative_error(actual.latents, denormalised(expected, pipe)) < 1e-4
