"""`/v1/images/generations`: pictures, each a video of one frame."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from PIL import Image

from sora_engine.serve.document import FAILURES, takes
from sora_engine.serve.failures import not_found
from sora_engine.serve.form import Form
from sora_engine.serve.orders import Clerk, Order, read
from sora_engine.serve.replies import Images, Picture
from sora_engine.serve.service import desk_of, owner_of, service_of
from sora_engine.serve.store import Row
from sora_engine.serve.waiting import ended, failure_of
from sora_engine.serve.wire import CreateImages
from sora_engine.serve.writer import IMAGE

router = APIRouter(prefix="/v1/images", tags=["images"], responses=FAILURES)

ImageFormat = Literal["png", "jpeg", "webp"]
_OWN = (
    *("n", "response_format", "output_format", "output_compression", "quality", "background"),
    *("moderation", "stream", "style"),
)
"""Fields that say how pictures are answered, and not what they are."""


@router.post("/generations", operation_id="createImages", openapi_extra=takes(CreateImages))
async def create(request: Request) -> Images:
    """Make pictures, and answer with them."""
    body = await read(request, CreateImages)
    desk = desk_of(request)
    clerk = Clerk(service_of(request), desk, owner_of(request))
    fields = body.model_dump(exclude_unset=True, exclude_none=True)
    for name in _OWN:
        fields.pop(name, None)
    rows: list[Row] = []
    try:
        for i in range(body.n):
            own = dict(fields)
            if body.seed is not None:
                own["seed"] = (body.seed + i) % (1 << 63)
            order = Order("image", CreateImages, kind="image")
            rows.append(await asyncio.to_thread(clerk.place, order, Form(own), None))
        rows = [await ended(request, desk, row) for row in rows]
    except BaseException:
        for row in rows:
            await asyncio.to_thread(desk.forget, row)
        raise
    for row in rows:
        if row.state != "completed":
            raise failure_of(row)
    data = [await _picture(request, row, body) for row in rows]
    return Images(
        created=int(rows[0].created),
        data=data,
        output_format=body.output_format,
        size=rows[0].facts["size"],
        quality=body.quality,
        background="opaque",
    )


async def _picture(request: Request, row: Row, body: CreateImages) -> Picture:
    if body.response_format == "url":
        path = f"v1/images/{row.id}/content?format={body.output_format}"
        return Picture(url=f"{request.base_url}{path}")
    file = desk_of(request).files.video(row.id) / IMAGE
    data = await asyncio.to_thread(_coded, file, body.output_format, body.output_compression)
    return Picture(b64_json=base64.b64encode(data).decode())


@router.get(
    "/{image_id}/content",
    operation_id="downloadImage",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}, "description": "The picture."}},
)
async def content(
    image_id: str,
    request: Request,
    format: ImageFormat = "png",
    compression: Annotated[int | None, Query(ge=0, le=100)] = None,
) -> Response:
    """A picture that was made, in one of three formats."""
    desk = desk_of(request)
    row = desk.row(owner_of(request), image_id, "image")
    if row.state != "completed":
        raise not_found("image")
    try:
        data = await asyncio.to_thread(
            _coded, desk.files.video(row.id) / IMAGE, format, compression
        )
    except FileNotFoundError:
        raise not_found("image") from None
    name = f'inline; filename="{row.id}.{format}"'
    return Response(data, media_type=f"image/{format}", headers={"Content-Disposition": name})


def _coded(path: Path, kind: ImageFormat, compression: int | None) -> bytes:
    """The picture in a format; what made it stays in a PNG's own metadata."""
    if kind == "png":
        return path.read_bytes()
    out = io.BytesIO()
    with Image.open(path) as picture:
        quality = 90 if compression is None else max(1, compression)
        picture.convert("RGB").save(out, kind.upper(), quality=quality)
    return out.getvalue()
