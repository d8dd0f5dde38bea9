"""JSON files of a model folder, read as untrusted input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.io.file_kind import JSON, kind_of
from sora_engine.io.links import refuse_stray_link

MAX_BYTES = 64 * 2**20  # the index of a model of 100,000 tensors is about 10 MB


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `CheckpointError` when there is none."""
    refuse_stray_link(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{size} bytes of JSON; {MAX_BYTES} is the most", path=path)
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError("no such file", path=path) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read ({error.strerror})", path=path) from None
    try:
        return parse_json_object(text, path)
    except CheckpointError:
        what = kind_of(path)
        if what in (None, JSON):
            raise
        raise CheckpointError(f"the file is not JSON: it is {what}", path=path) from None


def parse_json_object(text: bytes, path: Path, what: str = "the file") -> dict[str, Any]:
    """`text` as a JSON object in UTF-8 with no key twice; `path` and `what` serve the error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise CheckpointError(f"{what} has the key {twice[0]!r} twice", path=path)
        return values

    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise CheckpointError(f"{what} is not JSON: not UTF-8 text", path=path) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise CheckpointError(f"{what} is not JSON: {error.msg}, {where}", path=path) from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what} is not JSON that can be read", path=path) from None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{what} holds a JSON {type(values).__name__}; it must be an object", path=path
        )
    return values
