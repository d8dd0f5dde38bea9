"""Walks as latents, encoded once and shown many times, and the training clips cut from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.meadow import world
from examples.meadow.model import CLEAN, CONTEXT, FRAMES, NEW, RECALLED, clip_sight
from examples.meadow.walks import SIDES, as_video
from sora_engine.vae.wan import WanVAE

BACK, PLAYER, ACTED = 4.0, 2.0, 6.0
"""What a tile counts that comes back into view, that the player is on, and that is acted on."""
ANOTHER = 0.25
"""Mean squared error of a tile's latents from which on it may be read as another."""
Place = tuple[int, int]
"""A player's tile: its row and column."""


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
    and what goes with them. weights: float `[B, NEW, h, w]`, what each of the new tiles counts.
    firsts: the number in its walk of each clip's first new frame."""

    latents: Tensor
    actions: Tensor
    places: Tensor
    sees: Tensor
    weights: Tensor
    walks: list[Walk]
    firsts: list[int]

    def keep(self, made: Tensor, which: Tensor) -> None:
        """Note what the model made of the new frames, `[B, NEW, 24, h, w]`, of those `which` are
        True, bool `[B, NEW]`. A tile that became another one stays true: what comes after it is to
        be held against what was seen, not against what should have been."""
        error = (made - self.latents[:, -NEW:]).pow(2).mean(dim=2, keepdim=True)
        own = torch.where(error < ANOTHER, made, self.latents[:, -NEW:]).half()
        for walk, first, frames, kept in zip(self.walks, self.firsts, own, which, strict=True):
            walk.made[first : first + NEW][kept] = frames[kept]


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


STALE = 0.5
"""What a sight of a tile is worth that is not the last one of it: it may have changed since."""


def choose(last: np.ndarray, places: Sequence[Place], need: np.ndarray, most: int) -> list[int]:
    """Of the latent frames that are the last to have seen some tile, those that together show most
    of what is needed, oldest first; as the engine's `Places.pick` does.

    last: int `[N, N]`, which frame last saw each tile of a torus; -1: none. places: of the frames.
    need: bool `[N, N]`.
    """
    kept = np.unique(last[last >= 0])
    sights = np.zeros((len(kept), *last.shape), bool)
    for sight, i in zip(sights, kept, strict=True):
        sight[world.in_view(places[i], len(last))] = True
    rows, columns = np.nonzero(need & (last >= 0))
    own = last[rows, columns] == kept[:, None]
    worth = np.where(own, 1.0, STALE) * sights[:, rows, columns]
    picked: list[int] = []
    shown = np.zeros(len(rows))
    while len(picked) < most and len(kept):
        gain = (worth - shown).clip(min=0).sum(axis=1)
        best = len(kept) - 1 - int(gain[::-1].argmax())
        if gain[best] <= 0:
            break
        picked.append(int(kept[best]))
        shown = np.maximum(shown, worth[best])
    return sorted(picked)


def recalled(walk: Walk, shown: range, before: int, most: int) -> list[int]:
    """Of the latent frames before `before`, those that show what the frames `shown` will and what
    the context just before them does not; oldest first."""
    side = walk.side
    places = [(int(row), int(column)) for row, column in walk.places]
    last = np.full((side, side), -1)
    for i in range(before):
        last[world.in_view(places[i], side)] = i
    need = np.zeros((side, side), bool)
    for i in shown:
        need[world.in_view(places[i], side)] = True
    for i in range(before, shown.start):
        need[world.in_view(places[i], side)] = False
    return choose(last, places, need, most)


def tile_weights(walk: Walk, ids: Sequence[int], sees: np.ndarray) -> Tensor:
    """What the tiles of a clip's new frames count, `[NEW, VIEW, VIEW]`. Most tiles are where the
    frame before shows them; a world is kept by the few that are not: those that come back into
    view, and the one under the player, above all when it is acted on.

    ids: the numbers in the walk of the clip's frames; -1: of none. sees: bool `[FRAMES, FRAMES]`.
    """
    weights = np.ones((NEW, world.VIEW, world.VIEW), np.float32)
    for i in range(NEW):
        me = RECALLED + CLEAN + i
        known = np.zeros((walk.side, walk.side), bool)
        before = known.copy()
        for j in np.flatnonzero(sees[me, :me]):
            known[world.in_view(tuple(walk.places[ids[j]]), walk.side)] = True
        if ids[me]:
            before[world.in_view(tuple(walk.places[ids[me] - 1]), walk.side)] = True
        view = world.in_view(tuple(walk.places[ids[me]]), walk.side)
        weights[i][(known & ~before)[view]] = BACK
        acted = bool(walk.actions[ids[me], world.BUTTONS.index("act")])
        weights[i, world.CENTRE, world.CENTRE] = ACTED if acted else PLAYER
    return torch.from_numpy(weights)


def cut(
    walk: Walk, rng: random.Random, own: float = 0.0
) -> tuple[int, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """A training clip of a walk: the number of its first new frame, and latents, actions, places,
    sees and weights (see `Clips`, without B). own: of so many clips the past is as the model made
    it."""
    total = len(walk.places)
    first = 0 if rng.random() < 0.05 else rng.randrange(1, total - NEW + 1)
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
    weights = tile_weights(walk, ids, sees.numpy())
    return first, (latents, walk.actions[at], torch.from_numpy(offsets).float(), sees, weights)


class Pool:
    """Walks, of which some are renewed all the time."""

    def __init__(self, vae: WanVAE, rng: random.Random, size: int) -> None:
        self.vae, self.rng, self.size = vae, rng, size
        self.walks: list[Walk] = []
        self.next = 0

    def add(self) -> None:
        walk = make_walk(self.vae, self.rng, self.rng.choice((48, 96, 96, 144)))
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
        whole = [torch.stack(part) for part in parts]
        assert whole[0].shape[1] == FRAMES
        return Clips(*whole, chosen, [first for first, _ in cuts])
