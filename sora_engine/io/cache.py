"""Where a user's own files of the engine lie: what can be made again, and what cannot."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(*parts: str) -> Path | None:
    """`$XDG_CACHE_HOME/sora_engine/...`, or under `~/.cache`; None where there is no such place.

    What is kept there can be made again. Nothing depends on it: a place may not be there at all.
    As the XDG specification says, a relative XDG_CACHE_HOME counts as none. A user without a home
    has no cache: a container's, with a number that its `passwd` does not know. The folder need not
    be there, and whether it can be made shows when it is.
    """
    return _folder("XDG_CACHE_HOME", ".cache", parts)


def config_folder(*parts: str) -> Path | None:
    """`$XDG_CONFIG_HOME/sora_engine/...`, or under `~/.config`, by the same rules."""
    return _folder("XDG_CONFIG_HOME", ".config", parts)


def _folder(variable: str, default: str, parts: tuple[str, ...]) -> Path | None:
    base = os.environ.get(variable, "")
    if not os.path.isabs(base):
        try:
            home = Path.home()
        except (RuntimeError, KeyError):
            return None
        if not home.is_absolute():
            return None
        base = str(home / default)
    return Path(base, "sora_engine", *parts)
