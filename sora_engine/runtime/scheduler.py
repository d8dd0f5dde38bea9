"""Who goes next. No torch and no clock here: only work, shares and turns.

The rules:

1. Work is counted in tokens through the transformer. Every job has a *virtual finish*: when it
   would be done if, from its submission on, all jobs shared the machine by weight. A job's weight
   is `2 ** priority`.
2. The job with the earliest virtual finish goes first, and is asked again after every step. So
   nobody ends later than under equal sharing (up to one step, and what the estimate of its work
   misses), small requests go ahead of large ones, and nobody starves: the longer a job has waited,
   the later the finishes of those who come after it.
3. Others join its step, in order of their virtual finishes, while they are at the same expert (a
   batch holds one set of weights), all their tokens together stay below the saturation point
   (beyond it a larger batch is no faster, and only makes everybody wait), and each of them is
   small: a quarter of that point or less. A step takes about `a + b * tokens`. Whoever joins spares
   `a`, and costs everybody whose step it joins its own `b * tokens`; where that is the greater, all
   are done sooner one after the other. Doubling a batch gains less than a tenth from `4.5 a / b`
   tokens on, which is what the saturation point is, so a quarter of it is about `a / b`.

The order of rule 2 is the fair sojourn protocol (Friedman and Henderson, SIGMETRICS 2003) with the
weights of weighted fair queueing (Demers et al., SIGCOMM 1989).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

MAX_PRIORITY = 8
"""Priorities run from minus this to this."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A job's place: its virtual finish, its share, and the order of submission for ties."""

    finish: float
    weight: float
    order: int
    left: bool = False


class Ticketed(Protocol):
    @property
    def ticket(self) -> Ticket: ...


J = TypeVar("J", bound=Ticketed)

LEAST_TO_SATURATE = 4
"""So many jobs of the largest size that may join others' steps make a full batch."""


class Scheduler:
    """Keeps the virtual time, and picks jobs. Not safe for threads: its caller locks."""

    def __init__(self) -> None:
        self._now = 0.0
        self._count = itertools.count()
        self._shared: list[tuple[float, int, Ticket]] = []
        self._weight = 0.0

    def enter(self, work: float, priority: int = 0) -> Ticket:
        """A place for a job of `work` tokens."""
        weight = 2.0**priority
        ticket = Ticket(self._now + work / weight, weight, next(self._count))
        heapq.heappush(self._shared, (ticket.finish, ticket.order, ticket))
        self._weight += weight
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """A job was stopped before its end: its share goes to the others."""
        if not ticket.left:
            ticket.left = True
            self._weight -= ticket.weight

    def serve(self, work: float) -> None:
        """`work` tokens were done, for whomever: virtual time moves on.

        It moves by each job's equal share; a job whose virtual finish is reached takes no further
        share, whether it is done or not.
        """
        while self._shared:
            finish, _, ticket = self._shared[0]
            if ticket.left:
                heapq.heappop(self._shared)
                continue
            needed = (finish - self._now) * self._weight
            if needed > work:
                self._now += work / self._weight
                return
            work -= max(0.0, needed)
            self._now = max(self._now, finish)
            heapq.heappop(self._shared)
            self.leave(ticket)
        self._weight = 0.0

    @staticmethod
    def in_order(jobs: Iterable[J]) -> list[J]:
        """By virtual finish, then by submission (rule 2)."""
        return sorted(jobs, key=lambda job: (job.ticket.finish, job.ticket.order))

    @staticmethod
    def batch(
        jobs: Sequence[J],
        pack_tokens: int,
        *,
        tokens_of: Callable[[J], int],
        expert_of: Callable[[J], int],
        alone: Callable[[J], bool] = lambda job: False,
    ) -> list[J]:
        """Of `jobs`, which are in order: the first, and who joins its step (rule 3). Those that are
        to be `alone` join nobody, and nobody joins them."""
        if not jobs:
            return []
        if alone(jobs[0]):
            return [jobs[0]]
        expert = expert_of(jobs[0])
        chosen = [jobs[0]]
        tokens = tokens_of(jobs[0])
        for job in jobs[1:]:
            size = tokens_of(job)
            joins = Scheduler.may_join(size, tokens, pack_tokens) and not alone(job)
            if joins and expert_of(job) == expert:
                chosen.append(job)
                tokens += size
        return chosen

    @staticmethod
    def may_join(size: int, tokens: int, pack_tokens: int) -> bool:
        """Whether a job of `size` tokens a step may join a step of `tokens` (rule 3)."""
        return tokens + size <= pack_tokens and size * LEAST_TO_SATURATE <= pack_tokens
