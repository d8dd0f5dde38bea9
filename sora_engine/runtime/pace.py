"""How a session keeps time: what it gives in real time, and how fast it was."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np

from sora_engine.errors import RequestError
from sora_engine.request import Action
from sora_engine.request.checks import shown

WINDOW = 256
"""The last steps, of which times are told."""
SLACK_S = 0.005
"""Of a tick: what a sleep may last too long is not late."""
LAST, RESERVE_S = 16, 0.02
"""A step is begun so long before its frames are due as the longest of the last ones took, and a
reserve: no later, so that it is in time, and no sooner, so that it knows the latest input."""

Source: TypeAlias = "Callable[[], Action | None] | Iterable[Action]"


class Steps(Protocol):
    """What is stepped through: a session."""

    @property
    def num_steps(self) -> int: ...
    def step(self, action: Action | None = None) -> np.ndarray:
        """Frames, uint8 `[n, height, width, 3]`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Tick:
    """One step of `Session.stream`.

    frames: uint8 `[n, height, width, 3]`. action: that led to them. step: how many there were.
    spent_s: seconds that it took to make. late_s: after it was to be shown. age_s: since the input
        that it follows changed, or was read where it had not.
    """

    frames: np.ndarray
    action: Action
    step: int
    spent_s: float
    late_s: float
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStats:
    """A session in figures. Times are of the last 256 steps; 0 before the first.

    num_steps: actions on the way to the present. fps: frames a second of work. step_ms,
    step_p95_ms: of a step, median and 95th percentile. late: ticks of `stream` that came late;
    stalls: by a latent frame's time or more. bytes_held: latents, decoder's states and the memory.
    num_moments: latent frames that are remembered. num_places: cells of the world that they show.
    num_lost: cells that were forgotten for want of room. company: the most jobs that were in a
    batch with a step, itself included.
    """

    num_steps: int
    fps: float
    step_ms: float
    step_p95_ms: float
    late: int
    stalls: int
    bytes_held: int
    num_moments: int
    num_places: int
    num_lost: int
    company: int


class Pace:
    """Counts a session's steps and ticks."""

    def __init__(self) -> None:
        self._spent: deque[float] = deque(maxlen=WINDOW)
        self._frames: deque[int] = deque(maxlen=WINDOW)
        self._late = self._stalls = 0

    def count(self, seconds: float, num_frames: int) -> None:
        """A step took so long."""
        self._spent.append(seconds)
        self._frames.append(num_frames)

    def tell(self, late: bool, stalled: bool) -> None:
        """A tick was given."""
        self._late += late
        self._stalls += stalled

    def in_time(
        self,
        world: Steps,
        source: Source,
        fps: float,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> Iterator[Tick]:
        """See `Session.stream`."""
        ask, due, before = asked(source), None, None
        taken: deque[float] = deque(maxlen=LAST)
        while True:
            # As late as it can: what is pressed until then is in the frames that are due next.
            if due is not None and (begin := due - max(taken) - RESERVE_S) > clock():
                sleep(begin - clock())
            began = clock()
            action = ask()
            if action is None:
                return
            changed = getattr(source, "changed_at", began)
            since = changed if before is not None and before < changed else began
            before = began
            frames = world.step(action)
            spent, period = clock() - began, len(frames) / fps
            taken.append(spent)
            due = began + spent if due is None else due
            if clock() < due:
                sleep(due - clock())
            late = max(0.0, clock() - due)
            stalled = late >= period
            self.tell(late > SLACK_S, stalled)
            yield Tick(
                frames=frames,
                action=action,
                step=world.num_steps,
                spent_s=spent,
                late_s=late,
                age_s=clock() - since,
            )
            due = (clock() if stalled else due) + period

    def stats(
        self,
        *,
        num_steps: int,
        bytes_held: int,
        num_moments: int,
        num_places: int,
        num_lost: int,
        company: int,
    ) -> SessionStats:
        """The figures until now, beside those that a session itself knows."""
        spent, frames = list(self._spent), list(self._frames)
        p95 = sorted(spent)[max(0, -(-len(spent) * 95 // 100) - 1)] if spent else 0.0
        return SessionStats(
            num_steps=num_steps,
            fps=sum(frames) / sum(spent) if sum(spent) > 0 else 0.0,
            step_ms=1000 * statistics.median(spent) if spent else 0.0,
            step_p95_ms=1000 * p95,
            late=self._late,
            stalls=self._stalls,
            bytes_held=bytes_held,
            num_moments=num_moments,
            num_places=num_places,
            num_lost=num_lost,
            company=company,
        )


def asked(source: Source) -> Callable[[], Action | None]:
    """A source of actions as a function; RequestError for what is none."""
    if callable(source):
        return source
    if isinstance(source, str) or not isinstance(source, Iterable):
        raise RequestError(
            f"stream takes a function that returns an Action, or Actions, got {shown(source)}"
        )
    each = iter(source)
    return lambda: next(each, None)
