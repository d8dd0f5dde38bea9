"""Files that are there whole or not at all, under names that fit."""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
from pathlib import Path

NAME_MAX = 255
"""Bytes of a file's name, where the system does not say."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to the disk, and rename. Raises OSError; leaves no half a file.

    A symbolic link stays one: what it points at is written.
    """
    refuse_no_name(path)
    target = written_through(path)
    temporary = temporary_beside(target)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def refuse_no_name(path: Path) -> None:
    """Raises OSError for a path that no file can have: an empty one, one that ends in `..`, one
    with a null character, and that of a folder."""
    if path.name in ("", "..") or "\0" in str(path):
        raise OSError(f"{str(path)!r} names no file")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file")


def written_through(path: Path) -> Path:
    """Where an output of this name goes: the path itself, or what a symbolic link points at, be it
    there or not. Raises OSError for links that go round in a circle, and for devices, pipes and
    sockets, in whose place no file is put."""
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise OSError(f"the link {path} leads in a circle")
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(f"{target} is a device, a pipe or a socket, and a file would take its place")
    return target


def temporary_beside(path: Path) -> Path:
    """A hidden name in the same folder that nothing has yet, and that is short enough."""
    tail = f".{secrets.token_hex(4)}.tmp"
    return path.with_name("." + _cut(path.name, name_max(path.parent) - len(tail) - 1) + tail)


def name_beside(path: Path, suffix: str) -> Path:
    """`path` with a further suffix. A name that does not fit so is cut, and a hash of it tells it
    from others that begin alike."""
    room = name_max(path.parent) - len(suffix)
    if len(os.fsencode(path.name)) <= room:
        return path.with_name(path.name + suffix)
    mark = "-" + hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return path.with_name(_cut(path.name, room - len(mark)) + mark + suffix)


def claim_beside(path: Path, suffix: str) -> Path:
    """A new, empty file of `name_beside`'s name; where something has that, of one with a number
    in it. Nothing that was there before is touched. Raises OSError."""
    for number in itertools.count(1):
        claimed = name_beside(path, suffix if number == 1 else f"-{number}{suffix}")
        try:
            claimed.open("xb").close()
        except FileExistsError:
            continue
        return claimed
    raise AssertionError


def name_max(folder: Path) -> int:
    """The most bytes of a name in a folder."""
    try:
        return min(os.pathconf(folder, "PC_NAME_MAX"), NAME_MAX)
    except (AttributeError, OSError, ValueError):  # Windows, or a file system that does not say
        return NAME_MAX


def _cut(name: str, size: int) -> str:
    """As many whole characters as fit into so many bytes."""
    while len(os.fsencode(name)) > size:
        name = name[:-1]
    return name
