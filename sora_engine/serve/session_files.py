"""Cookies of the page that several replicas know: one file each, in a folder that they share."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from hashlib import sha256
from pathlib import Path

from sora_engine.serve.access import MAX_SESSIONS, SESSION_S, Sessions
from sora_engine.serve.keys import Key, Keys


class SharedSessions(Sessions):
    """As `Sessions`, and they outlive a server. A file is named by the hash of its cookie, and
    holds the owner and the end alone."""

    def __init__(self, folder: Path, keys: Keys) -> None:
        super().__init__()
        self._folder, self._keys = folder, keys
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def begin(self, key: Key) -> str:
        """A new cookie's value; raises OSError."""
        now = time.time()
        ends = sorted((_read(file)[0], file) for file in self._folder.iterdir())
        for i, (until, file) in enumerate(ends):
            if until < now or len(ends) - i >= MAX_SESSIONS:
                file.unlink(missing_ok=True)
        token = secrets.token_urlsafe(32)
        told = json.dumps({"until": now + SESSION_S, "owner": key.owner})
        # Whole or not at all: another replica may read it at once.
        temporary = self._folder / f"new.{secrets.token_hex(8)}"
        temporary.write_text(told, encoding="utf-8")
        os.replace(temporary, self._file(token))
        return token

    def key_for(self, token: str) -> Key | None:
        """None for a cookie that ended, and for one whose owner has no key any more."""
        until, owner = _read(self._file(token))
        return self._keys.of_owner(owner) if until > time.time() else None

    def end(self, token: str) -> None:
        with contextlib.suppress(OSError):
            self._file(token).unlink()

    def _file(self, token: str) -> Path:
        return self._folder / sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def _read(file: Path) -> tuple[float, str]:
    """Until when, and whose; (0, "") for none."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return float(told["until"]), str(told["owner"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0, ""
