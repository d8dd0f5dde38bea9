"""What `Limits` bound of a request's size and texts."""

from __future__ import annotations

import math

from sora_engine.config import Limits
from sora_engine.errors import RequestError
from sora_engine.request.facts import LatentGrid, nearest_on_grid


def check_text(name: str, text: object, limits: Limits) -> None:
    """That it is a text, and not too long. Raises RequestError."""
    if not isinstance(text, str):
        raise RequestError(f"{name} must be a string, got {type(text).__name__}")
    if len(text) > limits.max_prompt_chars:
        raise RequestError(f"{name} has {len(text)} characters; at most {limits.max_prompt_chars}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Half a UTF-16 pair, or a byte of a command line that is no UTF-8: no text encoder has it.
        raise RequestError(
            f"{name} is no text: character {error.start} is the lone surrogate "
            f"{text[error.start]!a}; texts in UTF-8 would work"
        ) from None


def check_canvas(
    height: int, width: int, num_frames: int, grid: LatentGrid, limits: Limits, *, loop: bool
) -> None:
    """That a canvas is not too large: limits count what is made. Raises RequestError."""
    if height * width > limits.max_pixels:
        raise RequestError(
            f"{width}x{height} is {height * width} pixels; at most {limits.max_pixels}, so "
            f"{_size_within(limits.max_pixels, height, width, grid)} would work"
        )
    if num_frames > limits.max_frames:
        time = math.lcm(grid.time, 4)
        longest, _ = nearest_on_grid(limits.max_frames, time, 0 if loop else 1)
        raise RequestError(
            f"num_frames is {num_frames}; at most {limits.max_frames}, so {longest} would work"
        )


def _size_within(max_pixels: int, height: int, width: int, grid: LatentGrid) -> str:
    """About the largest WIDTHxHEIGHT of this shape that the model and the limit allow.

    Of the coarsest grid of all models, for checks that are made before the model is known.
    """
    rows, columns = (math.lcm(multiple, 32) for multiple in grid.multiple)
    shorter = math.isqrt(max_pixels * height // width)
    height = max(rows, shorter // rows * rows)
    return f"{max(columns, max_pixels // height // columns * columns)}x{height}"
