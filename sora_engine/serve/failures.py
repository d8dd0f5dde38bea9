"""What an exception is to a client: a status, a code, and the envelope of the API."""

from __future__ import annotations

import errno
import re
import sqlite3
from collections.abc import Mapping
from typing import Any

from sora_engine import errors

FIELDS = (
    *("negative_prompt", "original_prompt", "prompt", "height", "width", "num_frames", "fps"),
    *("num_inference_steps", "guidance_scale_2", "guidance_scale", "guidance", "shift", "sigmas"),
    *("ladder", "solver", "seed", "strength", "loop", "shots", "window", "latents", "resample"),
    *("loras", "clips", "init", "priority", "deadline_s", "before_s", "after_s", "gap_s", "scale"),
    *("missing", "mask", "label"),
)
"""Names with which the engine's messages about a value begin."""


class ApiError(Exception):
    """An answer that is no result. `retry` False tells clients not to ask again."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})
        if retry is not None:
            self.headers["x-should-retry"] = "true" if retry else "false"

    def envelope(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        return envelope(self.status, self.code, self.message, self.param)


def envelope(
    status: int, code: str | None, message: str, param: str | None = None
) -> dict[str, Any]:
    """The body of an answer with this status."""
    kind = "invalid_request_error"
    if status >= 500:
        kind = "server_error"
    elif status == 429:
        kind = "rate_limit_error"
    elif status in (401, 403):
        kind = "authentication_error" if status == 401 else "permission_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def not_found(what: str = "video") -> ApiError:
    """404, and no word on whether it was ever there."""
    return ApiError(404, "not_found", f"there is no such {what}")


def bad_value(message: str, param: str | None = None) -> ApiError:
    """400 for a value that cannot be."""
    return ApiError(400, "invalid_value", message, param=param)


def code_of(error: BaseException) -> str:
    """The code of a job that failed with this error."""
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return "internal"


_CODES: tuple[tuple[type[BaseException], str], ...] = (
    (errors.MemoryLimitError, "memory_limit"),
    (errors.RequestError, "invalid_value"),
    (errors.RefusedError, "refused"),
    (errors.QueueFullError, "queue_full"),
    (errors.DeadlineExceededError, "deadline"),
    (errors.JobCancelledError, "cancelled"),
    (errors.JobMemoryError, "out_of_memory"),
    (errors.DeviceError, "device_error"),
    (errors.RankFailedError, "rank_failed"),
    (errors.EngineDeadError, "engine_dead"),
    (errors.EngineClosedError, "draining"),
    (errors.MediaError, "unreadable_media"),
    (errors.NonFiniteError, "not_finite"),
)


def message_of(error: BaseException, hidden: Mapping[str, str] | None = None) -> str:
    """What a client is told of an error: the words of those about its own request, and no other's.

    hidden: texts that are replaced, such as the folder of the server's data.
    """
    told = (
        *(errors.RequestError, errors.RefusedError, errors.QueueFullError, errors.MediaError),
        *(errors.DeadlineExceededError, errors.JobCancelledError, errors.NonFiniteError),
    )
    if not isinstance(error, told):
        return _PLAIN.get(code_of(error), "the server failed")
    text = str(error)
    for secret, word in (hidden or {}).items():
        text = text.replace(secret, word)
    return text


_PLAIN = {
    "out_of_memory": "memory ran out; a smaller size or length would take less",
    "device_error": "the device failed while the job was under way",
    "rank_failed": "a process of the engine failed",
    "engine_dead": "the engine is dead; a supervisor starts it anew",
    "draining": "the server is about to stop",
}


def api_error(error: Exception, hidden: Mapping[str, str] | None = None) -> ApiError:
    """The answer to a request that met this exception."""
    if isinstance(error, ApiError):
        return error
    code, message = code_of(error), message_of(error, hidden)
    if isinstance(error, errors.QueueFullError):
        wait = str(max(1, round(error.retry_after_s)))
        return ApiError(429, code, message, headers={"Retry-After": wait})
    if isinstance(error, errors.RefusedError):
        return ApiError(400, code, message)  # as OpenAI's moderation answers
    if isinstance(error, errors.EngineDeadError):
        return ApiError(503, code, message, retry=False)
    if isinstance(error, errors.EngineClosedError):
        return ApiError(503, code, message)
    if isinstance(error, (errors.RequestError, errors.MediaError)):
        return ApiError(400, code, message, param=param_of(message))
    if is_disk_full(error):
        return disk_full()
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        said = "another program has the server's store locked"
        return ApiError(503, "store_busy", said, headers={"Retry-After": "1"})
    return ApiError(500, "internal", "the server failed; its log has the request id")


def disk_full() -> ApiError:
    """503: nothing can be kept."""
    return ApiError(503, "disk_full", "the server's disk is full", headers={"Retry-After": "60"})


def is_disk_full(error: BaseException | None) -> bool:
    """Whether it, or what caused it, is a disk or a quota without room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def param_of(message: str) -> str | None:
    """The parameter that an engine's message begins with."""
    if re.match(r"\d+x\d+ is ", message):
        return "size"
    for name in FIELDS:
        if re.match(rf"(?:a |the )?{name}\b", message):
            return name
    return None
