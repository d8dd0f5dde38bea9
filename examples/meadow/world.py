"""The meadow: a world of tiles, larger than what is seen of it, in which a player walks and acts.

Its map is a torus: who walks far enough in one way comes home. The camera keeps the player in the
middle, so a step pans the picture by one tile. One action is taken a latent frame, which is four
frames of video: stay, walk one tile up, down, left or right, or act on the tile under the player: a
berry is eaten and leaves earth, anything else is painted.

Everything is exact: `World.step` draws the frames of an action, and `World.tiles` is what is so.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

VIEW, TILE, FRAMES = 8, 8, 4
"""Tiles of a side of the view, pixels of a tile's side, frames of an action."""
SIDE = VIEW * TILE
"""Pixels of a side of the view."""
CENTRE = VIEW // 2
"""The player's tile in the view."""
MAP = 20
"""Tiles of a side of the map, unless it is told otherwise."""

KINDS = ("grass", "flower", "stone", "berry", "earth", "paint")
GRASS, FLOWER, STONE, BERRY, EARTH, PAINT = range(6)
SHARES = (0.66, 0.10, 0.08, 0.16)
"""Of the kinds that a new map has, how much of it each covers."""

BUTTONS = ("up", "down", "left", "right", "act")
"""What can be pressed; nothing is pressed to stay."""
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
"""Tiles down and right that the player, and the camera, moves by."""
OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}

Colour = tuple[int, int, int]
GROUNDS: dict[str, tuple[Colour, Colour]] = {
    "green": ((90, 170, 80), (60, 130, 55)),
    "sandy": ((215, 190, 125), (180, 150, 90)),
    "snowy": ((225, 232, 240), (180, 195, 215)),
}
BERRIES: dict[str, Colour] = {
    "red": (215, 30, 50),
    "purple": (140, 40, 175),
    "orange": (240, 130, 20),
    "black": (30, 30, 40),
}
PAINTS: dict[str, tuple[Colour, Colour]] = {
    "blue": ((50, 70, 225), (30, 40, 160)),
    "pink": ((245, 110, 185), (190, 60, 130)),
    "teal": ((20, 175, 170), (10, 115, 115)),
    "brown": ((150, 90, 30), (100, 55, 15)),
}
FLOWERS: Colour = (250, 225, 60)
STONES: tuple[Colour, Colour] = ((120, 120, 130), (80, 80, 90))
SOIL: tuple[Colour, Colour] = ((95, 65, 50), (60, 40, 30))
BODY, NOSE = (255, 255, 255), (20, 20, 20)


@dataclass(frozen=True, slots=True)
class Look:
    """What a caption names: the colours of ground, berries and paint."""

    ground: str = "green"
    berries: str = "red"
    paint: str = "blue"

    def caption(self) -> str:
        return f"a {self.ground} meadow with {self.berries} berries and {self.paint} paint"

    def textures(self) -> np.ndarray:
        """Pictures of the kinds of tiles, uint8 `[6, TILE, TILE, 3]`."""
        pictures = np.zeros((len(KINDS), TILE, TILE, 3), np.uint8)
        ground, blades = GROUNDS[self.ground]
        pictures[[GRASS, FLOWER, BERRY]] = ground
        pictures[GRASS][1, 1] = pictures[GRASS][5, 4] = blades
        pictures[FLOWER][1:7, 1:7] = FLOWERS
        pictures[BERRY][1:7, 1:7] = BERRIES[self.berries]
        for kind, (inside, edge) in (
            (STONE, STONES),
            (EARTH, SOIL),
            (PAINT, PAINTS[self.paint]),
        ):
            pictures[kind] = inside
            pictures[kind][0] = pictures[kind][:, 0] = edge
        return pictures


def some_look(rng: random.Random) -> Look:
    """One of the 48."""
    return Look(rng.choice(list(GROUNDS)), rng.choice(list(BERRIES)), rng.choice(list(PAINTS)))


def draw_player(tile: np.ndarray, facing: str) -> None:
    """Draw the player over a tile `[TILE, TILE, 3]`: a square with a nose where it looks."""
    tile[2:6, 2:6] = BODY
    down, right = STEPS[facing]
    top, left = 3 + 2 * down, 3 + 2 * right
    tile[top : top + 2, left : left + 2] = NOSE


class World:
    """A map with a player on it.

    tiles: kinds, int `[N, N]`. place: the player's tile, (row, column). facing: where it looks.
    """

    def __init__(
        self, rng: random.Random, look: Look | None = None, side: int = MAP, at: int | None = None
    ) -> None:
        self.look = look or some_look(rng)
        draws = np.random.default_rng(rng.getrandbits(32) if at is None else at)
        self.tiles = draws.choice(len(SHARES), (side, side), p=SHARES)
        self.place = (rng.randrange(side), rng.randrange(side))
        self.facing = "down"
        self._textures = self.look.textures()

    @property
    def side(self) -> int:
        return len(self.tiles)

    def step(self, button: str | None, *, draw: bool = True) -> np.ndarray | None:
        """Take one action; the frames of it, uint8 `[FRAMES, SIDE, SIDE, 3]`, where they are drawn.

        The view moves within the action's frames; what is acted on changes halfway through them.
        """
        moved = STEPS.get(button or "", (0, 0))
        if button in STEPS:
            self.facing = button
        picture = self._picture() if draw else None
        top, left = ((at - CENTRE) * TILE for at in self.place)
        shown = []
        if button == "act":
            before = self._crop(picture, top, left)
            here = self.tiles[self.place]
            self.tiles[self.place] = EARTH if here == BERRY else PAINT
            after = self._crop(self._picture() if draw else None, top, left)
            shown = [before] * (FRAMES // 2) + [after] * (FRAMES // 2)
        else:
            for i in range(1, FRAMES + 1):
                pan = TILE * i // FRAMES
                shown.append(self._crop(picture, top + moved[0] * pan, left + moved[1] * pan))
            row, column = (at + by for at, by in zip(self.place, moved, strict=True))
            self.place = (row % self.side, column % self.side)
        return np.stack(shown) if draw else None

    def view(self) -> np.ndarray:
        """What is seen now, uint8 `[SIDE, SIDE, 3]`."""
        top, left = ((at - CENTRE) * TILE for at in self.place)
        return self._crop(self._picture(), top, left)

    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the map's tiles in view, `[VIEW, VIEW]` each."""
        return in_view(self.place, self.side)

    def _picture(self) -> np.ndarray:
        size = self.side * TILE
        return self._textures[self.tiles].transpose(0, 2, 1, 3, 4).reshape(size, size, 3)

    def _crop(self, picture: np.ndarray | None, top: int, left: int) -> np.ndarray:
        if picture is None:
            return np.empty(0, np.uint8)
        size = self.side * TILE
        rows, columns = (np.arange(at, at + SIDE) % size for at in (top, left))
        frame = picture[rows][:, columns]
        low = CENTRE * TILE
        draw_player(frame[low : low + TILE, low : low + TILE], self.facing)
        return frame


def in_view(place: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the tiles that a player at `place` sees, `[VIEW, VIEW]` each."""
    around = np.arange(VIEW) - CENTRE
    rows, columns = ((at + around) % side for at in place)
    return np.meshgrid(rows, columns, indexing="ij")


def some_walk(rng: random.Random, steps: int) -> list[str | None]:
    """A walk that goes on in one way, turns, turns back at times, acts, and rests."""
    walk: list[str | None] = []
    way = rng.choice(list(STEPS))
    while len(walk) < steps:
        chance = rng.random()
        if chance < 0.15:
            walk.append("act")
        elif chance < 0.19:
            walk.append(None)
        elif chance < 0.34:
            way = rng.choice(list(STEPS))
            walk.append(way)
        elif chance < 0.40:
            way = OPPOSITE[way]
            walk += [way] * rng.randint(2, 7)
        else:
            walk.append(way)
    return walk[:steps]


def film(world: World, walk: Sequence[str | None]) -> np.ndarray:
    """The view at the beginning and the frames of all actions, uint8 `[1 + 4 n, SIDE, SIDE, 3]`."""
    parts = [world.view()[None]]
    for button in walk:
        frames = world.step(button)
        assert frames is not None
        parts.append(frames)
    return np.concatenate(parts)
