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
    """latents: fp16 `[n, 24, h, w]`, of the first view and of each action. places: the player's
    tile at each one's end, modulo `side`. actions: float32 `[n, 5]`."""

    latents: Tensor
    places: np.ndarray
    actions: Tensor
    side: int
    look: world.Look


class Clips(NamedTuple):
    """A batch for `Meadow`: latents `[B, FRAMES, 24, h, w]`, of which the last NEW are to be made,
    and what goes with them."""

    latents: Tensor
    actions: Tensor
    places: Tensor
    sees: Tensor
    looks: list[world.Look]


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
    whole = torch.cat(parts, dim=2)[0].transpose(0, 1)
    return Walk(
        whole.half().contiguous(), np.array(places), torch.stack(actions), meadow.side, meadow.look
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


def cut(walk: Walk, rng: random.Random) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A training clip of a walk: latents, actions, places, sees (see `Clips`, without B)."""
    total = len(walk.places)
    first = 0 if rng.random() < 0.06 else rng.randrange(1, total - NEW + 1)
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
    latents = walk.latents[at].float() * there[:, None, None, None]
    side, newest = walk.side, walk.places[first + NEW - 1]
    offsets = (walk.places[at.numpy()] - newest + side // 2) % side - side // 2
    sees = clip_sight() & there[None, :]
    sees.fill_diagonal_(True)
    if before > first - CONTEXT and before > 0:  # what is left out of the context stays out of it
        sees[RECALLED + CLEAN :, RECALLED : RECALLED + before - (first - CONTEXT)] = False
    return latents, walk.actions[at], torch.from_numpy(offsets).float(), sees


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

    def draw(self, count: int) -> Clips:
        """Clips, those of one look side by side: texts are then attended to together."""
        chosen = self.rng.choices(
            self.walks, weights=[len(walk.places) for walk in self.walks], k=count
        )
        chosen.sort(key=lambda walk: walk.look.caption())
        parts = [cut(walk, self.rng) for walk in chosen]
        latents, actions, places, sees = (torch.stack(part) for part in zip(*parts, strict=True))
        assert latents.shape[1] == FRAMES
        return Clips(latents, actions, places, sees, [walk.look for walk in chosen])
