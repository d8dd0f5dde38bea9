"""The errors that the engine raises on purpose.

Each message names the offending value and, where there is one, the value that would work.
Errors about what a caller passed are also `ValueError`s, so that plain Python code can catch them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class SoraError(Exception):
    """Base of every error that the engine raises on purpose.

    Its message and its attributes survive pickling, and `to_fields` as JSON.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), str(self), self.__dict__)

    def to_fields(self) -> dict[str, Any]:
        """The error as JSON values, for another process."""
        attributes = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self.__dict__.items()
        }
        return {"error": type(self).__name__, "why": str(self), "attributes": attributes}


def error_from_fields(fields: Mapping[str, Any]) -> SoraError:
    """The error that `SoraError.to_fields` wrote; JobFailedError for a class that is not here."""
    kind = globals().get(fields["error"])
    known = isinstance(kind, type) and issubclass(kind, SoraError)
    attributes = dict(fields.get("attributes", {}))
    if attributes.get("path") is not None:
        attributes["path"] = Path(attributes["path"])
    return _restore(kind if known else JobFailedError, fields["why"], attributes)


def _restore(kind: Any, message: str, attributes: Mapping[str, Any]) -> Any:
    # Not by its constructor: some take more than the message, or write more into it.
    error = kind.__new__(kind, message)
    error.__dict__.update(attributes)
    return error


class RequestError(SoraError, ValueError):
    """A request asks for what the model or the limits cannot give."""


class ActionError(RequestError):
    """An action that cannot be done; the message names the nearest that can."""


class SessionError(RequestError):
    """A session that cannot be: the checkpoint takes no actions, or the request's values do not
    go together."""


class MarkError(RequestError):
    """A mark of another session, or of steps that are forgotten; the message names the oldest
    step that is kept."""


class MemoryLimitError(RequestError):
    """A request needs more memory than `Limits` or the device gives: `needed` and `limit` bytes."""

    def __init__(self, message: str, *, needed: int, limit: int):
        self.needed, self.limit = needed, limit
        super().__init__(message)


class MediaError(SoraError, ValueError):
    """An image or video file cannot be read, or cannot be written as asked."""


class CredentialsError(SoraError, ValueError):
    """A certificate or its key cannot sign, or a file's Content Credentials cannot be made."""


class UpsamplingError(SoraError, RuntimeError):
    """A prompt could not be rewritten; the message says what the model or the endpoint did."""


class BackendError(SoraError, RuntimeError):
    """A backend asked for by name cannot serve here; the message says what to install."""


class CheckpointError(SoraError, ValueError):
    """A checkpoint cannot be used; `path` and `tensor` say where, as far as that is known."""

    def __init__(self, message: str, *, path: str | Path | None = None, tensor: str | None = None):
        self.path = None if path is None else Path(path)
        self.tensor = tensor
        where = "" if path is None else f"{path}: "
        super().__init__(where + message)


class LayoutError(SoraError, ValueError):
    """A `ParallelConfig` that cannot be; the message gives the reason and the nearest that can."""


class RankFailedError(SoraError, RuntimeError):
    """A rank of a parallel engine raised, died or hung. `rank` is which, `reason` how."""

    def __init__(self, rank: int, reason: str):
        self.rank = rank
        self.reason = reason
        super().__init__(f"rank {rank} {reason}")


class JobCancelledError(SoraError):
    """The job was cancelled before it finished."""


class JobFailedError(SoraError, RuntimeError):
    """The engine met an unexpected error in a job; `__cause__` is that error."""


class NonFiniteError(SoraError, RuntimeError):
    """NaN or infinity where a video was in the making. `stage` is where (encoding, denoising or
    decoding), `step` which denoising step or latent frame, from 1; None while encoding."""

    def __init__(self, message: str, *, stage: str, step: int | None = None):
        self.stage, self.step = stage, step
        super().__init__(message)


class DeadlineExceededError(SoraError, TimeoutError):
    """The job was not done by the deadline that it was submitted with."""


class RefusedError(SoraError):
    """A hook of the service refused a request, or frames of its video."""


class JobMemoryError(SoraError, RuntimeError):
    """Memory ran out, and the job could not be made to take less."""


class DeviceError(SoraError, RuntimeError):
    """The device failed while the job was under way; the job itself may be in order."""


class ServeError(SoraError, RuntimeError):
    """The HTTP service cannot start or go on; the message names what stands in its way."""


class EngineClosedError(SoraError, RuntimeError):
    """The engine was closed, and takes no requests."""


class SessionClosedError(EngineClosedError):
    """The session was closed, and takes no actions."""


class EngineDeadError(EngineClosedError):
    """The device does not answer any more: this engine is done, and a new process is needed."""


class EngineForkedError(EngineDeadError):
    """The process was forked after the engine was made: its thread and device are the parent's."""


class QueueFullError(SoraError):
    """The queue is as long as `Limits` allows; a place may be free in `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float):
        self.retry_after_s = retry_after_s
        super().__init__(message)


class SessionLimitError(QueueFullError):
    """No further session has room: `Limits.max_sessions`, or memory; one may in `retry_after_s`
    seconds."""


class SessionLostError(SoraError, RuntimeError):
    """The device failed in the middle of a session's step.

    mark: what the session was before it, for `rewind` and `save`; it stays in this process. log:
    the actions until there, as `[[action, times], ...]` of JSON values: with the seed they make it
    again.
    """

    def __init__(self, message: str, *, mark: Any = None, log: Any = ()):
        self.mark, self.log = mark, list(log)
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), str(self), {**self.__dict__, "mark": None})

    def to_fields(self) -> dict[str, Any]:
        """As of other errors, without the mark."""
        fields = {"error": type(self).__name__, "why": str(self)}
        return {**fields, "attributes": {"mark": None, "log": self.log}}
