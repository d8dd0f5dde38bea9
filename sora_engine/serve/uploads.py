"""`/v1/uploads`: a picture or a clip that requests then give by its id."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any, BinaryIO, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from sora_engine.errors import MediaError
from sora_engine.serve.document import FAILURES
from sora_engine.serve.failures import ApiError, bad_value, message_of, not_found
from sora_engine.serve.form import read_form
from sora_engine.serve.intake import Examined, Intake
from sora_engine.serve.service import Service, service_of

router = APIRouter(prefix="/v1/uploads", tags=["uploads"], responses=FAILURES)


class Upload(BaseModel):
    """A file that was taken. id: for `upload` of a clip. fps: 1 for a picture."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    media_type: str
    width: int
    height: int
    num_frames: int
    fps: float


_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                    "required": ["file"],
                    "additionalProperties": False,
                }
            }
        },
    }
}


@router.post("", operation_id="createUpload", openapi_extra=_BODY)
async def create(request: Request) -> Upload:
    """Keep a PNG, JPEG, WebP, GIF, MP4 or WebM file: for an hour, and as long as a job needs it."""
    service = service_of(request)
    intake: Intake = request.app.state.intake
    form = await read_form(request)
    try:
        for name in (*form.fields, *form.files):
            if name != "file" or name in form.fields:
                raise bad_value(f"{name[:80]}: one file is taken, as the field `file`", name[:80])
        if "file" not in form.files:
            raise bad_value("file: a file is needed, as multipart/form-data", "file")
        source = form.files["file"].file
        size, sha256, found = await asyncio.to_thread(_kept, service, intake, source)
    finally:
        await form.close()
    request.app.state.metrics.uploads.inc(size)
    return _told(sha256, size, found)


@router.get("/{upload_id}", operation_id="retrieveUpload")
async def retrieve(upload_id: str, request: Request) -> Upload:
    """What is in an upload that is still kept. Who has its id may use it, and so may see this."""
    service = service_of(request)
    intake: Intake = request.app.state.intake
    if re.fullmatch(r"upload_[0-9a-f]{64}", upload_id) is None:
        raise not_found("upload")
    sha256 = upload_id.removeprefix("upload_")
    own = service.files.upload(sha256)
    path = own if own.is_file() else service.neighbours.upload(sha256)
    if path is None:
        raise not_found("upload")
    try:
        found = await asyncio.to_thread(intake.examine, path)
        size = path.stat().st_size
    except FileNotFoundError:  # it was removed in between
        raise not_found("upload") from None
    return _told(sha256, size, found)


def _told(sha256: str, size: int, found: Examined) -> Upload:
    return Upload(
        id=f"upload_{sha256}",
        bytes=size,
        media_type=found.kind,
        **{name: getattr(found, name) for name in ("width", "height", "num_frames", "fps")},
    )


def _kept(service: Service, intake: Intake, source: BinaryIO) -> tuple[int, str, Examined]:
    found: list[tuple[int, Examined]] = []

    def check(path: Path) -> None:
        try:
            found.append((path.stat().st_size, intake.examine(path)))
        except MediaError as error:
            told = message_of(error, service.hidden)
            raise ApiError(400, "unreadable_media", f"file: {told}", param="file") from error

    sha256 = service.files.keep_upload(source, check)
    size, examined = found[0]
    return size, sha256, examined
