"""Walks as latents, encoded once and shown many times, and the training clips cut from them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.meadow import world
from examples.meadow.model import CLEAN, CONTEXT, FRAMES, NEW, RECALLED, clip_sight
from examples.meadow.walks import SIDES, as_video
from sora_engine.vae.wan import WanVAE


@dataclass(frozen=True, slots=True)
class Walk:
    """latents: fp16 `[n, 24, h, w]`, of the first view and of each action; made: the same as the
    model last made them, where it did. places: the player's tile at each one's end, modulo `side`.
    actions: float32 `[n, 5]`."""

    latents: Tensor
    made: Tensor
    places: np.ndarray
    actions: Tensor
    side: int
    look: world.Look


class Clips(NamedTuple):
    """A batch for `Meadow`: latents `[B, FRAMES, 24, h, w]`, of which the last NEW are to be made,
    and what goes with them. firsts: the number in its walk of each clip's first new frame."""

    latents: Tensor
    actions: Tensor
    places: Tensor
    sees: Tensor
    walks: list[Walk]
    firsts: list[int]

    def keep(self, made: Tensor, which: Tensor) -> None:
        """Note what the model made of the new frames, `[B, NEW, 24, h, w]`, of those `which` are
        True, bool `[B, NEW]`."""
        for walk, first, own, kept in zip(self.walks, self.firsts, made, which, strict=True):
            walk.made[first : first + NEW][kept] = own[kept].half()


def action_row(button: str | None) -> Tensor:
    return torch.tensor([float(button == name) for name in world.BUTTONS])


@torch.no_grad()
def make_walk(vae: WanVAE, rng: random.Random, steps: int) -> Walk:
    meadow = world.World(rng, side=rng.choice(SIDES))
    meadow.facing = rng.choice(list(world.STEPS))
    places, actions, state, parts = [meadow.place], [action_row(None)], None, []
    latents, state = vae.encode_chunk(as_video(meadow.view()[None])[None], state)
    parts.append(latents)
    films = []
    for button in world.some_walk(rng, steps):
        films.append(meadow.step(button))
        places.append(meadow.place)
        actions.append(action_row(button))
    for low in range(0, steps, 8):
        video = as_video(np.concatenate(films[low : low + 8]))[None]
        latents, state = vae.encode_chunk(video, state, consume=True)
        parts.append(latents)
    whole = torch.cat(parts, dim=2)[0].transpose(0, 1).half().contiguous()
    return Walk(
        *(whole, whole.clone(), np.array(places), torch.stack(actions)), meadow.side, meadow.look
    )


def recalled(walk: Walk, shown: range, before: int, most: int) -> list[int]:
    """Of the latent frames before `before`, those that last saw what the frames `shown` show and
    what the context just before them does not; oldest first."""
    side = walk.side
    last = np.full((side, side), -1)
    for i in range(before):
        last[world.in_view(tuple(walk.places[i]), side)] = i
    need = np.zeros((side, side), bool)
    for i in shown:
        need[world.in_view(tuple(walk.places[i]), side)] = True
    for i in range(before, shown.start):
        need[world.in_view(tuple(walk.places[i]), side)] = False
    picked: list[int] = []
    while len(picked) < most:
        own = last[need]
        own = own[own >= 0]
        if not len(own):
            break
        ids, counts = np.unique(own, return_counts=True)
        best = int(ids[counts.argmax()])
        picked.append(best)
        need[last == best] = False
    return sorted(picked)


def cut(
    walk: Walk, rng: random.Random, own: float = 0.0
) -> tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A training clip of a walk: the number of its first new frame, and latents, actions, places
    and sees (see `Clips`, without B). own: of so many clips the past is as the model made it."""
    total = len(walk.places)
    first = 0 if rng.random() < 0.1 else rng.randrange(1, total - NEW + 1)
    before = max(0, first - CONTEXT)
    if rng.random() < 0.08:  # as a session begins: with little behind it
        before = rng.randrange(before, first + 1)
    most = 0 if rng.random() < 0.1 else RECALLED if rng.random() < 0.8 else rng.randrange(RECALLED)
    old = recalled(walk, range(first, first + NEW), before, most)
    ids = [-1] * (RECALLED - len(old)) + old
    ids += [i if i >= before else -1 for i in range(first - CONTEXT, first + NEW - 1)]
    ids += range(first, first + NEW)
    index = torch.tensor(ids)
    there = index >= 0
    at = index.clamp(min=0)
    latents = walk.latents[at].float()
    if rng.random() < own:
        latents[: RECALLED + CLEAN] = walk.made[at[: RECALLED + CLEAN]].float()
    latents *= there[:, None, None, None]
    side, newest = walk.side, walk.places[first + NEW - 1]
    offsets = (walk.places[at.numpy()] - newest + side // 2) % side - side // 2
    sees = clip_sight() & there[None, :]
    sees.fill_diagonal_(True)
    if before > first - CONTEXT and before > 0:  # what is left out of the context stays out of it
        sees[RECALLED + CLEAN :, RECALLED : RECALLED + before - (first - CONTEXT)] = False
    return first, (latents, walk.actions[at], torch.from_numpy(offsets).float(), sees)


class Pool:
    """Walks, of which some are renewed all the time."""

    def __init__(self, vae: WanVAE, rng: random.Random, size: int) -> None:
        self.vae, self.rng, self.size = vae, rng, size
        self.walks: list[Walk] = []
        self.next = 0

    def add(self) -> None:
        walk = make_walk(self.vae, self.rng, self.rng.choice((24, 48, 48, 96)))
        if len(self.walks) < self.size:
            self.walks.append(walk)
        else:
            self.walks[self.next % self.size] = walk
            self.next += 1

    def draw(self, count: int, own: float = 0.0) -> Clips:
        """Clips (own: see `cut`). Those of one look lie side by side: texts are attended to
        together then."""
        chosen = self.rng.choices(
            self.walks, weights=[len(walk.places) for walk in self.walks], k=count
        )
        chosen.sort(key=lambda walk: walk.look.caption())
        cuts = [cut(walk, self.rng, own) for walk in chosen]
        parts = zip(*(part for _, part in cuts), strict=True)
        latents, actions, places, sees = (torch.stack(part) for part in parts)
        assert latents.shape[1] == FRAMES
        return Clips(latents, actions, places, sees, chosen, [first for first, _ in cuts])
