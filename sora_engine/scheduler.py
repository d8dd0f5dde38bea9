"""Which jobs take the next step together. No torch here: only counts and turns.

Rules: the job that waited longest goes first; others join it in order of waiting while they are at
the same expert (a batch holds one set of weights) and their tokens fit the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Runnable(Protocol):
    """What the scheduler needs to know of a job."""

    last_ran: int


R = TypeVar("R", bound=Runnable)


class Scheduler:
    """Picks the jobs of each step.

    Args:
        max_batch_tokens: tokens that one step may pack before further jobs wait their turn.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens
        self._turn = 0

    def next_step(
        self,
        jobs: Sequence[R],
        *,
        expert_of: Callable[[R], int],
        tokens_of: Callable[[R], int],
    ) -> list[R]:
        """The jobs that take the next step together; empty only where there are none."""
        waiting = sorted(jobs, key=lambda job: job.last_ran)
        if not waiting:
            return []
        expert = expert_of(waiting[0])
        chosen: list[R] = []
        tokens = 0
        for job in waiting:
            size = tokens_of(job)
            fits = not chosen or tokens + size <= self.max_batch_tokens
            if expert_of(job) == expert and fits:
                chosen.append(job)
                tokens += size
        self._turn += 1
        for job in chosen:
            job.last_ran = self._turn
        return chosen
