"""How long results are kept: by their age, and by the room that all of them take."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from sora_engine.serve.files import size_of
from sora_engine.serve.store import DONE
from sora_engine.serve.translate import uploads_of

if TYPE_CHECKING:
    from sora_engine.serve.clock import Clock
    from sora_engine.serve.files import Files
    from sora_engine.serve.settings import Settings
    from sora_engine.serve.store import Store

logger = logging.getLogger(__name__)

EVERY_S = 60.0
UPLOADS_S = 3600.0
"""How long an upload is kept that no job needs."""
KEYS_S = 86400.0
"""How long an idempotency key is known."""


class Keeper:
    """Expires results and forgets rows, once a minute. What is being read stays readable."""

    def __init__(self, store: Store, files: Files, settings: Settings, clock: Clock) -> None:
        self._store, self._files = store, files
        self._settings, self._clock = settings, clock
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="sora-keeper", daemon=True)

    def start(self) -> None:
        """Sweep from now on."""
        self._thread.start()

    def close(self) -> None:
        """Sweep no more."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while not self._over.is_set():
            try:
                self.sweep()
            except Exception:  # a disk that is full, a store that is locked: the next time
                logger.exception("a sweep failed")
            self._over.wait(EVERY_S)

    def sweep(self) -> None:
        """Expire, forget and remove what is due now."""
        now, settings = self._clock.now(), self._settings
        self._store.note("last_seen", repr(now))
        for name in self._store.names("completed", before=now - settings.keep_s):
            self._expire(name)
        for name in self._store.names(*DONE, "expired", before=now - settings.keep_jobs_s):
            if self._store.change(name, "deleting", when=DONE | {"expired"}):
                self._files.remove(name)
                self._store.remove(name)
        self._make_room()
        self._store.forget_keys(now - KEYS_S)
        stale = self._files.stale_uploads(now - UPLOADS_S)
        if stale:
            rows = self._store.all("queued", "running", "completed", "failed")
            needed = set().union(*(uploads_of(row.body) for row in rows))
            self._files.remove_uploads(set(stale) - needed, now - UPLOADS_S)

    def _make_room(self) -> None:
        names = self._store.names("completed")
        sizes = [size_of(self._files.video(name)) for name in names]
        total = sum(sizes)
        for name, size in zip(names, sizes, strict=True):  # the oldest first
            if total <= self._settings.disk_limit:
                return
            self._expire(name)
            total -= size

    def _expire(self, name: str) -> None:
        if self._store.change(name, "expired", when={"completed"}):
            self._files.remove(name)


def last_seen(noted: Callable[[str], str | None]) -> float:
    """When the service was last alive, as `Keeper` noted it."""
    text = noted("last_seen")
    return 0.0 if text is None else float(text)
