"""VACE against diffusers' `WanVACEPipeline`, on tiny sharpened random weights at fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sora_engine as sora
from sora_engine.errors import CheckpointError
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.shapes import infer_config
from tests.parity.oracles import relative_error, tiny_pipeline

HEIGHT, WIDTH, FRAMES = 32, 48, 9
SHARED = {
    "prompt": "a red circle moves right",
    "negative_prompt": "blue square",
    "height": HEIGHT,
    "width": WIDTH,
    "num_frames": FRAMES,
    "num_inference_steps": 5,
    "guidance_scale": 4.0,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def build(kind: str):
        if kind not in made:
            pipe = tiny_pipeline(kind, 0)
            folder = tmp_path_factory.mktemp(kind)
            pipe.save_pretrained(folder)
            made[kind] = pipe, sora.Engine.from_pretrained(folder, device="cpu"), folder
        return made[kind]

    yield build
    for _, engine, _ in made.values():
        engine.close()


def a_clip(seed: int = 0) -> np.ndarray:
    shape = (FRAMES, HEIGHT, WIDTH, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def masks() -> dict[str, np.ndarray]:
    """True where known, by name."""
    every = np.zeros((FRAMES, HEIGHT, WIDTH), bool)
    first, ends, left = every.copy(), every.copy(), every.copy()
    first[:1] = True
    ends[[0, 1, 2, 7, 8]] = True
    left[:, 5:, :21] = True  # off the grid of latents: VACE takes masks by the pixel
    moving = np.stack([np.roll(left[0], 3 * i, axis=1) for i in range(FRAMES)])
    return {"nothing": every, "first": first, "ends": ends, "left": left, "moving": moving}


def theirs(pipe, clip: np.ndarray, known: np.ndarray) -> torch.Tensor:
    """diffusers' final latents, as its VAE's decoder takes them."""
    video = torch.from_numpy(np.where(known[..., None], clip / 255.0, 0.5)).permute(0, 3, 1, 2)
    mask = torch.from_numpy(~known).float()[:, None].expand(-1, 3, -1, -1)
    latents = pipe(
        **SHARED,
        video=video.float()[None],
        mask=mask[None],
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
    ).frames[0]
    config = pipe.vae.config
    mean, std = (
        torch.tensor(v)[:, None, None, None] for v in (config.latents_mean, config.latents_std)
    )
    return latents * std + mean


@pytest.mark.parametrize("name", masks())
def test_final_latents_equal_diffusers(pair, name):
    pipe, engine, _ = pair("vace")
    clip, known = a_clip(), masks()[name]
    clips = [sora.Clip(clip, mask=known)] if known.any() else []
    video = engine.generate(sora.VideoRequest(**SHARED, seed=1, clips=clips))
    assert relative_error(video.latents, theirs(pipe, clip, known)) < 1e-4


def test_two_experts(pair):
    pipe, engine, _ = pair("vace-a14b")
    clip, known = a_clip(), masks()["ends"]
    request = sora.VideoRequest(**SHARED, seed=1, clips=[sora.Clip(clip, mask=known)])
    assert relative_error(engine.generate(request).latents, theirs(pipe, clip, known)) < 1e-4


def test_the_comparison_would_notice(pair):
    """Another mask, other content and weaker control blocks all move the latents by far more."""
    pipe, engine, _ = pair("vace")
    clip, known = a_clip(), masks()
    expected = theirs(pipe, clip, known["left"])
    for other in (
        sora.Clip(clip, mask=known["moving"]),
        sora.Clip(a_clip(1), mask=known["left"]),
    ):
        video = engine.generate(sora.VideoRequest(**SHARED, seed=1, clips=[other]))
        assert relative_error(video.latents, expected) > 1e-2
    block = engine.model.transformer(0).vace_blocks[1]
    weight = block.proj_out.weight
    with torch.no_grad():
        weight.mul_(0.9)
    try:
        request = sora.VideoRequest(**SHARED, seed=1, clips=[sora.Clip(clip, mask=known["left"])])
        assert relative_error(engine.generate(request).latents, expected) > 1e-3
    finally:
        with torch.no_grad():
            weight.div_(0.9)


def test_windows_and_loops_take_their_part_of_the_control(pair):
    """A window's control is that of its own frames: windows of one length change the result, the
    plain path by one window does not; a loop of known frames runs."""
    _, engine, _ = pair("vace")
    clips = [sora.Clip(a_clip(), mask=masks()["left"])]
    request = sora.VideoRequest(**SHARED, seed=1, clips=clips)
    plain = engine.generate(request).latents
    whole = sora.VideoRequest(**SHARED, seed=1, clips=clips, window=sora.WindowPlan(3, 1))
    assert torch.equal(engine.generate(whole).latents, plain)
    values = {**SHARED, "num_frames": 8}
    loop = sora.VideoRequest(**values, seed=1, clips=[sora.Clip(a_clip()[:4])], loop=True)
    assert engine.generate(loop).latents.shape[1] == 2


def test_two_requests_share_a_batch(pair):
    """Other controls beside it change nothing; what is measured of a model holds for VACE too."""
    from sora_engine.runtime.saturation import measure_saturation

    _, engine, _ = pair("vace")
    requests = [
        sora.VideoRequest(**SHARED, seed=1, clips=[sora.Clip(a_clip(i), mask=masks()[name])])
        for i, name in enumerate(("left", "ends"))
    ]
    alone = [engine.generate(request).latents for request in requests]
    for video, latents in zip(engine.generate(requests), alone, strict=True):
        assert relative_error(video.latents, latents) < 1e-5
    assert measure_saturation(engine.model, 128) > 0


def test_a_file_under_wans_own_names_is_the_same_model(pair, tmp_path):
    """Configuration from the shapes, and VACE's own names of the projections."""
    _, _, folder = pair("vace")
    (path,) = (folder / "transformer").glob("*.safetensors")
    weights = load_file(path)
    config = infer_config({k: tuple(v.shape) for k, v in weights.items()}, head_dim=12, path=path)
    assert config.vace_layers == (0, 2)
    assert config.vace_in_channels == 96
    own = {
        k.replace("proj_in", "before_proj").replace("proj_out", "after_proj")
        if k.startswith("vace_blocks")
        else k: v
        for k, v in weights.items()
    }
    save_file(own, tmp_path / "vace.safetensors")
    from sora_engine.io.safetensors import Weights
    from sora_engine.models.wan.names import to_diffusers_name

    with Weights.open(tmp_path / "vace.safetensors") as opened:
        assert {to_diffusers_name(name) for name in opened} == set(weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vace_layers": [2, 0]}, "must rise from 0 to at most 3"),
        ({"vace_layers": [1, 2]}, "must rise from 0"),
        ({"vace_layers": [0, 4]}, "at most 3"),
        ({"vace_layers": "all"}, "vace_layers is 'all'"),
        ({"vace_in_channels": 0}, "vace_in_channels is 0"),
        ({"_class_name": "WanTransformer3DModel"}, "unknown configuration keys"),
    ],
)
def test_bad_configurations(change, message):
    values = {"_class_name": "WanVACETransformer3DModel", "num_layers": 4}
    values |= {"vace_layers": [0, 2], "vace_in_channels": 96}
    assert WanConfig.from_dict(WanConfig.from_dict(values).to_dict()) == WanConfig.from_dict(values)
    with pytest.raises(CheckpointError, match=message):
        WanConfig.from_dict({**values, **change})
