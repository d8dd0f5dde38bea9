"""An inference engine for Sora-class video diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sora_engine.async_engine import AsyncEngine
    from sora_engine.config import Limits
    from sora_engine.engine import Engine
    from sora_engine.errors import (
        BackendError,
        CheckpointError,
        EngineClosedError,
        JobCancelledError,
        JobFailedError,
        MediaError,
        QueueFullError,
        RequestError,
        SoraError,
    )
    from sora_engine.guidance import Guidance
    from sora_engine.job import Job, JobState, Progress
    from sora_engine.request import Clip, Shot, VideoRequest
    from sora_engine.video import Video
    from sora_engine.windows import WindowPlan

_HOMES = {
    "AsyncEngine": "async_engine",
    "Limits": "config",
    "Engine": "engine",
    "BackendError": "errors",
    "CheckpointError": "errors",
    "EngineClosedError": "errors",
    "JobCancelledError": "errors",
    "JobFailedError": "errors",
    "MediaError": "errors",
    "QueueFullError": "errors",
    "RequestError": "errors",
    "SoraError": "errors",
    "Guidance": "guidance",
    "Job": "job",
    "JobState": "job",
    "Progress": "job",
    "Clip": "request",
    "Shot": "request",
    "VideoRequest": "request",
    "Video": "video",
    "WindowPlan": "windows",
}

__all__ = [
    "AsyncEngine",
    "BackendError",
    "CheckpointError",
    "Clip",
    "Engine",
    "EngineClosedError",
    "Guidance",
    "Job",
    "JobCancelledError",
    "JobFailedError",
    "JobState",
    "Limits",
    "MediaError",
    "Progress",
    "QueueFullError",
    "RequestError",
    "Shot",
    "SoraError",
    "Video",
    "VideoRequest",
    "WindowPlan",
]


def __getattr__(name: str) -> object:
    """Import public names on first use: the command line answers before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
