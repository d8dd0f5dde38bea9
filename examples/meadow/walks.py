"""Walks over meadows as clips to train on and to hold a model against."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from examples.meadow import world

SIDES = range(16, 33)
"""Of the maps, in tiles: a model that has seen one size alone would learn it by heart."""


def some_clip(
    rng: random.Random, steps: int, *, busy: bool = False
) -> tuple[np.ndarray, world.Look]:
    """A film of so many actions, uint8 `[1 + 4 steps, SIDE, SIDE, 3]`, and its look.

    busy: every kind of tile covers as much, paint and earth too, so that rare ones are seen.
    """
    meadow = world.World(rng, side=rng.choice(SIDES))
    if busy:
        kinds = np.random.default_rng(rng.getrandbits(32))
        meadow.tiles = kinds.integers(0, len(world.KINDS), meadow.tiles.shape)
    meadow.facing = rng.choice(list(world.STEPS))
    return world.film(meadow, world.some_walk(rng, steps)), meadow.look


def as_video(frames: np.ndarray) -> Tensor:
    """uint8 `[n, h, w, 3]` to float32 `[3, n, h, w]` in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def as_frames(video: Tensor) -> np.ndarray:
    """`[3, n, h, w]` in [-1, 1] to uint8 `[n, h, w, 3]`."""
    levels = (video.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return levels.permute(1, 2, 3, 0).numpy()
