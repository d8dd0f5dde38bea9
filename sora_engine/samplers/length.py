"""What pipelines decide before a scheduler is asked: the shift for a length, and the levels.

Schedulers of rectified flows take both as arguments. diffusers' pipelines of a family compute them
alike, so they are a part of what a checkpoint is.
"""

from __future__ import annotations

import numpy as np

from sora_engine.samplers.config import SamplerConfig, Spread

_THRESHOLD = 0.025
"""The noise that the linear half of the linear-quadratic levels takes off (arXiv 2410.13720)."""


def mu_of_length(config: SamplerConfig, tokens: int) -> float | None:
    """The `mu` of a video of so many tokens: a straight line through two lengths that the
    checkpoint names. None where its shift is the same for all lengths."""
    if not config.use_dynamic_shifting or config.shift_of_length is None:
        return None
    base_shift, max_shift, base_tokens, max_tokens = config.shift_of_length
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return tokens * slope + base_shift - slope * base_tokens


def spread_levels(spread: Spread, steps: int) -> tuple[float, ...]:
    """The levels that a schedule of so many steps sets out from, before the shift.

    `"even"`: evenly from 1 to 1 / steps. `"linear-quadratic"`: the first half of the steps takes
    off little noise, and the second rises as a parabola does (Movie Gen, arXiv 2410.13720).
    """
    if spread == "even":
        return tuple(float(level) for level in np.linspace(1.0, 1.0 / steps, steps))
    if steps < 2:
        return (1.0,)
    first = steps // 2
    rest = steps - first
    difference = first - _THRESHOLD * steps
    square = difference / (first * rest**2)
    linear = _THRESHOLD / first - 2 * difference / rest**2
    clean = [i * _THRESHOLD / first for i in range(first)]
    clean += [square * i**2 + linear * i + square * first**2 for i in range(first, steps)]
    return tuple(1.0 - taken for taken in clean)
