"""The noise of each training step of a variance-preserving model, from its beta schedule."""

from __future__ import annotations

import math

import numpy as np
import torch

from sora_engine.samplers.config import SamplerConfig


def alphas_cumprod(config: SamplerConfig) -> torch.Tensor:
    """The squared signal level after each training step, float32 [num_train_timesteps]."""
    n = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
    elif config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, n, dtype=torch.float32)
    elif config.beta_schedule == "scaled_linear":
        ends = config.beta_start**0.5, config.beta_end**0.5
        betas = torch.linspace(*ends, n, dtype=torch.float32) ** 2
    else:  # squaredcos_cap_v2: Nichol and Dhariwal, arXiv 2102.09672, eq. 17

        def signal(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = torch.tensor(
            [min(1 - signal((i + 1) / n) / signal(i / n), 0.999) for i in range(n)],
            dtype=torch.float32,
        )
    if config.rescale_betas_zero_snr:
        betas = _without_terminal_signal(betas)
    products = torch.cumprod(1.0 - betas, dim=0)
    if config.rescale_betas_zero_snr and config.solver in ("unipc", "dpm++", "dpm++sde"):
        products[-1] = 2**-24  # these solvers need a finite first level
    return products


def _without_terminal_signal(betas: torch.Tensor) -> torch.Tensor:
    """Betas moved so that the last step leaves no signal (Lin et al., arXiv 2305.08891, alg. 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    products = root**2
    return 1 - torch.cat([products[:1], products[1:] / products[:-1]])


def noise_ratios(config: SamplerConfig) -> np.ndarray:
    """sqrt((1 - a) / a), noise to signal after each training step, float32, rising."""
    products = alphas_cumprod(config)
    return np.array(((1 - products) / products) ** 0.5)
