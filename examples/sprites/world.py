"""The sprite world: plain shapes that move on plain backgrounds, with exact captions.

The world is stationary: any stretch of an endless clip fits its caption. Straight motion wraps
round the frame's edges, ``bounces`` and ``orbits`` go on for ever, ``grows`` pulses. A clip begins
with a bouncing sprite on its ground and a growing one at its smallest: of several phases to begin
with, a model that looks through much noise would see the mean, which stays still. Sprites are as
large and as fast in a wide frame as in a small one, and start on a grid of 8 pixels: what a model
learns of a sprite in a small frame holds in every other, and straight motion covers one step of the
grid in the 4 frames of a latent.
Shapes are signed distance functions, so edges are anti-aliased analytically.

With two sprites each keeps to its own half of the frame: one above the other where something moves
sideways, side by side where something moves up or down. So two sprites never hide one another, and
a caption never pairs a sideways motion with an upright one.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 20, 30),
    "green": (0, 150, 50),
    "blue": (20, 60, 230),
    "yellow": (255, 225, 0),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "purple": (140, 20, 170),
    "orange": (255, 125, 0),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "blue": (20, 60, 230),
    "green": (0, 150, 50),
    "yellow": (255, 225, 0),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star")
SIZES: dict[str, float] = {"small": 10.0, "large": 14.0}  # radii
MOTIONS: dict[str, str] = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "still": "stays still",
    "bounces": "bounces",
    "orbits": "orbits",
    "grows": "grows",
}
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# Pixels and frames.
GRID, PHASES = 8, 4  # places and phases are multiples of these
SPEED = 2.0
BOUNCE_PERIOD, BOUNCE_HEIGHT = 16, 16.0
ORBIT_PERIOD, ORBIT_RADIUS = 16, 8.0
GROW_PERIOD, GROW_RADII = 8, (8.0, 15.0)

# For each shape: the farthest point from its centroid and its area, in units of the radius and of
# its square. Areas are near a circle's, so that "small" and "large" mean one thing for all.
EXTENT = {"circle": 1.0, "square": 0.92, "triangle": 1.3, "diamond": 1.25, "star": 1.25}
STAR_INNER = 0.48
AREA = {
    "circle": math.pi,
    "square": 4 * EXTENT["square"] ** 2,
    "triangle": 0.75 * math.sqrt(3) * EXTENT["triangle"] ** 2,
    "diamond": 2 * EXTENT["diamond"] ** 2,
    "star": 5 * STAR_INNER * math.sin(math.pi / 5) * EXTENT["star"] ** 2,
}


@dataclass(frozen=True)
class Sprite:
    """One object. `x`, `y` are the centre of its path in pixels, `phase` is in frames.

    `swing` is how far it bounces, orbits or grows, as a share of what the world's sprites do: 1.
    """

    colour: str
    shape: str
    size: str
    motion: str
    x: float
    y: float
    phase: float
    swing: float = 1.0

    def path(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centre x, y and radius in pixels at each of `frames` (float [n])."""
        t = frames + self.phase
        x, y = torch.full_like(t, self.x), torch.full_like(t, self.y)
        radius = torch.full_like(t, SIZES[self.size])
        if self.motion in STEPS:
            dx, dy = STEPS[self.motion]
            x, y = x + dx * SPEED * t, y + dy * SPEED * t
        elif self.motion == "bounces":
            part = torch.remainder(t / BOUNCE_PERIOD, 1.0)
            y = y + BOUNCE_HEIGHT * (0.5 - self.swing * 4 * part * (1 - part))
        elif self.motion == "orbits":
            turn = 2 * math.pi * t / ORBIT_PERIOD
            reach = self.swing * ORBIT_RADIUS
            x, y = x + reach * torch.cos(turn), y + reach * torch.sin(turn)
        elif self.motion == "grows":
            low, high = GROW_RADII
            pulse = 0.5 - 0.5 * torch.cos(2 * math.pi * t / GROW_PERIOD)
            radius = low + self.swing * (high - low) * pulse
        return x, y, radius


@dataclass(frozen=True)
class Scene:
    """A background, one or two sprites and the frame's size in pixels."""

    background: str
    sprites: tuple[Sprite, ...]
    height: int
    width: int

    def render(
        self,
        num_frames: int,
        start: int = 0,
        *,
        crop: tuple[int, int, int, int] | None = None,
        device: str = "cpu",
    ) -> Tensor:
        """Frames `start` to `start + num_frames`, float32 [n, height, width, 3] in [0, 1].

        `crop` is (top, left, height, width) of the part of the frame to render.
        """
        top, left, height, width = crop or (0, 0, self.height, self.width)
        frames = torch.arange(start, start + num_frames, dtype=torch.float32, device=device)
        ys = torch.arange(top, top + height, dtype=torch.float32, device=device) + 0.5
        xs = torch.arange(left, left + width, dtype=torch.float32, device=device) + 0.5
        colour = torch.tensor(BACKGROUNDS[self.background], device=device) / 255.0
        video = colour.expand(num_frames, height, width, 3)
        for sprite in self.sprites:
            cx, cy, radius = sprite.path(frames)
            dx = _wrap(xs - cx[:, None], self.width)[:, None, :]
            dy = _wrap(ys - cy[:, None], self.height)[:, :, None]
            cover = (0.5 - distance(sprite.shape, dx, dy, radius[:, None, None])).clamp_(0, 1)
            paint = torch.tensor(COLOURS[sprite.colour], device=device) / 255.0
            video = torch.lerp(video, paint.expand_as(video), cover[..., None])
        return video

    def caption(
        self,
        rng: random.Random | None = None,
        *,
        size: bool = False,
        tells: float = 0.92,
        looks: float | None = None,
    ) -> str:
        """The scene in words. With `rng`, each attribute is told with a chance of `tells`.

        Without it, all but the sizes are said; `size` adds those. looks: the chance of colours,
        shapes and sizes, where it is another one.
        """
        of_looks = tells if looks is None else looks

        def said(chance: float) -> bool:
            return rng is None or rng.random() < chance

        phrases = []
        for sprite in self.sprites:
            words = []
            sized = size if rng is None else rng.random() < min(0.5, of_looks)
            if sprite.motion != "grows" and sized:
                words.append(sprite.size)
            if said(of_looks):
                words.append(sprite.colour)
            words.append(sprite.shape if said(of_looks) else "shape")
            article = "an" if words[0][0] in "aeiou" else "a"
            motion = [MOTIONS[sprite.motion]] if said(tells) else []
            phrases.append(" ".join([article, *words, *motion]))
        text = " and ".join(phrases)
        return f"{text} on a {self.background} background" if said(tells) else text


def distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor | float) -> Tensor:
    """Signed distance in pixels from a shape's edge (negative inside); `dx`, `dy` broadcast."""
    if shape == "circle":
        return torch.sqrt(dx * dx + dy * dy) - radius
    reach = EXTENT[shape] * radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - reach
    if shape == "diamond":
        return (dx.abs() + dy.abs() - reach) * math.sqrt(0.5)
    if shape == "triangle":
        side = dx.abs() * math.cos(math.pi / 6) - dy * 0.5
        return torch.maximum(side, dy.expand_as(side)) - 0.5 * reach
    if shape == "star":
        sector = 2 * math.pi / 5
        angle = torch.remainder(torch.atan2(dx, -dy) + sector / 2, sector) - sector / 2
        length = torch.sqrt(dx * dx + dy * dy)
        along, across = length * torch.cos(angle), length * torch.sin(angle).abs()
        # The edge from the outer tip (1, 0) to the inner corner, in units of the reach.
        ex, ey = STAR_INNER * math.cos(sector / 2) - 1, STAR_INNER * math.sin(sector / 2)
        norm = math.hypot(ex, ey)
        return (along - reach) * (ey / norm) - across * (ex / norm)
    raise ValueError(f"no shape called {shape!r}; there are {', '.join(SHAPES)}")


def held_out(scene: Scene) -> bool:
    """Whether evaluation alone may show this scene: a fixed eighth of all combinations."""
    return any(
        zlib.crc32(f"{s.colour} {s.shape} {s.motion} {scene.background}".encode()) % 8 == 0
        for s in scene.sprites
    )


def sample_scene(
    rng: random.Random,
    height: int,
    width: int,
    *,
    sprites: int | None = None,
    unseen: bool = False,
) -> Scene:
    """A random scene of `sprites` (None: mostly one, at times two) from the training
    combinations, or with `unseen` from those that training never shows."""
    while True:
        count = sprites or (2 if rng.random() < 0.3 else 1)
        scene = _sample(rng, height, width, count)
        if scene is not None and held_out(scene) == unseen:
            return scene


def _sample(rng: random.Random, height: int, width: int, count: int) -> Scene | None:
    background = rng.choice(list(BACKGROUNDS))
    colours = rng.sample([c for c in COLOURS if c != background], count)
    motions = [rng.choice(list(MOTIONS)) for _ in range(count)]
    sizes = [rng.choice(list(SIZES)) for _ in range(count)]
    shapes = [rng.choice(SHAPES) for _ in range(count)]
    lane = count == 2
    sideways = any(m in ("left", "right") for m in motions)
    upright = any(m in ("up", "down") for m in motions)
    if lane and sideways and upright:
        return None
    stacked = sideways or (
        not upright and (height > width or (height == width and rng.random() < 0.5))
    )
    first = rng.randrange(2)
    sprites = []
    for i in range(count):
        motion, shape, size = motions[i], shapes[i], sizes[i]
        if motion == "grows":
            size = "small"
        box_x, box_y = [0.0, float(width)], [0.0, float(height)]
        if lane:
            half = (i + first) % 2
            box, length = (box_y, height) if stacked else (box_x, width)
            box[0], box[1] = 0.5 * length * half, 0.5 * length * (half + 1)
        reach = GROW_RADII[1] if motion == "grows" else SIZES[size]
        top = side = reach * EXTENT[shape]
        bottom = top
        if shape == "triangle":
            side, bottom = top * math.cos(math.pi / 6), top / 2
        if motion == "bounces":
            top, bottom = top + BOUNCE_HEIGHT / 2, bottom + BOUNCE_HEIGHT / 2
        elif motion == "orbits":
            top, bottom, side = top + ORBIT_RADIUS, bottom + ORBIT_RADIUS, side + ORBIT_RADIUS
        # Straight motion goes all round the frame.
        x = (
            _between(rng, 0, width - GRID)
            if motion in ("left", "right")
            else _between(rng, box_x[0] + side, box_x[1] - side)
        )
        y = (
            _between(rng, 0, height - GRID)
            if motion in ("up", "down")
            else _between(rng, box_y[0] + top, box_y[1] - bottom)
        )
        if x is None or y is None:
            return None
        # Straight motion starts anywhere by its place alone.
        phase = float(rng.randrange(0, ORBIT_PERIOD, PHASES)) if motion == "orbits" else 0.0
        sprites.append(Sprite(colours[i], shape, size, motion, x, y, phase))
    return Scene(background, tuple(sprites), height, width)


def _between(rng: random.Random, low: float, high: float) -> float | None:
    """A place on the grid in [low, high]; None where there is none."""
    first, last = math.ceil(low / GRID), math.floor(high / GRID)
    return float(GRID * rng.randint(first, last)) if first <= last else None


def _wrap(offset: Tensor, period: int) -> Tensor:
    return torch.remainder(offset + 0.5 * period, period) - 0.5 * period
