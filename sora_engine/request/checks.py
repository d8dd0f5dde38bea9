"""What a value must be: each check returns it, or raises a RequestError that names it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

from sora_engine.errors import RequestError

MOST_SHOWN = 100
"""Characters of a value in an error."""


def integer(name: str, value: object, default: int) -> int:
    """An integer of any kind but bool; None stands for `default`."""
    if value is None:
        return default
    try:
        if _is_bool(value):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"{name} must be an integer, got {shown(value)}") from None


def finite(name: str, value: object, default: float | None) -> float:
    """A number of any kind but bool; None stands for `default`."""
    value = default if value is None else value
    try:
        # float() takes texts and bytes too.
        if _is_bool(value) or isinstance(value, (str, bytes, bytearray)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several
        raise RequestError(f"{name} must be a number, got {shown(value)}") from None
    if not math.isfinite(number):
        raise RequestError(f"{name} must be finite, got {number}")
    return number


def positive(name: str, value: object) -> float:
    """A number over 0."""
    number = finite(name, value, None)
    if number <= 0:
        raise RequestError(f"{name} must be over 0, got {number}")
    return number


def flag(name: str, value: object) -> bool:
    """True or False, as such or as 1 or 0; None stands for False. A text such as "no" is none: it
    would count as True."""
    plain = value is None or (isinstance(value, int) and value in (0, 1))
    if not plain and not _is_bool(value):
        raise RequestError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def several(name: str, values: object, each: str) -> tuple[Any, ...]:
    """The members of a list or a tuple, which one value alone is not."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise RequestError(f"{name} must be a list of {each}, got {type(values).__name__}")
    return tuple(values)


def shown(value: object) -> str:
    """A value as an error names it: in one line, and no longer than is read."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def _is_bool(value: object) -> bool:
    """Whether it is a bool of Python's, NumPy's or torch's."""
    array = str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    return isinstance(value, bool) or (array and getattr(value, "ndim", 1) == 0)
