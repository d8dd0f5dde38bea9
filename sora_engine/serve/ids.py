"""Ids of jobs: they name their home and their moment, so that who routes or lists them needs no
memory.

    video_<replica>_<moment><random>

replica: of the server whose job it is. moment: ten digits of base 36, microseconds since 1970.
random: sixteen more, 82 bits, as an id is not to be guessed.
"""

from __future__ import annotations

import re
import secrets
import string

_DIGITS = string.digits + string.ascii_lowercase
_MOMENT, _RANDOM = 10, 16
_ID = re.compile(rf"video_([a-z0-9]{{1,16}})_([a-z0-9]{{{_MOMENT}}})[a-z0-9]{{{_RANDOM}}}")


def moment(seconds: float) -> float:
    """A time as an id can hold it: in whole microseconds."""
    return round(seconds * 1e6) / 1e6


def new_id(replica: str, created: float) -> str:
    """An id for a job that was created then (seconds since 1970)."""
    left, digits = round(created * 1e6), ""
    for _ in range(_MOMENT):
        left, digit = divmod(left, 36)
        digits = _DIGITS[digit] + digits
    random = "".join(secrets.choice(_DIGITS) for _ in range(_RANDOM))
    return f"video_{replica}_{digits}{random}"


def read_id(name: str) -> tuple[str, float] | None:
    """The replica and the moment of an id; None for what is no id."""
    match = _ID.fullmatch(name)
    return None if match is None else (match[1], int(match[2], 36) / 1e6)
