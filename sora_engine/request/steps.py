"""How many steps a request takes, and at which noise levels."""

from __future__ import annotations

import itertools

from sora_engine.config import Limits
from sora_engine.errors import RequestError
from sora_engine.request.checks import finite, integer, several
from sora_engine.request.facts import GenerationDefaults
from sora_engine.request.request import VideoRequest


def steps_taken(steps: int, strength: float | None) -> int:
    """Of so many steps, those that a start video of this strength leaves."""
    return steps if strength is None else min(int(steps * strength), steps)


def resolve_steps(
    request: VideoRequest, defaults: GenerationDefaults, limits: Limits
) -> tuple[tuple[float, ...] | None, int]:
    """The noise levels that a caller chose, if any, and the number of steps."""
    steps = integer(
        "num_inference_steps", request.num_inference_steps, defaults.num_inference_steps
    )
    if not 1 <= steps <= limits.max_inference_steps:
        raise RequestError(
            f"num_inference_steps must be from 1 to {limits.max_inference_steps}, got {steps}"
        )
    if request.sigmas is None:
        return None, steps
    sigmas = levels("sigmas", request.sigmas)
    if len(sigmas) > limits.max_inference_steps:
        raise RequestError(
            f"sigmas has {len(sigmas)} noise levels; at most {limits.max_inference_steps}"
        )
    if request.num_inference_steps is not None and steps != len(sigmas):
        raise RequestError(
            f"num_inference_steps = {steps} and {len(sigmas)} sigmas disagree; leave one out"
        )
    return sigmas, len(sigmas)


def levels(name: str, values: object) -> tuple[float, ...]:
    """Noise levels that fall within (0, 1]. Raises RequestError."""
    sigmas = tuple(finite(name, s, None) for s in several(name, values, "noise levels"))
    falling = all(a > b for a, b in itertools.pairwise(sigmas))
    if not sigmas or not falling or not all(0 < s <= 1 for s in sigmas):
        raise RequestError(f"{name} must fall strictly, within (0, 1], got {list(sigmas)}")
    return sigmas
