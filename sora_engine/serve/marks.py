"""What a service does to its results beside writing them: a signature, and a mark in the pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sora_engine.io.credentials import Credentials
from sora_engine.io.watermark import PAYLOAD, Watermark, wanted
from sora_engine.request.sources import sources_of

if TYPE_CHECKING:
    from sora_engine.request import ResolvedRequest
    from sora_engine.serve.settings import Settings
    from sora_engine.video import Video


class Marks:
    """Those that the settings ask for.

    Raises CredentialsError for a certificate that cannot sign today.
    """

    def __init__(self, settings: Settings) -> None:
        self._mode = settings.watermark
        self._watermark = Watermark(settings.watermark_payload or PAYLOAD)
        self.credentials: Credentials | None = None
        if settings.sign_cert is not None and settings.sign_key is not None:
            self.credentials = Credentials.read(settings.sign_cert, settings.sign_key)

    def options(self, request: ResolvedRequest) -> dict[str, Any]:
        """What the writer of a request's result is told. Raises MediaError."""
        signed = self.credentials is not None
        marked = wanted(self._mode, request.height, signed)
        return {
            "credentials": self.credentials,
            "sources": sources_of(request) if signed else (),
            "watermark": self._watermark if marked else None,
        }

    def told(self, video: Video, request: ResolvedRequest) -> Video:
        """The video, whose receipt says whether the file's pixels were changed."""
        marked = wanted(self._mode, request.height, self.credentials is not None)
        if video.receipt is None or not marked:
            return video
        return replace(video, receipt=replace(video.receipt, watermark=self._watermark.payload))
