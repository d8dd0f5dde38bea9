"""The bodies of answers, field by field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from sora_engine.serve.wire import Body


class Failure(Body):
    """Why a job has no video."""

    code: str
    message: str


class Video(Body):
    """A job and, once it is `completed`, its video."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: Annotated[int, Field(description="Per cent of the work that is finished.")]
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    prompt: str | None = None
    size: str
    seconds: str
    task: Annotated[
        Literal[
            "create", "image", "extend", "loop", "connect", "edit", "inpaint", "fill", "upscale"
        ],
        Field(description="What was asked for; `loop` of videos from words that are loops, too."),
    ]
    remixed_from_video_id: str | None = None
    error: Failure | None = None
    quality: str | None = None
    num_frames: int
    fps: float
    seed: int
    stage: str
    steps_done: int
    num_steps: int
    frames_decoded: int
    eta_s: float | None = None
    queue_position: int | None = None
    draft: bool = False
    priority: Annotated[int, Field(description="Among the caller's own jobs that wait.")] = 0
    inference_time_s: float | None = None
    stage_durations: Annotated[dict[str, float], Field(default_factory=dict)]
    peak_memory_mb: Annotated[
        float | None, Field(description="What the job's plan promised at its peak, in MiB.")
    ] = None
    url: str | None = None
    receipt: dict[str, Any] | None = None


class VideoList(Body):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Ingredient(Body):
    """A clip that a video was made from. `signer` is null for one without credentials."""

    title: str
    relationship: str
    signer: str | None = None


class VideoCredentials(Body):
    """What a video's file says of where it comes from (C2PA), read back from it."""

    id: str
    object: Literal["video.credentials"] = "video.credentials"
    state: Annotated[
        Literal["trusted", "unknown", "invalid", "absent", "unread"],
        Field(
            description="unknown: unaltered, and nobody vouches for the signer here. unread: this "
            "server cannot read any."
        ),
    ]
    problems: Annotated[list[str], Field(default_factory=list)]
    signer: str | None = None
    issuer: str | None = None
    software: str | None = None
    source_type: str | None = None
    generation: Annotated[dict[str, Any], Field(default_factory=dict)]
    ingredients: Annotated[list[Ingredient], Field(default_factory=list)]
    manifests: int = 0


class DeletedVideo(Body):
    """What a deletion answers."""

    id: str
    deleted: bool = True
    object: Literal["video.deleted"] = "video.deleted"


class Picture(Body):
    """One picture."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None


class Images(Body):
    """What an image generation answers."""

    created: int
    data: list[Picture]
    output_format: str
    size: str
    quality: str | None = None
    background: str | None = None
    usage: dict[str, Any] | None = None


class Plan(Body):
    """What a request would take; nothing is queued."""

    size: str
    num_frames: int
    fps: float
    seconds: str
    num_steps: int
    canvas: str | None
    peak_memory_mb: float | None
    queue_position: int
    eta_s: float | None


class ErrorObject(Body):
    """What went wrong. code: what a program looks at."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Body):
    """The body of each answer that is no result."""

    error: ErrorObject
