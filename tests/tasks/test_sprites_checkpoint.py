"""The bundled checkpoint: its parts, its size, diffusers' own pipeline, what its clips show."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sora_engine as sora

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sprites"))

import reader

FOLDER = Path(sora.__file__).parent / "checkpoints" / "sprites"


def test_all_parts_are_there_and_small() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["expand_timesteps"] is True
    sizes = [file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(sizes) < 24e6
    for part in ("transformer", "vae", "text_encoder"):
        assert list((FOLDER / part).glob("*.safetensors")), part


def test_any_prompt_has_tokens() -> None:
    from sora_engine.text.umt5 import UMT5Encoder

    encoder = UMT5Encoder.from_folders(FOLDER / "text_encoder", FOLDER / "tokenizer")
    known, spelled, nothing = encoder.encode(
        ["a red circle moves right on a white background", "zebra!", ""]
    )
    assert len(known) == 10  # a token a word, and the end mark
    assert len(spelled) > 5
    assert len(nothing) == 1
    assert torch.isfinite(torch.cat([known, spelled, nothing])).all()


def test_equals_diffusers_own_pipeline() -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.WanPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(24, 3, 8, 12, generator=torch.Generator().manual_seed(5))
    prompt = "a red circle moves right on a white background"
    theirs = pipeline(
        prompt=prompt,
        negative_prompt="",
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=6,
        guidance_scale=3.0,
        latents=noise[None],
        output_type="np",
    ).frames[0]
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        ours = engine.generate(
            sora.VideoRequest(
                prompt,
                height=64,
                width=96,
                num_frames=9,
                num_inference_steps=6,
                guidance_scale=3.0,
                solver="unipc",  # the folder's scheduler, which draws no noise on its way
                latents=noise,
            )
        ).frames
    error = np.mean((ours / 255.0 - theirs) ** 2)
    assert -10 * np.log10(error + 1e-12) > 40


@pytest.mark.parametrize(
    ("every", "least"),
    [
        (5, {"background": 4, "colour": 4, "shape": 3, "motion": 3}),
        pytest.param(
            1,
            {"background": 15, "colour": 15, "shape": 13, "motion": 11},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_prompts_decide_what_clips_show(every: int, least: dict[str, int]) -> None:
    """Large sprites, 16 of them: chance is 2 to 4 for each of the four. Every fifth: each pair of
    colours, each shape and each motion once."""
    colours = [("red", "white"), ("blue", "white"), ("yellow", "blue"), ("white", "black")] * 4
    motions = {"moves right": "right", "moves up": "up", "stays still": "still"}
    motions["bounces"] = "bounces"
    shapes = ["circle", "square", "triangle", "star"]
    wanted = [
        (background, colour, shapes[i // 4], list(motions)[i % 4])
        for i, (colour, background) in enumerate(colours)
    ]
    requests = [
        sora.VideoRequest(f"a large {colour} {shape} {motion} on a {background} background", seed=i)
        for i, (background, colour, shape, motion) in enumerate(wanted)
    ][::every]
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        videos = engine.generate(requests)
    right = dict.fromkeys(least, 0)
    for video, (background, colour, shape, motion) in zip(videos, wanted[::every], strict=True):
        reading = reader.read(video.frames)
        first = reading.sprites[0] if reading.sprites else None
        right["background"] += reading.background == background
        right["colour"] += first is not None and first.colour == colour
        right["shape"] += first is not None and first.shape == shape
        right["motion"] += first is not None and first.motion == motions[motion]
    assert all(right[fact] >= count for fact, count in least.items()), right
