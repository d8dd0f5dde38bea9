"""A client that waits for its job on the connection itself."""

from __future__ import annotations

import asyncio

from fastapi import Request

from sora_engine.serve.desk import Desk
from sora_engine.serve.failures import ApiError
from sora_engine.serve.store import Row

LOOK_EVERY_S = 0.25
"""How often it is asked whether the client is still there."""


OF_THE_REQUEST = frozenset(
    ("invalid_value", "memory_limit", "unreadable_media", "deadline", "cancelled", "not_finite")
)
"""Codes of jobs that failed by what was asked, or by who asked; they would fail again."""


def failure_of(row: Row) -> ApiError:
    """The answer to a client that waited for a job which is not completed."""
    error = row.facts.get("error", {"code": "internal", "message": "the server failed"})
    status = 400 if error["code"] in OF_THE_REQUEST else 500
    status = 403 if error["code"] == "refused" else status
    return ApiError(status, error["code"], error["message"], retry=False)


async def ended(request: Request, desk: Desk, row: Row) -> Row:
    """The job once it is done. A client that goes away cancels it, and nothing is kept of one that
    was done by the time it is noticed, as nobody was told its name: then ApiError 499."""
    live = desk.live(row.id)
    if live is not None:
        done = asyncio.ensure_future(asyncio.shield(asyncio.wrap_future(live.done)))
        try:
            while not done.done():
                await asyncio.wait({done}, timeout=LOOK_EVERY_S)
                if await request.is_disconnected():
                    raise ApiError(499, "gone", "the client has gone")
        except BaseException:
            await asyncio.to_thread(desk.delete, row.owner, row.id)
            raise
    return desk.row(row.owner, row.id)
