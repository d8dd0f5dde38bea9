"""A job as it goes: its events, and the picture of its last step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from sora_engine.serve.answers import video_for
from sora_engine.serve.document import FAILURES
from sora_engine.serve.events import Events
from sora_engine.serve.failures import ApiError
from sora_engine.serve.preview import MEDIA_TYPE, preview_webp
from sora_engine.serve.service import desk_of, owner_of

router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=FAILURES)

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events `progress`, and `done` as the last.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}
_PICTURE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "An animated WebP.",
        "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
    },
    304: {"description": "The client has it."},
}


@router.get(
    "/{video_id}/events",
    operation_id="streamEvents",
    response_class=StreamingResponse,
    responses=_STREAM,
)
async def events(video_id: str, request: Request) -> Response:
    """The video, each time that it got further, as server-sent events."""
    desk, owner = desk_of(request), owner_of(request)
    desk.row(owner, video_id, "video")
    streams: Events = request.app.state.events
    client = f"{owner}@{request.client.host if request.client else ''}"
    streams.check(client)

    def word() -> dict[str, Any]:
        row = desk.watched(owner, video_id, "video")
        return video_for(request, desk, row).model_dump(mode="json")

    async def lines() -> AsyncIterator[bytes]:
        leave = streams.enter(client)
        try:
            async for line in streams.stream(video_id, word, request.headers.get("last-event-id")):
                yield line
        finally:
            leave()

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), headers=headers, media_type="text/event-stream")


@router.get(
    "/{video_id}/preview",
    operation_id="previewVideo",
    response_class=Response,
    responses=_PICTURE,
)
async def preview(video_id: str, request: Request) -> Response:
    """What the last step makes of the video, small: for models that bring such a map, and while
    steps are taken."""
    desk = desk_of(request)
    row = desk.row(owner_of(request), video_id, "video")
    live = desk.live(row.id)
    job = None if live is None else live.job
    if job is None or job.preview is None:
        raise ApiError(
            404, "no_preview", "there is no preview now; a completed video has a thumbnail"
        )
    step, picture = job.progress.steps_done, job.preview
    headers = {"ETag": f'"{row.id}-{step}"', "Cache-Control": "no-cache", "x-step": str(step)}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    seconds = job.request.num_frames / job.request.fps
    body = await asyncio.to_thread(preview_webp, picture, seconds)
    return Response(body, headers=headers, media_type=MEDIA_TYPE)
