"""Noise levels spaced by a formula between two ends, in place of a solver's own spacing."""

from __future__ import annotations

import math

import numpy as np

from sora_engine.samplers.config import SamplerConfig


def spaced(config: SamplerConfig, first: float, last: float, n: int) -> np.ndarray:
    """n levels from `first` down to `last`, spaced as Karras et al. (arXiv 2206.00364, eq. 5) or
    evenly in their logarithm."""
    first = config.sigma_max if config.sigma_max is not None else first
    last = config.sigma_min if config.sigma_min is not None else last
    ramp = np.linspace(0, 1, n)
    if config.sigma_spacing == "karras":
        rho = 7.0
        high, low = first ** (1 / rho), last ** (1 / rho)
        return (high + ramp * (low - high)) ** rho
    return np.exp(np.linspace(math.log(first), math.log(last), n))
