"""Fits what the sprites' latents look like, for previews: one linear map to colours.

    python examples/sprites/fit_preview.py

Writes `latent_rgb.json` into the checkpoint. It belongs to the VAE: fit it anew when that changes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import train_vae
import world
from torch import Tensor

import sora_engine
from sora_engine.denoise.preview import LatentPreview, pooled_colours
from sora_engine.vae.wan import WanVAE

CHECKPOINT = Path(sora_engine.__file__).parent / "checkpoints" / "sprites"


@torch.inference_mode()
def pair(vae: WanVAE, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Latents `[C, T, h, w]` of a clip, float `[n, H, W, 3]` in 0 to 1, and the mean colours
    `[3, T, h, w]` of the pixels that each of them stands for."""
    latents = vae.encode(clip.permute(3, 0, 1, 2)[None] * 2 - 1)[0]
    frames = (clip * 255).round().to(torch.uint8)
    return latents, pooled_colours(frames, vae.scale_factor_temporal, tuple(latents.shape[2:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--clips", type=int, default=48)
    arguments = parser.parse_args()
    vae = train_vae.load_vae(arguments.model / "vae")
    rng = random.Random(0)
    sides = train_vae.SIDES
    clips = [
        world.sample_scene(rng, rng.choice(sides), rng.choice(sides)).render(rng.choice((1, 9, 17)))
        for _ in range(arguments.clips)
    ]
    preview = LatentPreview.fit([pair(vae, clip) for clip in clips])
    error = torch.cat(
        [
            (preview.colours(latents) - colours).flatten()
            for latents, colours in (pair(vae, clip) for clip in train_vae.unseen_clips(10))
        ]
    )
    print(f"off by {error.square().mean().sqrt():.3f} (of 1) on unseen clips")
    print(preview.write(arguments.model))


if __name__ == "__main__":
    main()
