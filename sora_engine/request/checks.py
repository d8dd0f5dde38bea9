"""What a value must be: each check returns it, or raises a RequestError that names it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

from sora_engine.errors import RequestError


def integer(name: str, value: object, default: int) -> int:
    """An integer of any kind but bool; None stands for `default`."""
    if value is None:
        return default
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"{name} must be an integer, got {value!r}") from None


def finite(name: str, value: object, default: float | None) -> float:
    """A number of any kind but bool; None stands for `default`."""
    value = default if value is None else value
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise RequestError(f"{name} must be finite, got {number}")
    return number


def positive(name: str, value: object) -> float:
    """A number over 0."""
    number = finite(name, value, None)
    if number <= 0:
        raise RequestError(f"{name} must be over 0, got {number}")
    return number


def several(name: str, values: object, each: str) -> tuple[Any, ...]:
    """The members of a list or a tuple, which one value alone is not."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise RequestError(f"{name} must be a list of {each}, got {type(values).__name__}")
    return tuple(values)
