"""Whose job is next: keys share the machine evenly, however many jobs each of them sends.

Start-time fair queueing over keys (Goyal, Vin and Cheng, 1996): a job's start is when its key's last
job would have ended had each key a machine of its own, and the least start goes first. A key that
was idle begins at the present, so it is ahead of a flood and saves up nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class _Waiting:
    job: str
    owner: str
    work: float
    rank: int
    number: int


class Turns:
    """Jobs that wait, and the order in which they go. Not thread-safe: for the desk's thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self._ends: dict[str, float] = {}
        self._now = 0.0
        self._count = 0

    def add(self, job: str, owner: str, work: float, priority: int = 0) -> None:
        """A job waits. work: more than 0, in any unit, the same for all. priority: among the jobs
        of its owner alone; the higher one first."""
        if not work > 0:
            raise ValueError(f"work must be over 0, got {work}")
        self._waiting[job] = _Waiting(job, owner, work, -priority, self._count)
        self._count += 1

    def remove(self, job: str) -> bool:
        """It waits no more, and its owner has used nothing; False where it did not wait."""
        return self._waiting.pop(job, None) is not None

    def pop(self) -> str | None:
        """The next job, which begins now; None where none waits."""
        heads = self._heads(self._waiting.values())
        if not heads:
            return None
        start, entry = self._first(heads, self._ends, self._now)
        self._now = max(self._now, start)
        self._ends[entry.owner] = start + entry.work
        del self._waiting[entry.job]
        if not self._waiting:  # nobody is owed anything
            self._ends.clear()
            self._now = 0.0
        return entry.job

    def order(self) -> Iterator[str]:
        """All that wait, in the order in which they would go if no other came."""
        left, ends, now = dict(self._waiting), dict(self._ends), self._now
        while left:
            start, entry = self._first(self._heads(left.values()), ends, now)
            now = max(now, start)
            ends[entry.owner] = start + entry.work
            del left[entry.job]
            yield entry.job

    def position(self, job: str) -> int | None:
        """How many go before it; None where it does not wait."""
        return next((i for i, other in enumerate(self.order()) if other == job), None)

    def __len__(self) -> int:
        return len(self._waiting)

    @staticmethod
    def _heads(waiting: object) -> list[_Waiting]:
        heads: dict[str, _Waiting] = {}
        for entry in waiting:  # type: ignore[attr-defined]
            head = heads.get(entry.owner)
            if head is None or (entry.rank, entry.number) < (head.rank, head.number):
                heads[entry.owner] = entry
        return list(heads.values())

    @staticmethod
    def _first(heads: list[_Waiting], ends: dict[str, float], now: float) -> tuple[float, _Waiting]:
        starts = [(max(now, ends.get(entry.owner, 0.0)), entry.number, entry) for entry in heads]
        start, _, entry = min(starts, key=lambda item: item[:2])
        return start, entry
