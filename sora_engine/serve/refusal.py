"""An answer that refuses, sent below the application: by what guards it, before it has begun."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def envelope(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The error object of OpenAI's interface."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a request's header, the name in lower case; None where it is not given."""
    for key, value in scope.get("headers", ()):
        if key == name:
            return bytes(value).decode("latin-1")
    return None


def headers(scope: Scope, name: bytes) -> list[str]:
    """All values of a request's header."""
    return [bytes(value).decode("latin-1") for key, value in scope["headers"] if key == name]


async def refuse(
    send: Send,
    status: int,
    code: str,
    message: str,
    *,
    more: Iterable[tuple[bytes, bytes]] = (),
    before_end: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Send the whole answer.

    more: headers. before_end: awaited when the client has all of the answer, and before the
    connection may close.
    """
    body = json.dumps(envelope(status, code, message)).encode()
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"cache-control", b"no-store"),
                (b"x-content-type-options", b"nosniff"),
                *more,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": before_end is not None})
    if before_end is not None:
        await before_end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
