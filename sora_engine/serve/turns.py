"""Whose job is next: keys share the machine evenly, however many jobs each of them sends.

Start-time fair queueing over keys (Goyal, Vin and Cheng, 1996): a job's start is when its key's
last job would have ended had each key a machine of its own, and the least start goes first. A key
that was idle begins at the present, so it is ahead of a flood and saves up nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Turn:
    """What is known of a job that waits. work: over 0, in any unit, the same for all. priority:
    among the jobs of its owner alone; the higher one first. number: the order in which they came.
    """

    owner: str
    work: float
    priority: int
    number: int


class Turns(Generic[T]):
    """The order of jobs that wait. Not thread-safe: its user has a lock."""

    def __init__(self, turn_of: Callable[[T], Turn]) -> None:
        self._turn_of = turn_of
        self._ends: dict[str, float] = {}
        self._now = 0.0

    def choose(self, waiting: Sequence[T]) -> T:
        """The next job, which begins now. waiting: all that wait, at least one."""
        job, turn, start = self._first(_heads((job, self._turn_of(job)) for job in waiting))
        self._count(turn, start)
        if len(waiting) == 1:  # nobody else wants anything, so nobody is owed anything
            self._ends.clear()
        return job

    def order(self, waiting: Iterable[T]) -> list[T]:
        """All that wait, in the order in which they would go if no other came."""
        ahead = Turns(self._turn_of)
        ahead._ends, ahead._now = dict(self._ends), self._now
        lines: dict[str, list[tuple[T, Turn]]] = {}
        for job in waiting:
            turn = self._turn_of(job)
            lines.setdefault(turn.owner, []).append((job, turn))
        for line in lines.values():
            line.sort(key=_in_line, reverse=True)
        ordered = []
        while lines:
            job, turn, start = ahead._first(line[-1] for line in lines.values())
            ahead._count(turn, start)
            lines[turn.owner].pop()
            if not lines[turn.owner]:
                del lines[turn.owner]
            ordered.append(job)
        return ordered

    def _first(self, heads: Iterable[tuple[T, Turn]]) -> tuple[T, Turn, float]:
        starts = [
            (max(self._now, self._ends.get(turn.owner, 0.0)), turn.number, job, turn)
            for job, turn in heads
        ]
        start, _, job, turn = min(starts, key=lambda item: item[:2])
        return job, turn, start

    def _count(self, turn: Turn, start: float) -> None:
        self._now = max(self._now, start)
        self._ends[turn.owner] = start + max(turn.work, 1.0)


def _in_line(item: tuple[T, Turn]) -> tuple[int, int]:
    """A job's place among those of its owner."""
    return -item[1].priority, item[1].number


def _heads(waiting: Iterable[tuple[T, Turn]]) -> Iterable[tuple[T, Turn]]:
    """The first job of each owner."""
    heads: dict[str, tuple[T, Turn]] = {}
    for item in waiting:
        head = heads.get(item[1].owner)
        if head is None or _in_line(item) < _in_line(head):
            heads[item[1].owner] = item
    return heads.values()
