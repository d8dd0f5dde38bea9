"""How much of a picture or a clip is read: what a service says for the thread that reads.

The readers have bounds of their own; within these a service sets narrower ones, or wider, for all
that a thread reads. A context variable carries them: readers lie far below what knows of services.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class MediaLimits(NamedTuple):
    """pixels: the most of one picture. decoded_bytes: the most of a clip, decoded and scaled.

    None: the reader's own bound."""

    pixels: int | None = None
    decoded_bytes: int | None = None


_OWN_BOUNDS = MediaLimits()
_current: ContextVar[MediaLimits] = ContextVar("media_limits", default=_OWN_BOUNDS)


def media_limits() -> MediaLimits:
    """Those of this thread, or task."""
    return _current.get()


def set_media_limits(limits: MediaLimits) -> None:
    """For all that this thread, or task, reads from here on."""
    _current.set(limits)


@contextmanager
def reading_within(limits: MediaLimits) -> Iterator[None]:
    """For what is read inside the `with`."""
    before = _current.set(limits)
    try:
        yield
    finally:
        _current.reset(before)
