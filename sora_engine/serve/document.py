"""The OpenAPI document. Bodies may be JSON or a form, so their schemas are named here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sora_engine.serve import replies, wire

_REF = "#/components/schemas/{model}"
_BODIES: tuple[type[BaseModel], ...] = (
    *(wire.CreateVideo, wire.RemixVideo, wire.EditVideo, wire.ExtendVideo, wire.LoopVideo),
    *(wire.ConnectVideos, wire.UpscaleVideo, wire.RefineVideo, wire.CreateImages),
    *(wire.LoopClip, wire.UpscaleClip, wire.RepeatVideo, wire.SetPriority),
)


def takes(model: type[BaseModel], *, files: tuple[str, ...] = ()) -> dict[str, Any]:
    """`openapi_extra` of a route that reads such a body as JSON or as a form.

    files: the fields that a form may give as a file.
    """
    schema: dict[str, Any] = {"$ref": _REF.format(model=model.__name__)}
    form = schema
    if files:
        binary = {"type": "string", "format": "binary"}
        form = {
            "anyOf": [
                schema,
                {"type": "object", "properties": dict.fromkeys(files, binary)},
            ]
        }
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}


FAILURES: dict[int | str, dict[str, Any]] = {
    code: {"model": replies.ErrorBody, "description": said}
    for code, said in (
        (400, "A value that cannot be: `param` names it."),
        (404, "There is no such thing, or it is another key's."),
        (429, "The queue is full, or the key has too many jobs: see `Retry-After`."),
        (503, "The server loads, drains, is dead, or its disk is full."),
    )
}
"""The answers of routes that are no results."""


def describe(app: FastAPI) -> None:
    """Have `app.openapi()` give the document with all bodies."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _, bodies = models_json_schema(
                [(model, "validation") for model in _BODIES], ref_template=_REF
            )
            schemas = made.setdefault("components", {}).setdefault("schemas", {})
            for name, schema in bodies["$defs"].items():
                schemas.setdefault(name, schema)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
