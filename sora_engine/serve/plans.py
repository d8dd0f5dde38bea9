"""What a video, or a work on one, would take: `/plan` behind each route that makes some. Nothing is
queued."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request

from sora_engine.serve.document import FAILURES, takes
from sora_engine.serve.menu import CREATE, OF_CLIPS, OF_VIDEOS, Work
from sora_engine.serve.orders import Order, propose
from sora_engine.serve.replies import Plan

router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=FAILURES)


def _of_body(work: Work) -> Callable[[Request], Awaitable[Plan]]:
    async def plan(request: Request) -> Plan:
        return await propose(request, work.order)

    return plan


def _of_video(order: Callable[[Request, str], Order]) -> Callable[[str, Request], Awaitable[Plan]]:
    async def plan(video_id: str, request: Request) -> Plan:
        return await propose(request, order(request, video_id))

    return plan


router.add_api_route(
    "/plan",
    _of_body(CREATE),
    methods=["POST"],
    operation_id="planVideo",
    description="What a video would take. Nothing is queued.",
    openapi_extra=takes(CREATE.order.model, files=CREATE.files),
)
for name, work in OF_CLIPS.items():
    router.add_api_route(
        f"/{name}/plan",
        _of_body(work),
        methods=["POST"],
        operation_id=f"plan{name.capitalize()}OfClip",
        description=f"What `POST /v1/videos/{name}` would take. Nothing is queued.",
        openapi_extra=takes(work.order.model, files=work.files),
    )
for name, (model, order) in OF_VIDEOS.items():
    router.add_api_route(
        f"/{{video_id}}/{name}/plan",
        _of_video(order),
        methods=["POST"],
        operation_id=f"plan{name.capitalize()}OfVideo",
        description=f"What `POST /v1/videos/{{video_id}}/{name}` would take. Nothing is queued.",
        openapi_extra=takes(model),
    )
