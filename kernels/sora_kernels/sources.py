"""What csrc holds, as a digest: compiled into the native library, and compared on loading it.

Standard library alone: setup.py runs this file before anything is installed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def digest(folder: Path) -> str:
    """16 hexadecimal digits over the names and contents of the sources below `folder`."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
        text = path.read_bytes().replace(b"\r\n", b"\n")
        found.update(f"{path.relative_to(folder).as_posix()} {len(text)}\n".encode() + text)
    return found.hexdigest()[:16]
