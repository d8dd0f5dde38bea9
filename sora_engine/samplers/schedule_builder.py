"""The schedule that a request asks for, its arguments checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sora_engine.errors import RequestError
from sora_engine.samplers.config import SamplerConfig
from sora_engine.samplers.flow_schedule import (
    dpm_flow_schedule,
    euler_schedule,
    unipc_flow_schedule,
)
from sora_engine.samplers.schedule import Schedule
from sora_engine.samplers.vp_schedule import discrete_vp_schedule, multistep_vp_schedule


def build_schedule(
    config: SamplerConfig,
    *,
    num_inference_steps: int | None = None,
    shift: float | None = None,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float | None = None,
) -> Schedule:
    """The schedule of `config.solver` for a request.

    num_inference_steps: how many steps; may be left out when `sigmas` are given.
    shift: overrides the checkpoint's; `s' = shift s / (1 + (shift - 1) s)`. `mu` is the same as
        diffusers' dynamic shifting writes it (exp(mu) is the shift when it is exponential).
    sigmas: the flow levels to set out from, falling, the final 0 left out. As in diffusers they go
        through the shift; `shift=1` takes them as they are.
    strength: start part-way, see `Schedule.from_strength`.
    Raises RequestError that names the value.
    """
    given = None if sigmas is None else _checked_sigmas(config, sigmas, num_inference_steps)
    n = num_inference_steps if given is None else len(given)
    if n is None or isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise RequestError(f"num_inference_steps = {n!r} must be a whole number of 1 or more")
    if config.space == "vp":
        if shift is not None or mu is not None:
            raise RequestError(
                f"shift = {mu if shift is None else shift!r}: this checkpoint's levels are "
                "variance preserving and have no shift; leave it out"
            )
        if n > config.num_train_timesteps:
            raise RequestError(
                f"num_inference_steps = {n} is more than the {config.num_train_timesteps} steps "
                "that the checkpoint was trained with"
            )
        if config.solver in ("unipc", "dpm++", "dpm++sde"):
            schedule = multistep_vp_schedule(config, n)
        else:
            schedule = discrete_vp_schedule(config, n)
    else:
        resolved = _resolved_shift(config, shift, mu)
        if config.shift_terminal is not None and n == 1:
            raise RequestError(
                "num_inference_steps = 1 cannot both start at level 1 and be stretched to end at "
                f"the checkpoint's shift_terminal {config.shift_terminal}; take 2 or more"
            )
        if config.solver == "unipc":
            schedule = unipc_flow_schedule(config, n, resolved, given)
        elif config.solver.startswith("dpm++"):
            schedule = dpm_flow_schedule(config, n, resolved, given)
        else:
            schedule = euler_schedule(config, n, resolved, given)
    _check_falling(schedule, config, shift)
    return schedule if strength is None else schedule.from_strength(strength)


def _checked_sigmas(
    config: SamplerConfig, sigmas: Sequence[float], num_inference_steps: int | None
) -> np.ndarray:
    given = [float(s) for s in sigmas]
    if config.space == "vp":
        raise RequestError(
            f"sigmas = {given}: this checkpoint's levels are variance preserving; explicit levels "
            "are for flow checkpoints"
        )
    if not given:
        raise RequestError("sigmas = [] gives no step; list at least one level in (0, 1]")
    if num_inference_steps is not None and num_inference_steps != len(given):
        raise RequestError(
            f"num_inference_steps = {num_inference_steps} and {len(given)} sigmas disagree; "
            "leave one out"
        )
    if given[-1] == 0.0:
        raise RequestError(f"sigmas = {given}: leave out the final 0, it is always added")
    falls = all(a > b for a, b in pairwise(given))
    if not falls or not all(0.0 < s <= 1.0 for s in given):
        raise RequestError(f"sigmas = {given} must fall and lie in (0, 1]")
    return np.array(given)


def _resolved_shift(config: SamplerConfig, shift: float | None, mu: float | None) -> float:
    if shift is not None and mu is not None:
        raise RequestError(f"shift = {shift} and mu = {mu} say the same thing; leave one out")
    if mu is not None:
        if not config.use_dynamic_shifting:
            raise RequestError(f"mu = {mu}: the checkpoint shifts by a constant; pass shift")
        shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    if shift is None:
        if config.use_dynamic_shifting:
            raise RequestError(
                "the checkpoint's shift depends on the video's length; pass mu or shift"
            )
        shift = config.shift
    if not (math.isfinite(shift) and shift > 0.0):
        raise RequestError(f"shift = {shift} must be a number above 0")
    return float(shift)


def _check_falling(schedule: Schedule, config: SamplerConfig, shift: float | None) -> None:
    """Steps of no length divide by zero in multistep solvers; only the last may have none."""
    s = schedule.sigmas
    for i in range(len(schedule)):
        last = i == len(schedule) - 1
        finite = not math.isnan(s[i]) and math.isfinite(s[i + 1])
        if finite and (s[i + 1] < s[i] or (s[i + 1] == s[i] and last)):
            continue
        what = f"the level does not fall in step {i} ({s[i]:g} to {s[i + 1]:g})"
        if shift is not None:
            raise RequestError(
                f"shift = {shift:g} and {len(schedule)} steps: {what}; a shift nearer to 1, or "
                "fewer steps, would work"
            )
        raise RequestError(
            f"num_inference_steps = {len(schedule)}: {what}; take fewer steps (the checkpoint's "
            f"timestep_spacing is {config.timestep_spacing})"
        )
