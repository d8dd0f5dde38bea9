"""The noise levels that a sample goes through, and the timestep the model is told at each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from sora_engine.errors import RequestError
from sora_engine.samplers.config import PredictionType, SamplerConfig, Space


@dataclass(frozen=True)
class Schedule:
    """Noise levels `sigmas [n + 1]` (the last one is where the sample ends) and `timesteps [n]`.

    space "flow": a level is `s` in `x = (1 - s) x0 + s eps`, from 1 down to 0.
    space "vp": a level is the ratio of noise to signal, `x = (x0 + s eps) / sqrt(1 + s^2)`.
    Timesteps are what the model is conditioned on: `1000 s` for flow Euler, whole numbers for the
    others. `start` is how many steps of the full schedule were left out at its beginning because
    the start is a video (`strength`). `targets [n]`, where given, are the levels at which the steps
    arrive, which in diffusers' DDIM need not be those at which the next steps set out.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    prediction_type: PredictionType
    space: Space
    start: int = 0
    targets: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1 or not self.timesteps:
            raise ValueError(
                f"{len(self.timesteps)} timesteps need one more level, not {len(self.sigmas)}"
            )

    @classmethod
    def from_arrays(
        cls, config: SamplerConfig, s: np.ndarray, timesteps: np.ndarray, final: float
    ) -> Schedule:
        """The levels `s [n]`, rounded to float32, and the one where the sample ends, `final`."""
        return cls(
            sigmas=tuple(float(v) for v in np.append(s, final).astype(np.float32)),
            timesteps=tuple(float(t) for t in timesteps),
            prediction_type=config.prediction_type,
            space=config.space,
        )

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.timesteps)

    @property
    def num_inference_steps(self) -> int:
        """The steps of the full schedule, with those that `strength` left out."""
        return self.start + len(self)

    def level(self, i: int) -> tuple[float, float]:
        """(alpha, sigma) of `x = alpha x0 + sigma eps` before step i; `i == n` is the end."""
        return levels(self.space, self.sigmas[i])

    def target(self, i: int) -> tuple[float, float]:
        """(alpha, sigma) at which step i arrives."""
        return levels(self.space, self.sigmas[i + 1] if self.targets is None else self.targets[i])

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, i: int = 0) -> torch.Tensor:
        """`x0` (any shape) brought to the level before step i with `noise` of the same shape."""
        alpha, sigma = self.level(i)
        return alpha * x0 + sigma * noise

    def go_back(self, x: torch.Tensor, noise: torch.Tensor, i: int) -> torch.Tensor:
        """A sample behind step i, noised back to the level before it (arXiv 2201.09865, eq. 9)."""
        (alpha, sigma), (alpha_after, sigma_after) = self.level(i), self.target(i)
        kept = alpha / alpha_after
        return kept * x + math.sqrt(max(sigma**2 - (kept * sigma_after) ** 2, 0.0)) * noise

    def from_strength(self, strength: float) -> Schedule:
        """The last `int(n * strength)` steps (SDEdit, arXiv 2108.01073; diffusers' video-to-video).

        Raises RequestError unless strength is in (0, 1] and leaves a step.
        """
        n = len(self)
        if not 0.0 < strength <= 1.0:
            raise RequestError(f"strength = {strength} must lie in (0, 1]")
        kept = min(int(n * strength), n)
        if kept == 0:
            raise RequestError(
                f"strength = {strength} of {n} steps leaves no step; the least that does is "
                f"{math.ceil(1e4 / n) / 1e4:g}"
            )
        first = n - kept
        return replace(
            self,
            sigmas=self.sigmas[first:],
            timesteps=self.timesteps[first:],
            targets=None if self.targets is None else self.targets[first:],
            start=self.start + first,
        )


def levels(space: Space, s: float) -> tuple[float, float]:
    """(alpha, sigma) with `x = alpha x0 + sigma eps` at the level `s` of a schedule, in float64."""
    if space == "flow":
        return 1.0 - s, s
    if s == math.inf:
        return 0.0, 1.0
    alpha = 1.0 / math.sqrt(1.0 + s * s)
    return alpha, s * alpha


def log_snr(level: tuple[float, float]) -> float:
    """lambda = log(alpha / sigma), half the log signal-to-noise ratio; inf where sigma is 0."""
    alpha, sigma = level
    if sigma == 0.0:
        return math.inf
    return math.log(alpha) - math.log(sigma)
