"""Each solver's schedule of flow levels, as a class of diffusers builds it.

The numbers are diffusers' to the last float32 bit where its class has them: the model was trained
on such timesteps, and the tests hold every schedule to it.
"""

from __future__ import annotations

import numpy as np
import torch

from sora_engine.errors import RequestError
from sora_engine.samplers.betas import noise_ratios
from sora_engine.samplers.config import SamplerConfig
from sora_engine.samplers.schedule import Schedule
from sora_engine.samplers.spacing import spaced

_NUDGE = 1e-6  # how far below 1 a flow level must stay for its log signal-to-noise to be finite


def euler_schedule(
    config: SamplerConfig, n: int, shift: float, given: np.ndarray | None
) -> Schedule:
    """FlowMatchEulerDiscreteScheduler: timesteps are the float levels times 1000."""
    train = config.num_train_timesteps
    s: np.ndarray
    if given is not None:
        s = given.astype(np.float32)
    else:
        # The ends of the training schedule, which is itself shifted, in float32; so the shift acts
        # twice on the lower end, as it does in the reference.
        ends = torch.tensor([train, 1], dtype=torch.float32) / train
        if not config.use_dynamic_shifting:
            ends = shift * ends / (1 + (shift - 1) * ends)
        s = np.linspace(ends[0].item() * train, ends[1].item() * train, n) / train
    s = _stretched(_shifted(s, shift), config.shift_terminal)
    if config.sigma_spacing is not None:
        s = spaced(config, float(s[0]), float(s[-1]), n)
    s = s.astype(np.float32)
    return Schedule.from_arrays(config, s, s * np.float32(train), 0.0)


def unipc_flow_schedule(
    config: SamplerConfig, n: int, shift: float, given: np.ndarray | None
) -> Schedule:
    """UniPCMultistepScheduler with flow sigmas: timesteps are cut to whole numbers, so that two
    neighbouring steps can share one."""
    train = config.num_train_timesteps
    if config.sigma_spacing == "karras":
        if given is not None:
            raise RequestError(f"sigmas = {given.tolist()}: the checkpoint spaces its own levels")
        ratios = noise_ratios(config)
        s = spaced(config, float(ratios[-1]), float(ratios[0]), n)
        s = s / (s + 1)
    else:
        s = np.linspace(1, 1 / train, n + 1)[:-1] if given is None else given
        s = _stretched(_shifted(s, shift), config.shift_terminal)
        s = _below_one(s)
    final = s[-1] if config.final_sigmas_type == "sigma_min" else 0.0
    return Schedule.from_arrays(config, s, (s * train).astype(np.int64), final)


def dpm_flow_schedule(
    config: SamplerConfig, n: int, shift: float, given: np.ndarray | None
) -> Schedule:
    """DPMSolverMultistepScheduler with flow sigmas: starts a training step below 1."""
    train = config.num_train_timesteps
    if given is not None:
        s = _below_one(_shifted(given, shift))
    else:
        clean = np.linspace(1, 1 / train, n + 1)
        s = _shifted(1.0 - clean, shift)[::-1][:-1]
    final = noise_ratios(config)[0] if config.final_sigmas_type == "sigma_min" else 0.0
    return Schedule.from_arrays(config, s, (s * train).astype(np.int64), float(final))


def _below_one(s: np.ndarray) -> np.ndarray:
    if abs(s[0] - 1) < _NUDGE:
        s = s.copy()
        s[0] -= _NUDGE
    return s


def _shifted(s: np.ndarray, shift: float) -> np.ndarray:
    return shift * s / (1 + (shift - 1) * s)


def _stretched(s: np.ndarray, terminal: float | None) -> np.ndarray:
    """Levels stretched about 1 so that the last is `terminal` (LTX-Video)."""
    if terminal is None:
        return s
    clean = 1 - s
    return 1 - clean * (1 - terminal) / clean[-1]
