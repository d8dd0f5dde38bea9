"""First-order steps in flow levels: Euler along the flow, and fresh noise at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sora_engine.samplers.prediction import to_velocity, to_x0
from sora_engine.samplers.solver import Solver, SolverState, combine


@dataclass(frozen=True)
class EulerSolver(Solver):
    """`x' = x + (s' - s) v` (diffusers' FlowMatchEulerDiscreteScheduler)."""

    def _step(
        self,
        state: SolverState,
        i: int,
        sample: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, SolverState]:
        alpha, sigma = self.schedule.level(i)
        velocity = to_velocity(self.schedule.prediction_type, sample, prediction, alpha, sigma)
        _, target = self.schedule.target(i)
        return sample + (target - sigma) * velocity, SolverState(step=i + 1)


@dataclass(frozen=True)
class RenoiseSolver(Solver):
    """`x' = alpha' x0 + sigma' noise`: the model's x0, noised afresh to the next level.

    The sampler of few-step checkpoints distilled by distribution matching or consistency (DMD2,
    arXiv 2405.14867, section 4.4); FlowMatchEulerDiscreteScheduler with stochastic_sampling.
    """

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
        alpha, sigma = self.schedule.level(i)
        x0 = to_x0(self.schedule.prediction_type, sample, prediction, alpha, sigma)
        alpha, sigma = self.schedule.target(i)
        return combine((alpha, x0), (sigma, noise)), SolverState(step=i + 1)
