"""DDIM and DDPM, written in (alpha, sigma) so that they serve flow levels as well."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sora_engine.samplers.prediction import to_epsilon, to_x0
from sora_engine.samplers.solver import Solver, SolverState, combine


def _clipped(x0: torch.Tensor, limit: float | None) -> torch.Tensor:
    return x0 if limit is None else x0.clamp(-limit, limit)


def _forward_variance(level: tuple[float, float], target: tuple[float, float]) -> float:
    """The variance of x at `level` given x at the less noisy `target`."""
    (alpha, sigma), (alpha_t, sigma_t) = level, target
    return sigma**2 - (alpha / alpha_t * sigma_t) ** 2


@dataclass(frozen=True)
class DDIMSolver(Solver):
    """`x' = alpha' x0 + sqrt(sigma'^2 - d^2) eps + d noise` (arXiv 2010.02502, eq. 12).

    eta: 0 is deterministic; 1 gives d the standard deviation of DDPM. clip: the range that x0 is
    kept in (the noise is not derived again from the clipped x0).
    """

    eta: float = 0.0
    clip: float | None = None

    @property
    def stochastic(self) -> bool:
        return self.eta > 0.0

    def _step(
        self,
        state: SolverState,
        i: int,
        sample: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, SolverState]:
        kind, level, target = (
            self.schedule.prediction_type,
            self.schedule.level(i),
            self.schedule.target(i),
        )
        x0 = _clipped(to_x0(kind, sample, prediction, *level), self.clip)
        eps = to_epsilon(kind, sample, prediction, *level)
        variance = _forward_variance(level, target) * (target[1] / level[1]) ** 2
        fresh = self.eta * math.sqrt(max(variance, 0.0))
        terms = [(target[0], x0), (math.sqrt(max(target[1] ** 2 - fresh**2, 0.0)), eps)]
        if self.stochastic:
            assert noise is not None
            terms.append((fresh, noise))
        return combine(*terms), SolverState(step=i + 1)


@dataclass(frozen=True)
class DDPMSolver(Solver):
    """A draw from the reverse process (Ho et al., arXiv 2006.11239, algorithm 2 and eq. 7).

    variance: "fixed_small" is that of the posterior, "fixed_large" that of the forward step. The
    step that sets out from timestep 0, or that ends a flow, adds no noise.
    """

    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"
    clip: float | None = None

    @property
    def stochastic(self) -> bool:
        return True

    def _step(
        self,
        state: SolverState,
        i: int,
        sample: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, SolverState]:
        assert noise is not None
        schedule = self.schedule
        level, target = schedule.level(i), schedule.target(i)
        x0 = _clipped(to_x0(schedule.prediction_type, sample, prediction, *level), self.clip)
        forward = _forward_variance(level, target)
        left = (target[1] / level[1]) ** 2
        variance = forward * left if self.variance == "fixed_small" else forward
        last = i == len(schedule) - 1
        if schedule.timesteps[i] == 0.0 or (last and schedule.space == "flow"):
            variance = 0.0
        moved = combine(
            (target[0] * forward / level[1] ** 2, x0),
            (level[0] / target[0] * left, sample),
            (math.sqrt(max(variance, 0.0)), noise),
        )
        return moved, SolverState(step=i + 1)
