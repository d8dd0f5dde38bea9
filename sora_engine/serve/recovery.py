"""What a server finds at its start, and what becomes of it.

Which job failed a server nobody can tell: a kill, the kernel's own for want of memory and a crash
look alike from the next process. So a loss is held against a job where all of this is so:

- nobody had told the server to stop (`STOPPING`): a supervisor kills what takes it too long to;
- the job got no step further than where it was begun, as its savepoint shows;
- and only losses with nothing else in flight can end it (`MOST_ALONE`). Those in company make it a
  suspect, which goes alone (`SUSPECT`).

From its first such loss on a job is saved after each step. So one that kills its server comes to
the place where it does, and is given up after it was lost there three times, alone. One that was in
flight whenever an operator killed the server gets further between. To be given up by mistake it
must have been lost, alone, three times in a row within one and the same step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from sora_engine.serve.clock import Clock
from sora_engine.serve.files import Files
from sora_engine.serve.live import MOST_ALONE, Live
from sora_engine.serve.store import Row, Store

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
        alone = row.facts.get("alone", 0)
        if row.kind == "image":
            store.change(row.id, "deleting", when={row.state})
        elif facts is not None:  # it was killed between its results and its row
            when, now = {row.state}, clock.now()
            store.change(row.id, "completed", when=when, completed=now, facts=facts)
        elif alone >= MOST_ALONE:
            said = f"the server stopped {alone} times while it made this video, at one point"
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
    asked = bool(store.noted(STOPPING))
    queued = []
    for row in in_flight:
        if row.id in placed:
            continue
        attempts, alone = row.attempts, row.facts.get("alone", 0)
        if files.mark(row.id) != row.facts.get("mark", 0):
            alone = 0
        elif not asked:
            attempts, alone = attempts + 1, alone + (len(in_flight) == 1)
        facts = {**row.facts, "alone": alone, "lost": False}
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
