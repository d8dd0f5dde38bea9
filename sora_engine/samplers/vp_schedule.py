"""Each solver's schedule of variance-preserving levels, as a class of diffusers builds it.

The numbers are diffusers' to the last float32 bit where its class has them: the model was trained
on such timesteps, and the tests hold every schedule to it.
"""

from __future__ import annotations

import numpy as np
import torch

from sora_engine.errors import RequestError
from sora_engine.samplers.betas import alphas_cumprod, noise_ratios
from sora_engine.samplers.config import SamplerConfig
from sora_engine.samplers.schedule import Schedule
from sora_engine.samplers.spacing import spaced


def _spread_timesteps(spacing: str, last: int, train: int, n: int, offset: int) -> np.ndarray:
    """n of the timesteps 0..last-1, falling, for multistep solvers (which leave the lowest out)."""
    if spacing == "linspace":
        return np.linspace(0, last - 1, n + 1).round()[::-1][:-1].astype(np.int64)
    if spacing == "leading":
        return np.arange(n, 0, -1) * (last // (n + 1)) + offset
    return np.arange(last, 0, -train / n).round().astype(np.int64) - 1


def multistep_vp_schedule(config: SamplerConfig, n: int) -> Schedule:
    """UniPC and DPM-Solver++ on variance-preserving levels."""
    ratios = noise_ratios(config)
    train = config.num_train_timesteps
    logs = np.log(ratios)
    if config.sigma_spacing is None:
        last = train
        if config.solver != "unipc":
            products = alphas_cumprod(config)
            snr = torch.log(torch.sqrt(products)) - torch.log(torch.sqrt(1 - products))
            floor = torch.tensor(config.lambda_min_clipped, dtype=torch.float32)
            last = train - int(torch.searchsorted(snr.flip(0), floor))
        timesteps = _spread_timesteps(config.timestep_spacing, last, train, n, config.steps_offset)
        if timesteps.min() < 0 or timesteps.max() >= train:
            raise RequestError(
                f"num_inference_steps = {n} asks for timesteps {timesteps.max()} to "
                f"{timesteps.min()}, outside of the {train} trained ones; take another number"
            )
        s = np.interp(timesteps, np.arange(len(ratios)), ratios)
    else:
        if config.sigma_spacing == "lu":
            # arXiv 2206.00927: even steps in the log signal-to-noise ratio.
            s = np.exp(np.linspace(0, 1, n) * (logs[0] - logs[-1]) + logs[-1])
        else:
            s = spaced(config, ratios[-1].item(), ratios[0].item(), n)
        timesteps = np.array([_timestep_of(v, logs) for v in s])
        # The reference classes round some of these before they cut them to whole numbers.
        cosine = config.beta_schedule == "squaredcos_cap_v2"
        if config.sigma_spacing != "exponential" and (config.solver == "unipc" or not cosine):
            timesteps = timesteps.round()
        timesteps = timesteps.astype(np.int64)
    final = 0.0
    if config.final_sigmas_type == "sigma_min":
        unipc_spaced = config.solver == "unipc" and config.sigma_spacing is not None
        final = float(s[-1]) if unipc_spaced else float(ratios[0])
    return Schedule.from_arrays(config, s, timesteps, final)


def _timestep_of(s: float, logs: np.ndarray) -> float:
    """The training timestep at the noise-to-signal ratio `s`, interpolated in its logarithm."""
    log = np.log(np.maximum(s, 1e-10))
    low = int(np.clip(np.searchsorted(logs, log, side="right") - 1, 0, len(logs) - 2))
    weight = np.clip((logs[low] - log) / (logs[low] - logs[low + 1]), 0, 1)
    return float((1 - weight) * low + weight * (low + 1))


def discrete_vp_schedule(config: SamplerConfig, n: int) -> Schedule:
    """DDIM and DDPM: training timesteps, each with the level it was trained at."""
    train = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        timesteps = np.linspace(0, train - 1, n).round()[::-1].astype(np.int64)
    elif config.timestep_spacing == "leading":
        timesteps = np.arange(n - 1, -1, -1) * (train // n) + config.steps_offset
    else:
        timesteps = np.round(np.arange(train, 0, -train / n)).astype(np.int64) - 1
    if timesteps.min() < 0 or timesteps.max() >= train:
        raise RequestError(
            f"num_inference_steps = {n} asks for timesteps {timesteps.max()} to "
            f"{timesteps.min()}, outside of the {train} trained ones; take another number"
        )
    products = alphas_cumprod(config).double().numpy()
    with np.errstate(divide="ignore"):
        ratios = np.sqrt((1 - products) / products)
    final = 0.0 if config.set_alpha_to_one or config.solver != "ddim" else float(ratios[0])
    s = tuple(float(ratios[t]) for t in timesteps)
    targets = None
    if config.fixed_stride and config.solver == "ddim":
        previous = timesteps - train // n
        targets = tuple(float(ratios[t]) if t >= 0 else final for t in previous)
        if targets[:-1] == s[1:] and targets[-1] == final:
            targets = None
    return Schedule(
        sigmas=(*s, final),
        timesteps=tuple(float(t) for t in timesteps),
        prediction_type=config.prediction_type,
        space="vp",
        targets=targets,
    )
