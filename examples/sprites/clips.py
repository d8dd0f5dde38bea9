"""Training clips as latents: a pool of them, the given frames and the noise levels of each."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import world
from torch import Tensor
from training import save

from sora_engine.vae.wan import WanVAE

# What takes longest to learn is drawn most: the chance to be kept of a drawn clip that shows it.
HARD = {"grows": 0.8, "star": 1.0, "bounces": 0.9, "orbits": 0.9, "diamond": 0.6}
EASY = 0.5
SHIFT = 5.0  # of the noise levels, in training and in the exported scheduler


@dataclass(frozen=True)
class Stage:
    """What sizes and lengths a stretch of training shows, and how many scenes have two sprites."""

    short_sides: tuple[int, ...]
    longest_side: int
    lengths: tuple[int, ...]
    two_sprites: float
    later: float = 0.2
    """The chance that a clip is a window from the middle of a longer one."""
    known: float = 0.3
    """The chance that some frames are given of a clip that begins with them."""
    known_later: float = 0.3
    """The same of a window from the middle."""
    anchored: float = 0.0
    """The chance that a window from the middle sees anchors: latents from elsewhere in its clip."""
    perturbed: float = 0.0
    """The chance that a clip is not noised itself, but with something of another in it."""


ALL_SIDES = (64, 64, 64, 64, 64, 64, 64, 80, 96, 96, 112, 128, 160)

# One scale of pixels first: there a sprite's edge has the fewest forms to learn. Then all. Then
# what long videos are made of: windows that go on from what those before them made.
STAGES = {
    "small": Stage((64,), 96, (1, 5, 9, 9, 17, 17), 0.15),
    "all": Stage(ALL_SIDES, 160, (1, 5, 9, 17, 17, 17, 33), 0.25),
    "long": Stage(
        ALL_SIDES,
        160,
        (1, 5, 9, 17, 17, 17, 33),
        0.05,
        later=0.4,
        known=0.4,
        known_later=0.75,
        anchored=0.8,
        perturbed=0.4,
    ),
}
SWINGS = ("bounces", "orbits", "grows")
ANCHORS = 2
"""Latents of a clip that its later windows see beside their own."""
STRAYED = 0.3
"""How often what an anchored window goes on from has strayed from what the anchors show."""


@dataclass
class Clip:
    """Latents `[24, t, h, w]` of a scene; `later` is how many latents of it came before them.

    anchors: `[24, ANCHORS, h, w]`, latents of another time of the clip. strayed: like `latents`,
    what a long video's windows have come to when something of it was lost on the way.
    perturbation: what else a sampler may take the clip for while there is noise.
    """

    scene: world.Scene
    latents: Tensor
    later: int
    anchors: Tensor | None = None
    strayed: Tensor | None = None
    perturbation: Perturbation | None = None


@dataclass
class Perturbation:
    """Latents `[24, t, h, w]` of another clip, and the most that they may be of all frames noised.

    A model's estimate from much noise is the mean of what may come: faint sprites, between shapes,
    places and phases, and not the same ones in all frames. It never sees those in training, and a
    sampler shows it nothing else (exposure bias; Ning et al., arXiv 2301.11706, perturb by noise).
    Shown them, with the clip to make, it learns to take what is nearest. A share of 1 puts them in
    the clip's place.
    """

    latents: Tensor
    share: float

    def mixed(self, rng: random.Random, latents: Tensor) -> Tensor:
        """Some of it in all of `latents`, or much of it in less than half of the latent frames."""
        t = latents.shape[1]
        shares = torch.full((t,), self.share * rng.random() if self.share < 1 else 1.0)
        if t > 2 and rng.random() < 0.5:
            for i in rng.sample(range(t), rng.randint(1, (t - 1) // 2)):
                shares[i] = 0.3 + 0.7 * rng.random()
        return latents.lerp(self.latents.to(latents), shares[:, None, None].to(latents))


class Pool:
    """Clips, encoded once and shown several times, of which some are renewed all the time."""

    def __init__(
        self, vae: WanVAE, stage: Stage, rng: random.Random, path: Path, size: int
    ) -> None:
        self.vae, self.stage, self.rng, self.path, self.size = vae, stage, rng, path, size
        self.clips: list[Clip] = torch.load(path, weights_only=False) if path.exists() else []
        self.next = 0

    def add(self) -> None:
        clip = self.make()
        if len(self.clips) < self.size:
            self.clips.append(clip)
        else:
            self.clips[self.next % self.size] = clip
            self.next += 1

    def draw(self) -> Clip:
        """A clip to train on: hard ones more often."""
        while True:
            clip = self.rng.choice(self.clips)
            shown = [
                word for sprite in clip.scene.sprites for word in (sprite.motion, sprite.shape)
            ]
            if self.rng.random() < max(HARD.get(word, EASY) for word in shown):
                return clip

    def save(self) -> None:
        save(self.path, self.clips)

    @torch.no_grad()
    def make(self) -> Clip:
        rng, stage = self.rng, self.stage
        short = rng.choice(stage.short_sides)
        long = rng.choice(range(short, stage.longest_side + 1, 16)) if rng.random() < 0.5 else short
        size = (short, long) if rng.random() < 0.5 else (long, short)
        scene = world.sample_scene(rng, *size, sprites=2 if rng.random() < stage.two_sprites else 1)
        num_frames = rng.choice(stage.lengths)
        later = rng.randrange(1, 4) if num_frames > 1 and rng.random() < stage.later else 0
        latents = self.encode(scene, num_frames, later)
        perturbation = None
        if rng.random() < stage.perturbed:
            other, share = perturbing(rng, scene)
            perturbation = Perturbation(self.encode(other, num_frames, later), share)
        if not later or rng.random() >= stage.anchored:
            return Clip(scene, latents, later, perturbation=perturbation)
        # From any time: where the sprite was then says nothing of where it is now.
        shown = scene.render(1 + 4 * ANCHORS, start=4 * rng.randrange(16))
        anchors = to_latents(self.vae, shown)[:, 1:].half()
        if rng.random() >= STRAYED:
            return Clip(scene, latents, later, anchors, perturbation=perturbation)
        other, share = stray(rng, scene)
        strayed = latents.lerp(self.encode(other, num_frames, later), share)
        return Clip(scene, latents, later, anchors, strayed, perturbation)

    def encode(self, scene: world.Scene, num_frames: int, later: int) -> Tensor:
        video = scene.render(num_frames + 4 * later)
        return to_latents(self.vae, video)[:, later:].half()


def stray(rng: random.Random, scene: world.Scene) -> tuple[world.Scene, float]:
    """A scene that a long video may drift to, and how far it went there, up to 1.

    Shapes lose their corners, sizes and colours change, what swings comes to rest, sprites fade.
    """
    kinds = ["shape", "shape", "size", "colour", "fades"]
    if scene.sprites[0].motion in SWINGS:
        kinds += ["swing", "swing"]
    kind = rng.choice(kinds)
    if kind == "fades":
        return other_than(rng, scene, kind), 0.1 + 0.4 * rng.random()
    return other_than(rng, scene, kind), 1.0 if kind == "swing" else 0.3 + 0.7 * rng.random()


def perturbing(rng: random.Random, scene: world.Scene) -> tuple[world.Scene, float]:
    """Another scene that a sampler may have in mind, and the most that it may be of all frames.

    A scene of the world is the smaller part, or it would be the one to take. One that is faint or
    hardly moves is none, and may be most.
    """
    kinds = ["shape", "shape", "shape", "fades", "fades", "place", "place", "size", "colour"]
    if scene.sprites[0].motion in SWINGS:
        kinds += ["swing", "swing"]
    if scene.sprites[0].motion == "orbits":
        kinds += ["phase", "phase"]
    kind = rng.choice(kinds)
    return other_than(rng, scene, kind), {"swing": 1.0, "fades": 0.7}.get(kind, 0.4)


def other_than(rng: random.Random, scene: world.Scene, kind: str) -> world.Scene:
    """`scene` with one thing of its first sprite changed; "fades" leaves that sprite out."""
    first, *others = scene.sprites
    if kind == "fades":
        return replace(scene, sprites=tuple(others))
    if kind == "shape":
        first = replace(first, shape=rng.choice([s for s in world.SHAPES if s != first.shape]))
    elif kind == "size":
        first = replace(first, size="large" if first.size == "small" else "small")
    elif kind == "colour":
        taken = (first.colour, scene.background)
        first = replace(first, colour=rng.choice([c for c in world.COLOURS if c not in taken]))
    elif kind == "swing":
        first = replace(first, swing=0.2 + 0.7 * rng.random())
    elif kind == "phase":
        first = replace(first, phase=first.phase + rng.choice((4.0, 8.0, 12.0)))
    else:
        away = rng.choice((-2, -1, 1, 2)) * world.GRID
        first = (
            replace(first, x=first.x + away)
            if rng.random() < 0.5
            else replace(first, y=first.y + away)
        )
    return replace(scene, sprites=(first, *others))


@torch.no_grad()
def to_latents(vae: WanVAE, frames: Tensor) -> Tensor:
    """Frames `[n, h, w, 3]` in [0, 1] to latents `[24, t, h, w]`."""
    video = frames.permute(3, 0, 1, 2)[None].to(next(vae.parameters()).device) * 2 - 1
    with torch.autocast(video.device.type, torch.bfloat16):
        return vae.encode(video, latents_per_call=None)[0].float()


def known_frames(rng: random.Random, t: int) -> list[bool]:
    """Which latents of a training clip are given: as the engine's tasks give them, or at random."""
    kind = rng.choice(("first", "first", "head", "tail", "tail", "tail", "ends", "every", "some"))
    part = rng.randrange(1, t) if t > 1 else 0
    known = {
        "first": [i == 0 for i in range(t)],
        "head": [i < part for i in range(t)],
        "tail": [i >= t - part for i in range(t)],
        "ends": [i < (t + 2) // 3 or i >= t - (t + 1) // 3 for i in range(t)],
        "every": [i % rng.choice((2, 3, 4)) == 0 for i in range(t)],
        "some": [rng.random() < 0.5 for i in range(t)],
    }[kind]
    return known if not all(known) else [i == 0 for i in range(t)]


def noise_levels(rng: random.Random, clip: Clip, stage: Stage) -> Tensor:
    """The noise level of each latent frame, `[t]`; 0 where the frame is given."""
    t = clip.latents.shape[1]
    given = t > 1 and rng.random() < (stage.known_later if clip.later else stage.known)
    # Half of the clips have milder levels: there a sprite's form and way can be seen, and learned.
    shift = rng.choice((1.5, SHIFT))

    def level() -> float:
        # A window from the middle looks like a clip's beginning while there is only noise: such
        # windows are shown where something can be seen, so that beginnings stay the rule.
        u = rng.random() * (0.8 if clip.later and not given else 1.0)
        return shift * u / (1 + (shift - 1) * u)

    levels = torch.full((t,), level())
    if given:
        if clip.later and t > 2 and rng.random() < 0.6:  # as windows go on
            levels[: rng.randrange(1, min(t, 4))] = 0.0
        else:
            levels[torch.tensor(known_frames(rng, t))] = 0.0
    elif t > 1 and rng.random() < 0.1:
        levels = torch.tensor([level() for _ in range(t)])
    return levels


@torch.no_grad()
def to_frames(vae: WanVAE, latents: Tensor) -> np.ndarray:
    video = vae.decode(latents[None].float(), latents_per_call=None)[0]
    video = (video.permute(1, 2, 3, 0).clamp(-1, 1) * 127.5 + 127.5).round()
    return video.to(torch.uint8).cpu().numpy()
