"""An answer that refuses, sent below the application: by what guards it, before it has begun."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from starlette.types import Scope, Send

from sora_engine.serve.failures import ApiError


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a request's header, the name in lower case; None where it is not given."""
    return next(iter(headers(scope, name)), None)


def headers(scope: Scope, name: bytes) -> list[str]:
    """All values of a request's header."""
    return [bytes(value).decode("latin-1") for key, value in scope["headers"] if key == name]


async def refuse(
    send: Send, error: ApiError, *, before_end: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Send the whole answer.

    before_end: awaited when the client has all of it, and before the connection may close.
    """
    body = json.dumps(error.envelope()).encode()
    fields = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "cache-control": "no-store",
        **error.headers,
    }
    coded = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": coded})
    await send({"type": "http.response.body", "body": body, "more_body": before_end is not None})
    if before_end is not None:
        await before_end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
