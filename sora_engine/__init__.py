"""An inference engine for Sora-class video diffusion transformers."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from sora_engine.request import tasks

# `import sora_engine.tasks` finds the room's module, as `import os.path` does.
sys.modules[f"{__name__}.tasks"] = tasks
# What reads clips had this name in 0.1.0. It is imported on first use: it loads PyAV.
clips = sys.modules[f"{__name__}.clips"] = ModuleType(f"{__name__}.clips")
vars(clips)["__getattr__"] = lambda name: getattr(import_module("sora_engine.request.frames"), name)

if TYPE_CHECKING:
    from sora_engine.config import Limits, ParallelConfig
    from sora_engine.errors import (
        ActionError,
        BackendError,
        CheckpointError,
        DeadlineExceededError,
        DeviceError,
        EngineClosedError,
        EngineDeadError,
        EngineForkedError,
        JobCancelledError,
        JobFailedError,
        JobMemoryError,
        LayoutError,
        MarkError,
        MediaError,
        MemoryLimitError,
        NonFiniteError,
        QueueFullError,
        RankFailedError,
        RefusedError,
        RequestError,
        SessionClosedError,
        SessionError,
        SessionLimitError,
        SessionLostError,
        SoraError,
        UpsamplingError,
    )
    from sora_engine.request.actions import Action
    from sora_engine.request.cascade import Stage
    from sora_engine.request.guidance import Guidance
    from sora_engine.request.lora import Lora
    from sora_engine.request.request import Clip, Footage, Shot, VideoRequest
    from sora_engine.request.session import SessionRequest
    from sora_engine.request.windows import SparsePlan, WindowPlan
    from sora_engine.runtime.async_engine import AsyncEngine
    from sora_engine.runtime.cascade import CascadeJob, submit_cascade
    from sora_engine.runtime.engine import Engine
    from sora_engine.runtime.hooks import FrameSpan, Hooks
    from sora_engine.runtime.job import Job, JobState, Progress
    from sora_engine.runtime.memory import MemoryPlan
    from sora_engine.runtime.session import Session
    from sora_engine.video import Receipt, Video

_HOMES = {
    "AsyncEngine": "runtime.async_engine",
    "Limits": "config",
    "ParallelConfig": "config",
    "CascadeJob": "runtime.cascade",
    "submit_cascade": "runtime.cascade",
    "Stage": "request.cascade",
    "Engine": "runtime.engine",
    "Action": "request.actions",
    "ActionError": "errors",
    "BackendError": "errors",
    "CheckpointError": "errors",
    "DeadlineExceededError": "errors",
    "DeviceError": "errors",
    "EngineClosedError": "errors",
    "EngineDeadError": "errors",
    "EngineForkedError": "errors",
    "JobCancelledError": "errors",
    "JobFailedError": "errors",
    "JobMemoryError": "errors",
    "LayoutError": "errors",
    "MarkError": "errors",
    "MediaError": "errors",
    "MemoryLimitError": "errors",
    "NonFiniteError": "errors",
    "QueueFullError": "errors",
    "RankFailedError": "errors",
    "RefusedError": "errors",
    "RequestError": "errors",
    "SessionClosedError": "errors",
    "SessionError": "errors",
    "SessionLimitError": "errors",
    "SessionLostError": "errors",
    "SoraError": "errors",
    "UpsamplingError": "errors",
    "Guidance": "request.guidance",
    "FrameSpan": "runtime.hooks",
    "Hooks": "runtime.hooks",
    "Job": "runtime.job",
    "JobState": "runtime.job",
    "Progress": "runtime.job",
    "MemoryPlan": "runtime.memory",
    "Receipt": "video",
    "Lora": "request.lora",
    "Clip": "request.request",
    "Footage": "request.request",
    "Shot": "request.request",
    "VideoRequest": "request.request",
    "Video": "video",
    "SessionRequest": "request.session",
    "Session": "runtime.session",
    "SparsePlan": "request.windows",
    "WindowPlan": "request.windows",
}

__all__ = [
    "Action",
    "ActionError",
    "AsyncEngine",
    "BackendError",
    "CascadeJob",
    "CheckpointError",
    "Clip",
    "DeadlineExceededError",
    "DeviceError",
    "Engine",
    "EngineClosedError",
    "EngineDeadError",
    "EngineForkedError",
    "Footage",
    "FrameSpan",
    "Guidance",
    "Hooks",
    "Job",
    "JobCancelledError",
    "JobFailedError",
    "JobMemoryError",
    "JobState",
    "LayoutError",
    "Limits",
    "Lora",
    "MarkError",
    "MediaError",
    "MemoryLimitError",
    "MemoryPlan",
    "NonFiniteError",
    "ParallelConfig",
    "Progress",
    "QueueFullError",
    "RankFailedError",
    "Receipt",
    "RefusedError",
    "RequestError",
    "Session",
    "SessionClosedError",
    "SessionError",
    "SessionLimitError",
    "SessionLostError",
    "SessionRequest",
    "Shot",
    "SoraError",
    "SparsePlan",
    "Stage",
    "UpsamplingError",
    "Video",
    "VideoRequest",
    "WindowPlan",
    "submit_cascade",
    "tasks",
]


def __getattr__(name: str) -> object:
    """Import public names on first use: the command line answers before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
