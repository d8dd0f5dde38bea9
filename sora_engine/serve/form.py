"""A body, JSON or a form, as one plain dictionary; the files of a form beside it.

A form's `a[b]=1` is `{"a": {"b": 1}}`, one level deep, and `a[]=1` an item of a list. A field that
holds an object or a list may be a JSON text, in either kind of body: clients that send forms have
no other way to give one.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fastapi import Request
from starlette.datastructures import UploadFile

from sora_engine.serve.failures import ApiError, bad_value

MAX_FIELDS = 64
MAX_FILES = 16
MAX_FIELD_BYTES = 256 << 10

NESTED = frozenset(
    (
        *("timeline", "input_reference", "video", "mask", "first", "second", "shots", "clips"),
        *("window", "guidance", "loras", "sigmas", "init"),
    )
)
"""The fields that hold an object or a list."""


@dataclass(slots=True)
class Form:
    """A body's fields, and the files among them by their names."""

    fields: dict[str, Any]
    files: dict[str, UploadFile] = field(default_factory=dict)

    async def close(self) -> None:
        """Let go of the files."""
        for file in self.files.values():
            await file.close()


async def read_form(request: Request) -> Form:
    """The body of a request; ApiError 400 or 415 for one that cannot be read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(
            415,
            "unsupported_media_type",
            f"Content-Encoding: {coding[:40]} is not read; send the body plain",
        )
    if not kind and not await request.body():  # of a route whose fields may all be left out
        return Form({})
    if kind == "application/json":
        return Form(_parsed(_object(await request.body())))
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        return await _read_fields(request)
    raise ApiError(
        415,
        "unsupported_media_type",
        f"a body is application/json or multipart/form-data, got {kind[:80] or 'no Content-Type'}",
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body, parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise bad_value(f"the body is no JSON: {error}"[:300]) from error
    if not isinstance(value, dict):
        raise bad_value("the body must be a JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object each of whose names is there once: of two values either could be meant."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:80]} is given twice")
    return made


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


async def _read_fields(request: Request) -> Form:
    form = Form({})
    read = await request.form(
        max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
    )
    for name, value in read.multi_items():
        if isinstance(value, UploadFile):
            if name in form.files:
                raise bad_value(f"{name} is given twice", name)
            form.files[name] = value
        else:
            _put(form.fields, name, value)
    form.fields = _parsed(form.fields)
    return form


def _put(fields: dict[str, Any], name: str, value: str) -> None:
    match = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", name)
    if match is None:
        base = name.partition("[")[0]
        raise bad_value(
            f"{name[:80]}: a form holds one level of brackets; give {base[:40]} as a JSON text, or "
            "the body as JSON",
            base[:40],
        )
    base, key = match[1], match[2]
    if key is None:
        if base in fields:
            raise bad_value(f"{base} is given twice", base)
        fields[base] = value
        return
    inner = fields.setdefault(base, [] if key == "" else {})
    if isinstance(inner, list) and key == "":
        inner.append(value)
    elif isinstance(inner, dict) and key and key not in inner:
        inner[key] = value
    else:
        raise bad_value(f"{base} is given in two ways, or twice", base)


def _parsed(fields: dict[str, Any]) -> dict[str, Any]:
    """Texts of fields that hold objects or lists, as what they say."""
    return {
        name: _from_text(name, value) if name in NESTED and isinstance(value, str) else value
        for name, value in fields.items()
    }


def _from_text(name: str, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise bad_value(f"{name} must be an object or a list, or one as a JSON text", name) from (
            error
        )
