"""What a server finds at its start, and what becomes of it.

Which job failed a server nobody can tell: a kill, the kernel's own for want of memory and a crash
look alike from the next process. What tells a job that kills its server from one that was in flight
whenever an operator killed it is where it was (`trail`): the first is lost at the same point each
time, be it a step, a frame that is decoded or one that is written. So:

- Losses count where nothing else was in flight, at the point where the job was lost the time
  before. After three of them (`MOST_ALONE`) it is given up.
- Losses in company, and at ever other points, make it a suspect, which goes alone (`SUSPECT`).
- Losses alone without a new savepoint have a bound too (`MOST_STUCK`), for what kills a server
  now here, now there. From its first loss on a job is saved after each step.
- Losses of a server that was told to stop (`STOPPING`) count for nothing: a supervisor kills what
  takes it too long to.

To be given up by mistake a job must be killed three times in a row within the same step or frame,
alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from sora_engine.serve.clock import Clock
from sora_engine.serve.files import Files
from sora_engine.serve.live import MOST_ALONE, MOST_STUCK, Live
from sora_engine.serve.store import Row, Store
from sora_engine.serve.trail import last_word

logger = logging.getLogger(__name__)

STOPPING = "stopping"
"""A fact of the store: the server was told to stop."""


def recover(store: Store, files: Files, clock: Clock) -> list[Live]:
    """The jobs that are to go on, in the order in which they came.

    A job whose results are in place is completed. One that was deleted is gone, and so is a picture
    that was under way: who asked for it waited on the connection. A job that is said to be
    completed, and whose results are missing, has failed. A kill within this changes nothing of what
    the next start does.
    """
    for row in store.all("completed"):
        if not files.is_placed(row.id):
            _fail(store, clock, row, "lost", "the video's file is not there any more")
    waiting = store.all("queued", "running")
    told = {row.id: _told(files, row) for row in waiting}
    _count_losses(store, files, waiting, {name for name, facts in told.items() if facts})
    going_on = []
    for row in store.all("queued", "running"):
        facts = told[row.id]
        alone, stuck = row.facts.get("alone", 0), row.facts.get("stuck", 0)
        if row.kind == "image":
            store.change(row.id, "deleting", when={row.state})
        elif facts is not None:  # it was killed between its results and its row
            when, now = {row.state}, clock.now()
            store.change(row.id, "completed", when=when, completed=now, facts=facts)
        elif alone >= MOST_ALONE or stuck >= MOST_STUCK:
            where = "at one point" if alone >= MOST_ALONE else "without getting further"
            said = f"the server stopped {max(alone, stuck)} times while it made this video, {where}"
            _fail(store, clock, row, "crashed", said)
        else:
            going_on.append(Live(row))
    for row in store.all("deleting"):
        files.remove(row.id)
        store.remove(row.id)
    stray = files.sweep_jobs(
        {row.id for row in store.all("completed")}, {live.row.id for live in going_on}
    )
    if stray:
        logger.warning("%d files of no job were removed", stray)
    if going_on:
        logger.info("%d jobs go on", len(going_on))
    return going_on


def _told(files: Files, row: Row) -> dict[str, Any] | None:
    """What the results of a job tell of it, where they are in place."""
    try:
        told = json.loads((files.video(row.id) / "receipt.json").read_text(encoding="utf-8"))
        return finished_facts(told["timings_s"], told["receipt"])
    except (OSError, ValueError, KeyError, TypeError):  # not there; or the disk has damaged it
        return None


def _count_losses(
    store: Store, files: Files, waiting: Collection[Row], placed: Collection[str]
) -> None:
    """Queue the jobs that were in flight, with the losses that are held against them. In one
    transaction: who was in flight together is known only as long as all of them say so."""
    in_flight = [row for row in waiting if row.state == "running" or row.facts.get("lost")]
    counts, only = not store.noted(STOPPING), len(in_flight) == 1
    queued = []
    for row in in_flight:
        if row.id in placed:
            continue
        attempts, facts = row.attempts, {**row.facts, "lost": False}
        if counts:
            point = last_word(files.trail(row.id))
            saved = files.mark(row.id) != facts.get("mark", 0)
            same = point == (facts.get("point") or point)  # a first loss counts
            attempts += same or not saved
            if point:  # without, it was lost before the engine had it
                facts["point"] = point
                facts["alone"] = (facts.get("alone", 0) if same else 0) + (only and same)
            facts["stuck"] = 0 if saved else facts.get("stuck", 0) + only
        queued.append(replace(row, state="queued", attempts=attempts, facts=facts))
    store.requeue(queued, STOPPING)


def _fail(store: Store, clock: Clock, row: Row, code: str, message: str) -> None:
    error = {"code": code, "message": message}
    store.change(row.id, "failed", when={row.state}, completed=clock.now(), facts={"error": error})


def finished_facts(
    timings_s: dict[str, float], receipt: dict[str, Any] | None, writing_s: float = 0.0
) -> dict[str, Any]:
    """What a completed job's answers tell beside its request."""
    stages = ("encoding", "denoising", "decoding")
    return {
        "inference_time_s": sum(timings_s.get(stage, 0.0) for stage in stages),
        "stage_durations": {**timings_s, "writing": writing_s},
        "receipt": receipt,
    }
