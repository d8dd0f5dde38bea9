"""How well a played world keeps to its rules, by the reader alone: no simulator runs beside it.

**Actions**: of the five shifts between what is seen before and after, the best is the one that was
asked for, and the player looks that way; what is acted on is as the rules say, and nothing else
changed. **Permanence**: a tile that comes back into view is what it was when it was last seen.
Grass does not count, as guessing it is right two times in three. **Drift**: tiles that are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from examples.meadow.reader import Reading
from examples.meadow.world import (
    BERRY,
    CENTRE,
    EARTH,
    GRASS,
    KINDS,
    PAINT,
    STEPS,
    VIEW,
    in_view,
)

AWAY = (8, 24, 60)
"""Bounds of the classes by steps away: 2 to 8, to 24, to 60, and more."""
STEPS_A_MINUTE = 240
"""At 16 frames a second and four a step."""


@dataclass(slots=True)
class Share:
    """So many of so many."""

    right: int = 0
    of: int = 0

    def add(self, right: bool) -> None:
        self.right += right
        self.of += 1

    def __iadd__(self, other: Share) -> Share:
        self.right, self.of = self.right + other.right, self.of + other.of
        return self

    def __str__(self) -> str:
        return f"{self.right / self.of:.1%} of {self.of}" if self.of else "none"


def _shares(*names: str) -> dict[str, Share]:
    return {name: Share() for name in names}


@dataclass(slots=True)
class Tally:
    """moves, acts: done as asked. back: non-grass tiles that came back right, by class of time away
    and by whether the player made them, the first picture showed them, or they were dreamt.
    unreadable: by minute, tiles that are none. dreamt: kinds of tiles that nobody had seen."""

    moves: Share = field(default_factory=Share)
    acts: Share = field(default_factory=Share)
    back: dict[str, Share] = field(
        default_factory=lambda: _shares(
            "all", "2-8", "9-24", "25-60", "61+", "made", "given", "dreamt"
        )
    )
    unreadable: dict[int, Share] = field(default_factory=dict)
    dreamt: Counter[int] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.moves += other.moves
        self.acts += other.acts
        for name, share in other.back.items():
            self.back[name] += share
        for minute, share in other.unreadable.items():
            self.unreadable.setdefault(minute, Share()).__iadd__(share)
        self.dreamt += other.dreamt

    def lines(self) -> list[str]:
        total = sum(self.dreamt.values())
        bad = Share()
        for share in self.unreadable.values():
            bad += share
        shares = ", ".join(
            f"{kind} {self.dreamt[i] / total:.1%}" for i, kind in enumerate(KINDS[:4]) if total
        )
        return [
            f"moves {self.moves}, acts {self.acts}",
            "back in view: " + ", ".join(f"{name} {share}" for name, share in self.back.items()),
            f"unreadable {bad.right} of {bad.of}; by minute "
            + ", ".join(f"{share.right / share.of:.2%}" for share in self.unreadable.values()),
            f"dreamt {total}: {shares}",
        ]


def away_class(steps: int) -> str:
    """The name of the class that so many steps away fall into."""
    for bound, name in zip(AWAY, ("2-8", "9-24", "25-60"), strict=True):
        if steps <= bound:
            return name
    return "61+"


def score(
    readings: Sequence[Reading], walk: Sequence[str | None], side: int, *, given: bool
) -> Tally:
    """Score one session.

    readings: of the first view, and of the last frame of each action. side: tiles of the world's
    side, a torus; 0: it has no end. given: the first view was a picture of the caller's.
    """
    assert len(readings) == len(walk) + 1
    tally, place = Tally(), (0, 0)
    # Of each tile that was seen: its kind, when, and how it came to be.
    known: dict[tuple[int, int], tuple[int, int, str]] = {}

    def cells(place: tuple[int, int]) -> list[tuple[int, int]]:
        if side:
            rows, columns = in_view(place, side)
        else:
            around = np.arange(VIEW) - CENTRE
            rows, columns = np.meshgrid(*(at + around for at in place), indexing="ij")
        return list(zip(rows.ravel().tolist(), columns.ravel().tolist(), strict=True))

    seen: set[tuple[int, int]] = set()
    for step, reading in enumerate(readings):
        button = walk[step - 1] if step else None
        if step:
            before = readings[step - 1]
            place = tuple(
                at + by for at, by in zip(place, STEPS.get(button or "", (0, 0)), strict=True)
            )
            if button == "act":
                tally.acts.add(_acted(before, reading))
            else:
                tally.moves.add(_moved(before, reading, button))
        shown = cells(place)
        kinds = reading.tiles.ravel().tolist()
        middle = shown[CENTRE * VIEW + CENTRE]
        for cell, kind in zip(shown, kinds, strict=True):
            old = known.get(cell)
            how = ("given" if given and not step else "dreamt") if old is None else old[2]
            if old is None and how == "dreamt":
                tally.dreamt[kind] += 1
            elif old is not None and cell not in seen and old[0] != GRASS:
                right = kind == old[0]
                away = step - old[1]
                for name in ("all", away_class(away), old[2]):
                    tally.back[name].add(right)
            if button == "act" and cell == middle:
                how = "made"
            known[cell] = (kind, step, how)
        seen = set(shown)
        minute = step // STEPS_A_MINUTE
        bad = tally.unreadable.setdefault(minute, Share())
        bad += Share(reading.unreadable, reading.tiles.size)
    return tally


def _moved(before: Reading, after: Reading, button: str | None) -> bool:
    """The view went the way that was asked for, or stayed, and the player looks there."""
    down, right = STEPS.get(button or "", (0, 0))
    asked = _agreement(before.tiles, after.tiles, down, right)
    ways = ((0, 0), *STEPS.values())
    best = max(_agreement(before.tiles, after.tiles, *way) for way in ways)
    facing = before.facing if button is None else button
    return asked == best and after.facing == facing


def _agreement(before: np.ndarray, after: np.ndarray, down: int, right: int) -> float:
    """The share of tiles that are alike where the view went so many tiles down and right."""
    own = after[max(0, -down) : VIEW - max(0, down), max(0, -right) : VIEW - max(0, right)]
    old = before[max(0, down) : VIEW + min(0, down), max(0, right) : VIEW + min(0, right)]
    return float((own == old).mean())


def _acted(before: Reading, after: Reading) -> bool:
    """The tile under the player is eaten or painted, and no other changed."""
    want = before.tiles.copy()
    want[CENTRE, CENTRE] = EARTH if want[CENTRE, CENTRE] == BERRY else PAINT
    return bool((after.tiles == want).all()) and after.facing == before.facing
