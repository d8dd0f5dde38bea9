"""What other replicas of the same service hold: their folders lie beside this one's.

A request may begin from a video or an upload that another replica has. Results are placed whole and
never change: reading a neighbour's takes no lock and no word with it, and works while it is down.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from sora_engine.serve.ids import read_id


@dataclass(frozen=True, slots=True)
class Result:
    """A finished video of another replica. folder: of its files."""

    folder: Path
    prompt: str | None


class Neighbours:
    """The folders beside a data folder; none where `shared` is False."""

    def __init__(self, data: Path, *, shared: bool) -> None:
        self._own, self._root = data.name, data.parent if shared else None

    def result(self, owner: str, name: str) -> Result | None:
        """An owner's finished video; None for another's, and for what is not there or not done."""
        known = read_id(name)
        if self._root is None or known is None or known[0] == self._own:
            return None
        folder = self._root / known[0] / "videos" / name
        try:
            told = json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return Result(folder, told.get("prompt")) if told.get("owner") == owner else None

    def upload(self, sha256: str) -> Path | None:
        """A client's file by its hash."""
        if self._root is None or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            return None
        found = (folder / "uploads" / sha256 for folder in sorted(self._root.iterdir()))
        return next((path for path in found if path.is_file()), None)
