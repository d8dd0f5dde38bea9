"""What a terminal sends for its keys, as names of keys."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

ASK = "\x1b[>11u\x1b[?u\x1b[?1004h"
"""Asks for key releases, and whether they come (the keyboard protocol of kitty, which others have:
https://sw.kovidgoyal.net/kitty/keyboard-protocol/), and to be told when the window is left. A
terminal that knows none of this ignores it."""
TAKE_BACK = "\x1b[?1004l\x1b[<u"
AWAY = "away"
"""The name of the key by which a terminal says that its window was left."""
SPEAKS = "speaks"
"""The name of the key by which a terminal says that it tells of releases."""

_ARROWS = {"A": "up", "B": "down", "C": "right", "D": "left"}
_NAMED = {9: "tab", 13: "enter", 27: "escape", 32: "space", 127: "backspace"}
# An arrow, with or without parameters, in either of two modes; a key by its code point.
_SEQUENCE = re.compile(rb"\x1b(?:\[([0-9;:?<>=]*)([@-~])|O([A-Za-z]))")
_LONGEST = 32
"""No sequence of a key is as long; what is, is noise."""


class Act(Enum):
    """What happens to a key."""

    PRESS = 1
    REPEAT = 2
    RELEASE = 3


@dataclass(frozen=True, slots=True)
class Key:
    """A key, by its name or its letter in lower case."""

    name: str
    act: Act = Act.PRESS
    ctrl: bool = False


class Keyboard:
    """Reads keys out of bytes, which may come in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def read(self, data: bytes) -> list[Key]:
        """The keys that are whole by now."""
        self._rest += data
        keys: list[Key] = []
        while self._rest:
            if self._rest[0] != 0x1B:
                keys += _plain(self._rest[0])
                self._rest = self._rest[1:]
                continue
            found = _SEQUENCE.match(self._rest)
            if found is None:
                if self._unfinished():
                    break
                self._rest = self._rest[1:]  # Escape by itself, or Alt before a key
                continue
            self._rest = self._rest[found.end() :]
            keys += _sequence(found)
        return keys

    def wait_no_longer(self) -> None:
        """Nothing follows: an Escape that was pressed by itself is not the start of a key."""
        if self._rest == b"\x1b":
            self._rest = b""

    def _unfinished(self) -> bool:
        if len(self._rest) > _LONGEST:
            return False
        return re.fullmatch(rb"\x1b(?:\[[0-9;:?<>=]*|O)?", self._rest) is not None


def _plain(byte: int) -> list[Key]:
    if byte in _NAMED:
        return [Key(_NAMED[byte])]
    if byte == 10:
        return [Key("enter")]
    if 1 <= byte <= 26:
        return [Key(chr(byte + 96), ctrl=True)]
    return [Key(chr(byte).lower())] if 32 < byte < 127 else []


def _sequence(found: re.Match[bytes]) -> list[Key]:
    parameters, final = (found[1] or b"").decode(), (found[2] or found[3]).decode()
    if final == "u" and parameters.startswith("?"):
        told = parameters[1:]
        # Only where releases are told of, too: the second bit.
        return [Key(SPEAKS)] if told.isdigit() and int(told) & 2 else []
    if final == "O" and not parameters:
        return [Key(AWAY)]
    fields = [field.split(":") for field in parameters.split(";")]
    modifiers = fields[1] if len(fields) > 1 else ["1"]
    shifts = _number(modifiers[0], 1) - 1
    act = {2: Act.REPEAT, 3: Act.RELEASE}.get(
        _number(modifiers[1], 1) if len(modifiers) > 1 else 1, Act.PRESS
    )
    if final in _ARROWS:
        return [Key(_ARROWS[final], act)]
    if final == "u":
        code = _number(fields[0][0], 0)
        name = _NAMED.get(code) or (chr(code).lower() if 32 < code < 127 else "")
        return [Key(name, act, ctrl=bool(shifts & 4))] if name else []
    return []


def _number(text: str, default: int) -> int:
    return int(text) if text.isdigit() else default
