"""`sora serve`: videos over HTTP. An extra: `pip install sora_engine[serve]`.

`make_app(engine, settings)` is the ASGI application, for those who embed it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sora_engine.serve.settings import Settings

if TYPE_CHECKING:
    from sora_engine.serve.app import make_app

__all__ = ["Settings", "make_app"]


def __getattr__(name: str) -> object:
    """`make_app` on first use: `Settings` are to be had without FastAPI."""
    if name != "make_app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sora_engine.serve.app import make_app

    return make_app
