"""The trained VAE of the sprites: what its round trip keeps, and diffusers' own class on it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sprites"))

import reader
import train_vae
import world

FOLDER = Path(__file__).parents[2] / "sora_engine" / "checkpoints" / "sprites" / "vae"


@pytest.fixture(scope="module")
def vae() -> train_vae.WanVAE:
    return train_vae.load_vae(FOLDER)


@pytest.mark.parametrize(("first", "last"), [(5, 10), pytest.param(0, 20, marks=pytest.mark.slow)])
def test_keeps_unseen_clips(vae: train_vae.WanVAE, first: int, last: int) -> None:
    """All 20, or five of the five sizes, whose mean is nearest to that of all (32.3 and 32.5)."""
    clips = train_vae.unseen_clips(last)[first:]
    scores = [train_vae.psnr(train_vae.round_trip(vae, clip), clip) for clip in clips]
    assert np.mean(scores) > 32


def test_what_a_clip_shows_survives_the_round_trip(vae: train_vae.WanVAE) -> None:
    sprite = world.Sprite("purple", "star", "large", "orbits", 32.0, 34.0, 3.0)
    scene = world.Scene("yellow", (sprite,), 64, 80)
    reading = reader.read(train_vae.round_trip(vae, scene.render(17)))
    (got,) = reading.sprites
    assert reading.background == "yellow"
    assert (got.colour, got.shape, got.size, got.motion) == ("purple", "star", "large", "orbits")


def test_latents_are_normalised_by_the_configuration(vae: train_vae.WanVAE) -> None:
    parts = []
    for seed in range(12):
        clip = train_vae.unseen_clips(2, seed=seed)[0]
        latents = vae.encode(clip.permute(3, 0, 1, 2)[None] * 2 - 1)
        parts.append(latents[0].flatten(1))
    values = torch.cat(parts, dim=1)
    assert values.mean().abs() < 0.15
    assert 0.75 < values.std() < 1.3


def test_equals_diffusers_own_class(vae: train_vae.WanVAE) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKLWan.from_pretrained(FOLDER, torch_dtype=torch.float32)
    clip = train_vae.unseen_clips(1)[0].permute(3, 0, 1, 2)[None] * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(clip).latent_dist.mean
        frames = theirs.decode(latents).sample
        ours = vae.denormalise(vae.encode(clip))
        torch.testing.assert_close(ours, latents, atol=1e-3, rtol=1e-3)
        restored = vae.decode(vae.encode(clip)).clamp(-1, 1)
        torch.testing.assert_close(restored, frames, atol=1e-3, rtol=1e-3)
