"""How a checkpoint's worlds are driven: its own `generation_config.json` says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sora_engine.errors import RequestError
from sora_engine.request.actions import ActionSpace, action_space
from sora_engine.request.checks import integer, positive, shown
from sora_engine.request.steps import levels

_COUNTS = {"context": 1, "recall": 0, "num_inference_steps": 1, "first_steps": 1}
"""Of the values of `"session"` that are whole numbers the least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Driving:
    """What a session is, where its request is silent.

    context: latent frames just before the new one that the model sees. recall: at most so many
        earlier ones, that show what comes into view again.
    num_inference_steps: of each latent frame; first_steps: of the first, which a prompt makes.
    sigmas: the noise levels of those of each latent frame, where they do not fall evenly.
    fps: frames a second.
    world: rows and columns of a world that is a torus, in latents; None: a plane without an end.
    """

    actions: ActionSpace
    fps: float
    context: int = 4
    recall: int = 3
    num_inference_steps: int = 4
    first_steps: int = 16
    world: tuple[int, int] | None = None
    sigmas: tuple[float, ...] | None = None


def driving_of(settings: Mapping[str, Any], fps: float) -> Driving | None:
    """What the values `"actions"` and `"session"` say; None where a checkpoint takes no actions.

    fps: of the checkpoint's videos. Raises RequestError for values that cannot be.
    """
    if "actions" not in settings:
        if "session" in settings:
            raise RequestError("session is given without actions: both, or neither, would work")
        return None
    space = action_space(settings["actions"])
    own = settings.get("session", {})
    known = {*_COUNTS, "fps", "world", "sigmas"}
    if not isinstance(own, Mapping) or not set(own) <= known:
        raise RequestError(f"session must have {sorted(known)} alone, got {shown(own)}")
    counts = {}
    for name, least in _COUNTS.items():
        if name in own:
            counts[name] = integer(f"session's {name}", own[name], -1)
            if counts[name] < least:
                raise RequestError(f"session's {name} must be at least {least}, got {own[name]}")
    sigmas = None if own.get("sigmas") is None else levels("session's sigmas", own["sigmas"])
    if sigmas is not None:
        steps = counts.setdefault("num_inference_steps", len(sigmas))
        if steps != len(sigmas):
            raise RequestError(
                f"session's num_inference_steps is {steps} and there are {len(sigmas)} sigmas; "
                "leave one out"
            )
    return Driving(
        actions=space,
        sigmas=sigmas,
        fps=positive("session's fps", own.get("fps", fps)),
        world=_world(own.get("world")),
        **counts,
    )


def _world(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise RequestError(f"session's world must be rows and columns, or null, got {shown(value)}")
    rows, columns = (integer("session's world", side, 0) for side in value)
    if min(rows, columns) < 1:
        raise RequestError(f"session's world must be rows and columns over 0, got {shown(value)}")
    return rows, columns
