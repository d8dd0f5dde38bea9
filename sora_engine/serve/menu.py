"""What may be made of a clip, and of a video: an order for each, by the end of its route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request

from sora_engine.serve.orders import Order
from sora_engine.serve.service import desk_of, owner_of
from sora_engine.serve.wire import (
    ConnectVideos,
    CreateVideo,
    EditVideo,
    ExtendVideo,
    LoopClip,
    LoopVideo,
    RefineVideo,
    RemixVideo,
    RepeatVideo,
    Sampling,
    UpscaleClip,
    UpscaleVideo,
)


@dataclass(frozen=True, slots=True)
class Work:
    """A task whose body names its clips. files: the fields that a form may give as a file."""

    order: Order
    files: tuple[str, ...] = ("video",)


CREATE = Work(Order("create", CreateVideo), ("input_reference",))
OF_CLIPS: dict[str, Work] = {
    "edits": Work(Order("edit", EditVideo), ("video", "mask")),
    "extensions": Work(Order("extend", ExtendVideo)),
    "connect": Work(Order("connect", ConnectVideos), ("first", "second")),
    "loop": Work(Order("loop", LoopClip)),
    "upscale": Work(Order("upscale", UpscaleClip)),
}
"""`POST /v1/videos/...`."""


def _task_of(request: Request, video_id: str) -> str:
    return str(desk_of(request).row(owner_of(request), video_id, "video").body["task"])


def _remix(request: Request, name: str) -> Order:
    return Order(_task_of(request, name), RemixVideo, source=name, again=True)


def _refine(request: Request, name: str) -> Order:
    return Order(_task_of(request, name), RefineVideo, source=name, again=True, refine=True)


def _repeat(request: Request, name: str) -> Order:
    return Order(_task_of(request, name), RepeatVideo, source=name, repeat=True)


OF_VIDEOS: dict[str, tuple[type[Sampling], Callable[[Request, str], Order]]] = {
    "remix": (RemixVideo, _remix),
    "refine": (RefineVideo, _refine),
    "again": (RepeatVideo, _repeat),
    "loop": (LoopVideo, lambda _, name: Order("loop", LoopVideo, source=name)),
    "upscale": (UpscaleVideo, lambda _, name: Order("upscale", UpscaleVideo, source=name)),
}
"""`POST /v1/videos/{id}/...`: the body, and the order. Raises ApiError where there is no such
video."""
