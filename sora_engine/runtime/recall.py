"""What a session remembers: the latent frames that last saw each place of its world.

The past is seen as clean tokens, never as keys and values that are kept (docs/architecture.md). So
a memory is latent frames, and a rule by which some of them are shown again: those that show what
comes into view and the frames just before do not (WorldMem, arXiv 2504.12369).
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

Place = tuple[float, float]
"""Where a view lies in the world, in latents down and right of its origin."""

TILE = 16
"""Cells along a side of the pieces in which the map is kept. One that changes is copied."""
NOBODY = -1
STALE = 0.5
"""What a sight of a cell is worth that is not the last one of it: it may have changed since."""


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """A latent frame that was made.

    latent: float32 `[C, 1, H, W]`, clean, on the host.
    action: what the model was told was done to make it. prompt: the text that it read.
    """

    latent: Tensor
    action: tuple[float, ...]
    place: Place
    prompt: str

    @property
    def nbytes(self) -> int:
        """Bytes of its latent."""
        return self.latent.nbytes

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of its view, in latents."""
        return self.latent.shape[2], self.latent.shape[3]


class Index(ABC):
    """Moments, and which of them to see again. It never changes: adding gives another one, which
    shares what is the same."""

    num_lost: int = 0
    """Cells of the world that it knew and forgot for want of room."""

    @abstractmethod
    def added(self, moment: Moment, room: int) -> Index:
        """With one more. What was seen longest ago is forgotten until all take `room` bytes."""

    @abstractmethod
    def pick(self, place: Place, n: int, context: Sequence[Moment]) -> list[Moment]:
        """At most `n`, oldest first, that show what a view at `place` will and those of the
        `context` do not."""

    @property
    @abstractmethod
    def moments(self) -> tuple[Moment, ...]:
        """All that are remembered, oldest first."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What it takes."""

    @property
    def num_places(self) -> int:
        """Cells of the world that it knows."""
        return 0


@dataclass(frozen=True, slots=True, eq=False)
class Recent(Index):
    """For a model that is not told where its camera was: the last moments.

    keep: how many, the context's included.
    """

    keep: int
    kept: tuple[Moment, ...] = ()

    def added(self, moment: Moment, room: int) -> Recent:
        """See `Index`."""
        kept = (*self.kept, moment)[-self.keep :]
        while kept and sum(each.nbytes for each in kept) > room:
            kept = kept[1:]
        return replace(self, kept=kept)

    def pick(self, place: Place, n: int, context: Sequence[Moment]) -> list[Moment]:
        """The most recent ones before the context."""
        earlier = [m for m in self.kept if not any(m is seen for seen in context)]
        return earlier[-n:] if n else []

    @property
    def moments(self) -> tuple[Moment, ...]:
        """See `Index`."""
        return self.kept

    @property
    def nbytes(self) -> int:
        """See `Index`."""
        return sum(moment.nbytes for moment in self.kept)


@dataclass(frozen=True, slots=True, eq=False)
class Places(Index):
    """For each cell of the world the latest moment that saw it.

    world: rows and columns of a torus; None: a plane without an end.
    tiles: of the map, int64 `[TILE, TILE]`, the number of the moment that last saw a cell.
    numbered: the moments by number, which rises with time. cells: how many each of them still is
        the latest of: a moment is forgotten when it is that of none.
    """

    world: tuple[int, int] | None
    tiles: Mapping[tuple[int, int], np.ndarray] = field(default_factory=dict)
    numbered: Mapping[int, Moment] = field(default_factory=dict)
    cells: Mapping[int, int] = field(default_factory=dict)
    count: int = 0
    latent_bytes: int = 0
    num_lost: int = 0

    def added(self, moment: Moment, room: int) -> Places:
        """See `Index`."""
        tiles, numbered, cells = dict(self.tiles), dict(self.numbered), dict(self.cells)
        size = self.latent_bytes + moment.nbytes
        number, own = self.count, 0
        for tile, part in self._pieces(moment.place, moment.size):
            before = tiles.get(tile)
            whole = np.full((TILE, TILE), NOBODY) if before is None else before.copy()
            for other, n in Counter(whole[part].ravel().tolist()).items():
                if other == NOBODY:
                    continue
                cells[other] -= n
                if not cells[other]:
                    size -= numbered.pop(other).nbytes
                    del cells[other]
            whole[part] = number
            own += whole[part].size
            tiles[tile] = whole
        numbered[number], cells[number] = moment, own
        lost = self.num_lost
        while numbered and size + len(tiles) * TILE * TILE * 8 > room:
            oldest = next(iter(numbered))  # numbers rise, so its cells were seen longest ago
            gone = numbered.pop(oldest)
            size -= gone.nbytes
            lost += cells.pop(oldest)
            for tile, part in self._pieces(gone.place, gone.size):
                if tile not in tiles:
                    continue
                whole = tiles[tile].copy()
                view = whole[part]
                view[view == oldest] = NOBODY
                if (whole == NOBODY).all():
                    del tiles[tile]
                else:
                    tiles[tile] = whole
        return replace(
            self,
            tiles=MappingProxyType(tiles),
            numbered=MappingProxyType(numbered),
            cells=MappingProxyType(cells),
            count=number + 1,
            latent_bytes=size,
            num_lost=lost,
        )

    def pick(self, place: Place, n: int, context: Sequence[Moment]) -> list[Moment]:
        """Those that together show the most cells of the view, but for cells of which one of the
        context is the latest. A cell that a moment saw, but not as the last one, counts `STALE`:
        few moments are the latest of many cells of a view that was left long ago, and one that saw
        all of it shows it as it was. Of equal ones the newer."""
        if not n or not self.numbered:
            return []
        size = next(iter(self.numbered.values())).size
        owners = self._owners(place, size)
        seen = {id(moment) for moment in context}
        near = [number for number, moment in self.numbered.items() if id(moment) in seen]
        rows, columns = np.nonzero((owners != NOBODY) & ~np.isin(owners, near))
        # Who saw any of these cells lies, and is the latest of a cell, within a view's size of it.
        around = (place[0] - size[0] + 1, place[1] - size[1] + 1)
        numbers = np.unique(self._owners(around, (3 * size[0] - 2, 3 * size[1] - 2)))
        numbers = numbers[~np.isin(numbers, [NOBODY, *near])]
        saw = np.ones((len(numbers), len(rows)), bool)
        for axis, cells in enumerate((rows, columns)):
            corners = np.array([round(self.numbered[int(i)].place[axis]) for i in numbers])
            steps = round(place[axis]) + cells - corners[:, None]
            if self.world is not None:
                steps %= self.world[axis]
            saw &= (steps >= 0) & (steps < size[axis])
        worth = np.where(owners[rows, columns] == numbers[:, None], 1.0, STALE) * saw
        picked: list[int] = []
        shown = np.zeros(len(rows))
        while len(picked) < n and len(rows):
            gains = np.clip(worth - shown, 0, None).sum(axis=1)
            best = len(numbers) - 1 - int(gains[::-1].argmax())
            if not gains[best]:
                break
            picked.append(int(numbers[best]))
            shown = np.maximum(shown, worth[best])
        return [self.numbered[number] for number in sorted(picked)]

    def _owners(self, place: Place, size: tuple[int, int]) -> np.ndarray:
        """The numbers of the moments that are the latest of the cells of a view, `[rows, columns]`;
        no more of them than a torus has."""
        rows, columns = self._runs_of(place, size)
        empty = np.full((TILE, TILE), NOBODY)
        return np.block(
            [
                [self.tiles.get((row, column), empty)[part, own] for column, own in columns]
                for row, part in rows
            ]
        )

    @property
    def moments(self) -> tuple[Moment, ...]:
        """See `Index`."""
        return tuple(self.numbered.values())

    @property
    def nbytes(self) -> int:
        """See `Index`."""
        return self.latent_bytes + len(self.tiles) * TILE * TILE * 8

    @property
    def num_places(self) -> int:
        """See `Index`."""
        return sum(self.cells.values())

    def _pieces(
        self, place: Place, size: tuple[int, int]
    ) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
        """What a view covers of each tile of the map: the tile, and its rows and columns."""
        rows, columns = self._runs_of(place, size)
        for tile_row, row in rows:
            for tile_column, column in columns:
                yield (tile_row, tile_column), (row, column)

    def _runs_of(
        self, place: Place, size: tuple[int, int]
    ) -> tuple[list[tuple[int, slice]], list[tuple[int, slice]]]:
        """The rows of a view by tile, and its columns."""
        world = self.world or (None, None)
        rows, columns = (
            list(_runs(round(at), length, around))
            for at, length, around in zip(place, size, world, strict=True)
        )
        return rows, columns


def _runs(start: int, length: int, around: int | None) -> Iterator[tuple[int, slice]]:
    """Cells `start` to `start + length - 1` of a line, or of a circle, by tile."""
    if around is not None:
        length = min(length, around)
    at = start
    while at < start + length:
        cell = at if around is None else at % around
        tile, first = divmod(cell, TILE)
        end = TILE if around is None else min(TILE, around - tile * TILE)
        count = min(end - first, start + length - at)
        yield tile, slice(first, first + count)
        at += count


class Memory:
    """What a session remembers. Two may share one: what one of them paints, the other sees.

    kind: by what models can share it. room: bytes that it may take.
    """

    def __init__(self, index: Index, *, kind: object, room: int) -> None:
        self.index, self.kind, self.room = index, kind, room
        self.num_sessions = 0
        """How many sessions have it."""
        self._joined = 0
        self._lock = threading.RLock()  # sessions that are dropped leave it, anywhere

    def join(self) -> None:
        """A session has it from now on."""
        with self._lock:
            self.num_sessions += 1
            self._joined += 1

    @property
    def was_shared(self) -> bool:
        """Whether more than one ever had it: what a session does then depends on the others."""
        return self._joined > 1

    def leave(self) -> None:
        """A session has ended."""
        with self._lock:
            self.num_sessions -= 1

    def add(self, moment: Moment) -> Index:
        """Remember a moment; returns the index with it."""
        with self._lock:
            self.index = self.index.added(moment, self.room)
            return self.index

    def go_back(self, index: Index) -> None:
        """Be as it was. What others have seen of a shared one stays seen."""
        with self._lock:
            if not self.was_shared:
                self.index = index

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self.index.nbytes


def away(place: Place, other: Place, world: tuple[int, int] | None) -> Place:
    """How far a view lies from another one; round a torus by the nearest way."""
    way = [at - there for at, there in zip(place, other, strict=True)]
    if world is not None:
        way = [(d + side / 2) % side - side / 2 for d, side in zip(way, world, strict=True)]
    return way[0], way[1]


def stacked(moments: Sequence[Moment], like: Tensor) -> Tensor:
    """Their latents, `[C, n, H, W]`; of `like`'s size where there are none."""
    if not moments:
        return like[:, :0]
    return torch.cat([moment.latent for moment in moments], dim=1)
