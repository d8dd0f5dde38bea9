"""The page: what a browser shows at `/`. Files of this folder, under a strict policy.

Nothing is built and nothing comes from elsewhere: plain ES modules and one style sheet.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

from sora_engine.serve.failures import not_found

router = APIRouter(include_in_schema=False)

_MODULES = (
    *("api", "app", "brush", "choices", "dialog", "foresight"),
    *("gallery", "media", "own", "timeline", "works"),
)
_KINDS = {
    **{f"{name}.js": "text/javascript" for name in _MODULES},
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
}


def _file(name: str, kind: str) -> Response:
    return FileResponse(Path(__file__).with_name(name), media_type=kind, headers=_HEADERS)


@router.get("/")
async def index() -> Response:
    """The page itself."""
    return _file("index.html", "text/html")


@router.get("/favicon.ico")
async def icon() -> Response:
    """Asked for by every browser."""
    return _file("icon.svg", _KINDS["icon.svg"])


@router.get("/page/{name}")
async def part(name: str) -> Response:
    """A module, the style sheet or the icon."""
    if name not in _KINDS:
        raise not_found("file")
    return _file(name, _KINDS[name])
