"""A checkpoint's own defaults, from its `generation_config.json`, over those of its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sora_engine.errors import CheckpointError, RequestError
from sora_engine.io.config_file import read_json_object
from sora_engine.models.family import Checkpoint
from sora_engine.request import GenerationDefaults, KnownMode
from sora_engine.request.checks import finite, integer, positive, shown
from sora_engine.request.driving import Driving, driving_of
from sora_engine.request.ladders import ladder_named
from sora_engine.request.windows import SCHEDULES, default_plan
from sora_engine.samplers import SOLVERS

GENERATION_CONFIG = "generation_config.json"
_DRIVING = ("actions", "session")
"""Of a checkpoint that takes actions: see `request.driving`."""


def read_generation_config(folder: Path) -> Mapping[str, Any]:
    """The defaults that a checkpoint brings in `generation_config.json`; empty where it has none.

    Raises CheckpointError for keys, solvers and window schedules that this engine does not know,
    and for a number of text tokens that is none.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    settings = read_json_object(path)
    known = {f.name for f in fields(GenerationDefaults)} | {"text_tokens", *_DRIVING}
    strange = sorted(key for key in settings if key not in known and not key.startswith("_"))
    if strange:
        raise CheckpointError(f"unknown keys {strange}; known are {sorted(known)}", path=path)
    if settings.get("solver") not in (None, *SOLVERS):
        raise CheckpointError(
            f"solver must be one of {list(SOLVERS)}, got {settings['solver']!r}", path=path
        )
    if settings.get("window_schedule", SCHEDULES[0]) not in SCHEDULES:
        raise CheckpointError(
            f"window_schedule must be one of {list(SCHEDULES)}, got "
            f"{settings['window_schedule']!r}",
            path=path,
        )
    if "text_tokens" in settings:
        tokens = settings["text_tokens"]
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise CheckpointError(
                f"text_tokens must be an integer of at least 1, got {shown(tokens)}", path=path
            )
    return {key: value for key, value in settings.items() if not key.startswith("_")}


def with_own_defaults(found: Checkpoint, settings: Mapping[str, Any], folder: Path) -> Checkpoint:
    """A checkpoint with its own defaults over those of its family's published pipelines.

    settings: of `read_generation_config(folder)`. Raises CheckpointError for values of the wrong
    type, and for windows that cannot be or that the model is not made for.
    """
    known = {f.name for f in fields(GenerationDefaults)}
    own = {key: value for key, value in settings.items() if key in known}
    try:
        _check_values(own)
        defaults = on_ladder(replace(found.defaults, **own), own)
        default_plan(defaults, defaults.window_schedule)  # what long videos will be made in
        driving = _driving(found, settings, defaults.fps)
    except (TypeError, ValueError) as error:
        raise CheckpointError(str(error), path=folder / GENERATION_CONFIG) from error
    if defaults.window_schedule == "chained" and found.known_mode is not KnownMode.NOISE_LEVEL:
        raise CheckpointError(
            "window_schedule 'chained' takes a model that is told of known frames by their noise "
            "level (expand_timesteps in model_index.json); 'static' or 'moving' would work",
            path=folder / GENERATION_CONFIG,
        )
    return replace(found, defaults=defaults, driving=driving)


def on_ladder(
    defaults: GenerationDefaults, own: Mapping[str, Any] = MappingProxyType({})
) -> GenerationDefaults:
    """Defaults whose steps and guidance are those of their ladder, if they have one, where `own`
    says nothing else. RequestError for a ladder that is not known, and for steps that it lacks."""
    if defaults.ladder is None:
        return defaults
    steps = len(ladder_named(defaults.ladder).sigmas)
    if own.get("num_inference_steps", steps) != steps:
        raise RequestError(
            f"num_inference_steps is {own['num_inference_steps']}, ladder {defaults.ladder!r} has "
            f"{steps}"
        )
    scale = own.get("guidance_scale", 1.0)
    return replace(defaults, num_inference_steps=steps, guidance_scale=scale)


def _driving(found: Checkpoint, settings: Mapping[str, Any], fps: float) -> Driving | None:
    """How its worlds are driven. RequestError for values that cannot be, and for actions that its
    transformer does not read."""
    driving = driving_of(settings, fps)
    if driving is not None and driving.actions.width != (found.shape.action_dim or 0):
        raise RequestError(
            f"actions has {driving.actions.width} buttons and axes, and the transformer reads "
            f"{found.shape.action_dim or 0} numbers (its action_dim)"
        )
    return driving


def _check_values(own: Mapping[str, Any]) -> None:
    """RequestError for what no request could be made with."""
    for name in ("height", "width", "num_frames", "num_inference_steps"):
        if name in own and (own[name] is None or integer(name, own[name], 0) < 1):
            raise RequestError(f"{name} must be an integer of at least 1, got {shown(own[name])}")
    for name in ("max_window", "window_overlap", "window_anchors"):
        integer(name, own.get(name), 0)  # what they may be together, their plan says
    if "fps" in own:
        positive("fps", own["fps"])
    for name in ("guidance_scale", "guidance_scale_2"):
        if name in own and not (own[name] is None and name == "guidance_scale_2"):
            finite(name, own[name], None)
    if not isinstance(own.get("negative_prompt", ""), str):
        raise RequestError(f"negative_prompt must be a string, got {shown(own['negative_prompt'])}")
    if not isinstance(own.get("example_prompt"), str | None):
        raise RequestError(f"example_prompt must be a string, got {shown(own['example_prompt'])}")
