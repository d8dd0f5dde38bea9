"""What is made of a video: remix, edits, extensions, loop, connect, upscale, refine, and the same
again; and what is asked of one: cancel, priority, request, sync."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from sora_engine.serve.answers import video_for
from sora_engine.serve.document import FAILURES, takes
from sora_engine.serve.failures import ApiError, bad_value
from sora_engine.serve.menu import CREATE, OF_CLIPS, OF_VIDEOS
from sora_engine.serve.orders import Order, place, read
from sora_engine.serve.replies import Video
from sora_engine.serve.service import desk_of, owner_of, service_of
from sora_engine.serve.videos import content
from sora_engine.serve.waiting import ended, failure_of
from sora_engine.serve.wire import (
    LoopVideo,
    RefineVideo,
    RemixVideo,
    RepeatVideo,
    SetPriority,
    UpscaleVideo,
)

router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=FAILURES)


async def _placed(request: Request, order: Order) -> Video:
    return video_for(request, desk_of(request), await place(request, order))


async def _made_of(video_id: str, request: Request, work: str) -> Video:
    _, order = OF_VIDEOS[work]
    return await _placed(request, order(request, video_id))


def _takes(work: str) -> dict[str, Any]:
    return takes(OF_CLIPS[work].order.model, files=OF_CLIPS[work].files)


@router.post("/edits", operation_id="editVideo", openapi_extra=_takes("edits"))
async def edits(request: Request) -> Video:
    """A clip changed to fit a prompt: all of it, where a mask is white, or some of its frames."""
    return await _placed(request, OF_CLIPS["edits"].order)


@router.post("/extensions", operation_id="extendVideo", openapi_extra=_takes("extensions"))
async def extensions(request: Request) -> Video:
    """A clip made longer; the answer's `seconds` is the whole length."""
    return await _placed(request, OF_CLIPS["extensions"].order)


@router.post("/connect", operation_id="connectVideos", openapi_extra=_takes("connect"))
async def connect(request: Request) -> Video:
    """Two clips with new frames between them."""
    return await _placed(request, OF_CLIPS["connect"].order)


@router.post("/loop", operation_id="loopClip", openapi_extra=_takes("loop"))
async def loop_clip(request: Request) -> Video:
    """New frames that lead from a clip's end to its beginning."""
    return await _placed(request, OF_CLIPS["loop"].order)


@router.post("/upscale", operation_id="upscaleClip", openapi_extra=_takes("upscale"))
async def upscale_clip(request: Request) -> Video:
    """A clip at a larger size, its detail drawn anew."""
    return await _placed(request, OF_CLIPS["upscale"].order)


@router.post(
    "/sync",
    operation_id="createVideoSync",
    response_class=Response,
    openapi_extra=takes(CREATE.order.model, files=CREATE.files),
)
async def sync(request: Request) -> Response:
    """A video as the answer itself. A client that goes away cancels it."""
    row = await place(request, CREATE.order)
    row = await ended(request, desk_of(request), row)
    if row.state != "completed":
        raise failure_of(row)
    response = await content(row.id, request, "video")
    response.headers["x-video-id"] = row.id
    return response


@router.post("/characters", include_in_schema=False)
@router.get("/characters/{character_id}", include_in_schema=False)
async def characters() -> None:
    """The contract has characters, and no model here does."""
    raise ApiError(501, "not_supported", "characters: this server's models have none", retry=False)


@router.post("/{video_id}/remix", operation_id="remixVideo", openapi_extra=takes(RemixVideo))
async def remix(video_id: str, request: Request) -> Video:
    """The same request with another prompt, from the video that it became."""
    return await _made_of(video_id, request, "remix")


@router.post("/{video_id}/refine", operation_id="refineVideo", openapi_extra=takes(RefineVideo))
async def refine(video_id: str, request: Request) -> Video:
    """A draft at its full size."""
    return await _made_of(video_id, request, "refine")


@router.post("/{video_id}/again", operation_id="repeatVideo", openapi_extra=takes(RepeatVideo))
async def again(video_id: str, request: Request) -> Video:
    """The same request as it was, with its clips and its seed; what the body has is in place of its
    own."""
    return await _made_of(video_id, request, "again")


@router.post("/{video_id}/loop", operation_id="loopVideo", openapi_extra=takes(LoopVideo))
async def loop(video_id: str, request: Request) -> Video:
    """New frames that lead from a video's end to its beginning."""
    return await _made_of(video_id, request, "loop")


@router.post("/{video_id}/upscale", operation_id="upscaleVideo", openapi_extra=takes(UpscaleVideo))
async def upscale(video_id: str, request: Request) -> Video:
    """A video at a larger size, its detail drawn anew."""
    return await _made_of(video_id, request, "upscale")


@router.post(
    "/{video_id}/priority", operation_id="setVideoPriority", openapi_extra=takes(SetPriority)
)
async def priority(video_id: str, request: Request) -> Video:
    """Let a video that waits go before or behind the caller's others; one that has begun stays as
    it is."""
    desk, owner = desk_of(request), owner_of(request)
    wanted = (await read(request, SetPriority)).priority
    most = service_of(request).most_priority(owner)
    if wanted > most:
        raise bad_value(f"priority: at most {most} here", "priority")
    row = await asyncio.to_thread(desk.put_at, owner, video_id, wanted)
    return video_for(request, desk, row)


@router.post("/{video_id}/cancel", operation_id="cancelVideo")
async def cancel(video_id: str, request: Request) -> Video:
    """Stop a video that is queued or being made, within a step. One that is done stays."""
    desk = desk_of(request)
    row = await asyncio.to_thread(desk.cancel, owner_of(request), video_id)
    return video_for(request, desk, row)


@router.get("/{video_id}/request", operation_id="retrieveRequest")
async def asked(video_id: str, request: Request) -> dict[str, Any]:
    """What would make the same video again: the task, its fields with the seed, and its clips by
    the hashes of their bytes."""
    row = desk_of(request).row(owner_of(request), video_id, "video")
    return {"id": row.id, "object": "video.request", **row.body}
