"""What a frame of the meadow shows, read back by comparing it with pictures of all that can be.

The last frame of an action shows whole tiles. A frame is read in the look that it has: which that
is, is read too, or said.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from examples.meadow.world import (
    BERRIES,
    CENTRE,
    GROUNDS,
    KINDS,
    PAINTS,
    STEPS,
    TILE,
    VIEW,
    Look,
    draw_player,
)

UNREADABLE = 40.0
"""Root of the mean squared distance from the nearest picture, in levels, from which on a tile is
none."""
FACINGS = tuple(STEPS)


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one frame: the kinds of its tiles `[VIEW, VIEW]`, where the player looks, and how far each
    tile is from the nearest picture, in levels `[VIEW, VIEW]`."""

    tiles: np.ndarray
    facing: str
    distance: np.ndarray

    @property
    def unreadable(self) -> int:
        """How many tiles are none."""
        return int((self.distance > UNREADABLE).sum())


def read(frame: np.ndarray, look: Look) -> Reading:
    """Read a frame `[SIDE, SIDE, 3]` in levels (uint8 or float)."""
    parts = frame.astype(np.float32).reshape(VIEW, TILE, VIEW, TILE, 3).transpose(0, 2, 1, 3, 4)
    parts = parts.reshape(VIEW * VIEW, -1)
    tiles, player = _pictures(look)
    distances = _distances(parts, tiles)
    kinds, distance = distances.argmin(axis=1), distances.min(axis=1)
    middle = CENTRE * VIEW + CENTRE
    at_player = _distances(parts[middle : middle + 1], player)[0]
    best = int(at_player.argmin())
    kinds[middle], distance[middle] = best // len(FACINGS), at_player[best]
    return Reading(
        kinds.reshape(VIEW, VIEW), FACINGS[best % len(FACINGS)], distance.reshape(VIEW, VIEW)
    )


def look_of(frame: np.ndarray) -> Look:
    """The look in which a frame is read with the least distance. Colours of what is not in sight
    are any."""
    looks = [Look(g, b, p) for g in GROUNDS for b in BERRIES for p in PAINTS]
    return min(looks, key=lambda look: float(read(frame, look).distance.mean()))


def _distances(parts: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Root mean squared distances `[n, pictures]`."""
    return np.sqrt(np.square(parts[:, None] - pictures[None]).mean(axis=2))


@functools.lru_cache(maxsize=64)
def _pictures(look: Look) -> tuple[np.ndarray, np.ndarray]:
    """Of tiles `[6, values]`, and of tiles with the player on them `[24, values]`."""
    textures = look.textures()
    players = np.repeat(textures[:, None], len(FACINGS), axis=1).copy()
    for kind in range(len(KINDS)):
        for i, facing in enumerate(FACINGS):
            draw_player(players[kind, i], facing)
    tiles = textures.reshape(len(KINDS), -1).astype(np.float32)
    return tiles, players.reshape(len(KINDS) * len(FACINGS), -1).astype(np.float32)
