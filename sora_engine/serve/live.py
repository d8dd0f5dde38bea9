"""A job while it is in this process: its row, its engine job, and the frames on their way."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sora_engine.request import VideoRequest
    from sora_engine.runtime.job import Job
    from sora_engine.serve.spool import Spool
    from sora_engine.serve.store import Row
    from sora_engine.serve.trail import Trail


MOST_ALONE = 3
"""A job under which the server was lost so often at one and the same point, with nothing else in
flight, is not begun again: it is what kills the server, as far as anybody can tell."""
MOST_STUCK = 10
"""Likewise, wherever it was between two savepoints."""
SUSPECT = 2
"""After so many attempts that got it nowhere, in whatever company, a job has the engine for itself:
then it takes no other along, and is no other's victim."""


@dataclass(slots=True, eq=False)
class Live:
    """A job that is not done.

    row: as it was when it came in; its state there is not kept up before its last. request: None
    until it is made anew from the row. job: the engine's, once it has it. done: is set, with
    nothing, when the row has its last state, or is gone. steps: that it has done, as it last told.
    stopping: it is to be cancelled. keeping: what is cancelled is to be queued again, as the server
    stops or the disk is full. retried: the device or a rank failed under it before. engine_done_at:
    by the steady clock. counted: its end is in the metrics.
    """

    row: Row
    request: VideoRequest | None = None
    job: Job | None = None
    spool: Spool | None = None
    trail: Trail | None = None
    handed_over: threading.Event = field(default_factory=threading.Event)
    done: Future[None] = field(default_factory=Future)
    stopping: bool = False
    keeping: bool = False
    steps: int = 0
    retried: bool = False
    engine_done_at: float | None = None
    counted: bool = False
    started: threading.Lock = field(default_factory=threading.Lock)
    finisher: threading.Thread | None = None

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what failed the server, the device or a rank: it goes alone."""
        return self.retried or self.row.attempts >= SUSPECT

    @property
    def stage(self) -> str:
        """Where it is: `queued`, `encoding`, `denoising`, `decoding` or `writing`."""
        job = self.job
        if job is None:
            return "queued"
        return "writing" if job.done() else str(job.state)
