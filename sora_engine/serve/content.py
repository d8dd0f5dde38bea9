"""A file as an answer: whole or in part, and to its end even where it is removed meanwhile."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from sora_engine.serve.failures import ApiError

_CHUNK = 256 << 10


def send_file(request: Request, path: Path, media_type: str, name: str) -> Response:
    """Answer with a file, or with the part that `Range` asks for (RFC 9110, one range).

    name: under which a browser saves it. Raises FileNotFoundError before anything is sent.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    size = os.fstat(descriptor).st_size
    # Results are never changed: the id alone names the bytes.
    etag = f'"{name}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Cache-Control": "private, max-age=3600, immutable",
        "Content-Disposition": f'inline; filename="{name}"',
    }
    if _has(request.headers.get("if-none-match", ""), etag):
        os.close(descriptor)
        return Response(status_code=304, headers=headers)
    start, stop, status = 0, size, 200
    asked = request.headers.get("range")
    if asked is not None and request.headers.get("if-range", etag) == etag:
        try:
            part = _part(asked, size)
        except ApiError:
            os.close(descriptor)
            raise
        if part is not None:
            (start, stop), status = part, 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    headers["Content-Length"] = str(stop - start)
    if request.method == "HEAD":
        os.close(descriptor)
        return Response(status_code=status, headers=headers, media_type=media_type)
    body = _read(descriptor, start, stop)
    return StreamingResponse(body, status, headers, media_type)


def _has(tags: str, etag: str) -> bool:
    """Whether `If-None-Match` names what there is; a weak tag means the same bytes here."""
    named = [tag.strip().removeprefix("W/") for tag in tags.split(",")]
    return etag in named or named == ["*"]


def _part(asked: str, size: int) -> tuple[int, int] | None:
    """Where a part begins, and where it ends; None for what is to be passed over."""
    match = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", asked.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, stop = max(0, size - int(match[2])), size
    else:
        start, stop = int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)
    if start >= stop:
        raise ApiError(
            416,
            "range_not_satisfiable",
            f"the file has {size} bytes",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, stop


async def _read(descriptor: int, start: int, stop: int) -> AsyncIterator[bytes]:
    try:
        while start < stop:
            count = min(_CHUNK, stop - start)
            chunk = await anyio.to_thread.run_sync(os.pread, descriptor, count, start)
            if not chunk:
                return
            start += len(chunk)
            yield chunk
    finally:
        os.close(descriptor)
