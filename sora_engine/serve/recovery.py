"""What a server finds at its start, and what becomes of it."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

from sora_engine.serve.clock import Clock
from sora_engine.serve.files import Files
from sora_engine.serve.live import MOST_ATTEMPTS, Live
from sora_engine.serve.store import DONE, Row, Store

logger = logging.getLogger(__name__)


def recover(store: Store, files: Files, clock: Clock) -> list[Live]:
    """The jobs that are to go on, in the order in which they came.

    A job whose results are in place is completed. One that was deleted is gone. One that is said to
    be completed, and whose results are missing, has failed.
    """
    for row in store.all("deleting"):
        files.remove(row.id)
        store.remove(row.id)
    for row in store.all("completed"):
        if not files.is_placed(row.id):
            _fail(store, clock, row, "lost", "the video's file is not there any more")
    for row in store.all(*DONE - {"completed"}):
        files.remove(row.id)
    going_on = []
    for row in store.all("queued", "running"):
        live = _taken_up(row, store, files, clock)
        if live is not None:
            going_on.append(live)
    stray = files.sweep_jobs({row.id for row in store.all()})
    if stray:
        logger.warning("%d files of no job were removed", stray)
    if going_on:
        logger.info("%d jobs go on", len(going_on))
    return going_on


def _taken_up(row: Row, store: Store, files: Files, clock: Clock) -> Live | None:
    if files.is_placed(row.id):  # it was killed between its results and its row
        told = json.loads((files.video(row.id) / "receipt.json").read_text(encoding="utf-8"))
        store.change(
            row.id,
            "completed",
            when={row.state},
            completed=clock.now(),
            facts=finished_facts(told["timings_s"], told["receipt"]),
        )
        files.remove(row.id, results=False)
        return None
    if row.state == "queued":
        return Live(row)
    saved = files.savepoint(row.id)
    mark = saved.stat().st_mtime_ns if saved.exists() else 0
    attempts = row.attempts if mark == row.facts.get("mark", 0) else 0
    if attempts >= MOST_ATTEMPTS:
        told = f"the server stopped {attempts} times while it made this video"
        _fail(store, clock, row, "crashed", told)
        files.remove(row.id)
        return None
    store.change(row.id, "queued", when={"running"}, attempts=attempts)
    return Live(replace(row, state="queued", attempts=attempts))


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
