"""`/v1/videos`: create, list, retrieve, delete, and the files."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response

from sora_engine.serve.answers import poll_after_ms, video_for
from sora_engine.serve.content import send_file
from sora_engine.serve.desk import Desk
from sora_engine.serve.document import FAILURES, takes
from sora_engine.serve.failures import ApiError, bad_value, not_found
from sora_engine.serve.ids import read_id
from sora_engine.serve.orders import Order, place
from sora_engine.serve.pictures import picture_of
from sora_engine.serve.provenance import credentials_of
from sora_engine.serve.replies import DeletedVideo, Video, VideoCredentials, VideoList
from sora_engine.serve.service import desk_of, owner_of
from sora_engine.serve.store import Row
from sora_engine.serve.wire import CreateVideo
from sora_engine.serve.writer import VIDEO

router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=FAILURES)

_MEDIA_TYPES = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/webp"}


@router.post(
    "",
    operation_id="createVideo",
    openapi_extra=takes(CreateVideo, files=("input_reference",)),
)
async def create(request: Request) -> Video:
    """Queue a video, from words or from a picture or a clip."""
    row = await place(request, Order("create", CreateVideo))
    return video_for(request, desk_of(request), row)


@router.get("", operation_id="listVideos")
async def videos(
    request: Request,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=0, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """The caller's videos, page by page: `after` is the last id of the page before."""
    desk, owner = desk_of(request), owner_of(request)
    behind = None if after is None else _place(desk, owner, after)
    rows = desk.store.page(owner, after=behind, limit=limit + 1, newest=order == "desc")
    data = [video_for(request, desk, row) for row in rows[:limit]]
    return VideoList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(rows) > limit,
    )


def _place(desk: Desk, owner: str, after: str) -> tuple[float, int]:
    """Where a page begins: behind a video that may be gone, or another replica's. Those of one
    microsecond are in the order of their replicas' names."""
    row = desk.store.get(after)
    if row is not None and row.owner == owner:
        return row.created, row.number
    known = read_id(after)
    if row is not None or known is None:
        raise bad_value("after: there is no such video", "after")
    replica, created = known
    return created, (-1 if replica < desk.settings.replica else 1 << 62)


@router.get("/{video_id}", operation_id="retrieveVideo")
async def retrieve(video_id: str, request: Request, response: Response) -> Video:
    """A video, and how far it is."""
    desk = desk_of(request)
    told = video_for(request, desk, desk.row(owner_of(request), video_id, "video"))
    if told.status in ("queued", "in_progress"):
        response.headers["openai-poll-after-ms"] = str(poll_after_ms(told))
    response.headers["Cache-Control"] = "no-store"
    return told


@router.delete("/{video_id}", operation_id="deleteVideo")
async def delete(video_id: str, request: Request) -> DeletedVideo:
    """Remove a video; one that is being made is stopped."""
    await asyncio.to_thread(desk_of(request).delete, owner_of(request), video_id)
    return DeletedVideo(id=video_id)


_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file.",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in sorted(set(_MEDIA_TYPES.values()))
        },
    },
    206: {"description": "The part that `Range` asks for."},
    304: {"description": "The client has it."},
    416: {"description": "There is no such part."},
}


@router.get(
    "/{video_id}/content",
    operation_id="downloadVideo",
    response_class=Response,
    responses=_CONTENT,
)
@router.head("/{video_id}/content", response_class=Response, include_in_schema=False)
async def content(
    video_id: str,
    request: Request,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
) -> Response:
    """The video, its first frame, or a sheet of its pictures."""
    desk = desk_of(request)
    row = _completed(desk, owner_of(request), video_id)
    path = desk.files.video(row.id) / VIDEO
    try:
        if variant != "video":
            frames = row.facts["num_frames"]
            path = await asyncio.to_thread(picture_of, desk.files, row.id, variant, frames)
        return send_file(request, path, _MEDIA_TYPES[variant], f"{row.id}.{path.name}")
    except FileNotFoundError:  # it was removed in between
        raise not_found() from None


@router.get("/{video_id}/credentials", operation_id="retrieveCredentials")
async def credentials(video_id: str, request: Request) -> VideoCredentials:
    """Who signed the video's file, whether it was altered since, and what it was made from."""
    desk = desk_of(request)
    row = _completed(desk, owner_of(request), video_id)
    try:
        return await asyncio.to_thread(credentials_of, row.id, desk.files.video(row.id) / VIDEO)
    except FileNotFoundError:  # it was removed in between
        raise not_found() from None


def _completed(desk: Desk, owner: str, video_id: str) -> Row:
    row = desk.row(owner, video_id, "video")
    if row.state != "completed":
        raise ApiError(400, "video_not_completed", f"the video is {row.state}, not completed")
    return row
