"""Where what can be made again is kept. Nothing depends on it: a place may not be there at all."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path | None:
    """`$XDG_CACHE_HOME/sora_engine/...`, or under `~/.cache`; None where there is no such place.

    As the XDG specification says, a relative XDG_CACHE_HOME counts as none. A user without a home
    has no cache: a container's, with a number that its `passwd` does not know. The folder need not
    be there, and whether it can be made shows when it is.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        try:
            home = Path.home()
        except (RuntimeError, KeyError):
            return None
        if not home.is_absolute():
            return None
        base = str(home / ".cache")
    return Path(base, "sora_engine", *parts)
