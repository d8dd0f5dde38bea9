"""The errors that the engine raises on purpose.

Each message names the offending value and, where there is one, the value that would work.
Errors about what a caller passed are also `ValueError`s, so that plain Python code can catch them.
"""

from __future__ import annotations

from pathlib import Path


class SoraError(Exception):
    """Base of every error that the engine raises on purpose."""


class RequestError(SoraError, ValueError):
    """A request asks for what the model or the limits cannot give."""


class MediaError(SoraError, ValueError):
    """An image or video file cannot be read, or cannot be written as asked."""


class BackendError(SoraError, RuntimeError):
    """A backend asked for by name cannot serve here; the message says what to install."""


class CheckpointError(SoraError, ValueError):
    """A checkpoint cannot be used; `path` and `tensor` say where, as far as that is known."""

    def __init__(self, message: str, *, path: str | Path | None = None, tensor: str | None = None):
        self.path = None if path is None else Path(path)
        self.tensor = tensor
        where = "" if path is None else f"{path}: "
        super().__init__(where + message)


class JobCancelledError(SoraError):
    """The job was cancelled before it finished."""


class JobFailedError(SoraError, RuntimeError):
    """The engine met an unexpected error in a job; `__cause__` is that error."""


class EngineClosedError(SoraError, RuntimeError):
    """The engine was closed, and takes no requests."""


class QueueFullError(SoraError):
    """The queue is as long as `Limits` allows; a place may be free in `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float):
        self.retry_after_s = retry_after_s
        super().__init__(message)
