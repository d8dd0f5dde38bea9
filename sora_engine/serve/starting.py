"""How a job that waited begins: at the engine, anew or from where it was saved."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sora_engine.errors import CheckpointError, DeadlineExceededError
from sora_engine.serve.failures import ApiError
from sora_engine.serve.jobs import Jobs
from sora_engine.serve.live import Live
from sora_engine.serve.spool import Spool
from sora_engine.serve.trail import Trail

if TYPE_CHECKING:
    import numpy as np

    from sora_engine.runtime.job import Job, Progress
    from sora_engine.serve.finishing import Finisher

logger = logging.getLogger(__name__)

SHORT_S = 1.0
"""Steps that take less in all are made again after a kill, and not kept for it: of a job of 60 ms
keeping them is a twentieth."""


def begin(desk: Jobs, live: Live, finisher: Finisher) -> None:
    """Hand a job over to the engine; what that raises ends the job."""
    row = live.row
    # It is in the store before the engine has it: under a job that kills the process, the next
    # start finds it in flight.
    before = desk.store.change(
        row.id, "running", when={"queued"}, facts={"mark": desk.files.mark(row.id), "lost": False}
    )
    if before is None:
        desk.gone(live)
        return
    live.spool = Spool(desk.files.spool(row.id))
    live.trail = Trail(desk.files.trail(row.id))
    try:
        job = _submitted(desk, live)
    except Exception as error:
        finisher.end(live, error)
        return
    live.job = job
    live.trail.starts(job.resumed_at or 0)
    live.handed_over.set()
    with suppress(RuntimeError):  # without a thread to be had now, it begins as the engine is done
        finisher.start(
            live
        )  # here: the engine's own thread would wait for the new one's first breath
    job.add_done_callback(lambda _job: finisher.engine_done(live))
    if live.stopping or live.keeping:
        job.cancel()
    desk.tell(live)


def _submitted(desk: Jobs, live: Live) -> Job:
    row, settings = live.row, desk.settings
    if row.facts.get("weights", desk.engine.model.weights_hash) != desk.engine.model.weights_hash:
        raise ApiError(
            409, "model_changed", "the server has another model than when this was asked for"
        )
    saved = desk.files.savepoint(row.id)

    def take(frames: np.ndarray) -> None:
        assert live.spool is not None
        live.spool.put(frames)

    # What was lost once is saved after each step: if it was not what killed the server, the next
    # loss finds it further.
    lost = row.attempts > 0 or live.retried
    save_every_s = None if lost else settings.save_every_s or None
    save_last_s = 0.0 if save_every_s is None else min(save_every_s, SHORT_S)

    def tell(progress: Progress) -> None:
        assert live.trail is not None
        live.steps = progress.steps_done
        live.trail.goes(live.steps, progress.frames_decoded)
        desk.tell(live)

    options: dict[str, Any] = {
        "priority": row.facts.get("priority", 0),
        "deadline_s": _left_s(desk, live),
        "on_frames": take,
        "on_progress": tell,
        "save_to": saved,
        "save_every_s": save_every_s,
        "save_last_s": save_last_s,
        "keep_frames": False,
    }
    if saved.exists():
        try:
            return desk.engine.resume(saved, **options)
        except CheckpointError as error:
            logger.warning("a job begins anew, as its savepoint is none: %s", error)
            saved.unlink(missing_ok=True)
    if live.request is None:
        live.request = desk.translator.request_of(row.body)
    return desk.engine.submit(live.request, **options)


def _left_s(desk: Jobs, live: Live) -> float | None:
    """Of the deadline, which counts from the job's creation."""
    deadline_s = live.row.facts.get("deadline_s")
    if deadline_s is None:
        return None
    left = live.row.created + deadline_s - desk.clock.now()
    if left <= 0:
        raise DeadlineExceededError(
            f"the job was queued when its deadline of {deadline_s:g} s passed"
        )
    return float(left)
