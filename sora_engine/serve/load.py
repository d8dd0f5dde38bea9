"""How much a server has before it, for those who share jobs out over several."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sora_engine.serve.desk import Desk
    from sora_engine.serve.live import Live


@dataclass(frozen=True, slots=True)
class Load:
    """waiting, running: jobs. tokens: of all steps that are still to be taken. room: how many more
    jobs are let in. taken: how many were, since the server was started."""

    waiting: int = 0
    running: int = 0
    tokens: int = 0
    room: int = 0
    taken: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_of(desk: Desk) -> Load:
    """A desk's load now."""
    lives, taken = desk.census()
    at_work = sum(live.stage != "queued" for live in lives)
    waiting, running = len(lives) - at_work, at_work
    settings = desk.settings
    room = settings.max_queue + settings.max_running - waiting - running
    tokens = sum(_tokens_left(live) for live in lives)
    return Load(waiting, running, round(tokens), max(0, room), taken)


def _tokens_left(live: Live) -> float:
    """Of a job; decoding, which has no tokens, counts as nothing."""
    whole = float(live.row.facts.get("tokens", 0))
    if live.job is None:
        return whole
    now = live.job.progress
    return whole * (1 - now.steps_done / max(1, now.num_steps))
