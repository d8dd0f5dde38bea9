"""DPM-Solver++ in its multistep form, as an ODE or an SDE (Lu et al., arXiv 2211.01095)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from sora_engine.samplers.prediction import to_x0
from sora_engine.samplers.schedule import log_snr
from sora_engine.samplers.solver import Solver, SolverState, combine

_FEW_STEPS = 15  # under this many, lower orders at the end keep the solver stable (the authors')


@dataclass(frozen=True)
class DPMSolver(Solver):
    """Multistep DPM-Solver++ in the data prediction, of order 1 to 3 (the SDE to 2); "2M" is 2.

    variant: how the slope is weighed at order 2, "midpoint" or "heun". sde: the reverse SDE, with
    fresh noise at each step. lower_order_final, euler_at_final: as in diffusers; a last step to
    level 0 is always of first order.
    """

    order: int = 2
    variant: Literal["midpoint", "heun"] = "midpoint"
    sde: bool = False
    lower_order_final: bool = True
    euler_at_final: bool = False

    @property
    def stochastic(self) -> bool:
        return self.sde

    def _step(
        self,
        state: SolverState,
        i: int,
        sample: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, SolverState]:
        schedule = self.schedule
        x0 = to_x0(schedule.prediction_type, sample, prediction, *schedule.level(i))
        history = (*state.history, x0)[-self.order :]
        order = self._order_at(i, len(history))
        (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.level(i), schedule.target(i)
        here = log_snr((alpha_s, sigma_s))
        h = log_snr((alpha_t, sigma_t)) - here
        # The SDE's step in the data prediction is the ODE's with twice the log signal-to-noise.
        hh = 2 * h if self.sde else h
        kept = sigma_t / sigma_s * (math.exp(-h) if self.sde else 1.0)
        drawn = -math.expm1(-hh)
        terms = [(kept, sample)]
        weights = [alpha_t * drawn]  # of x0, and below of its first two differences
        if order == 2 and self.variant == "midpoint":
            weights.append(alpha_t * drawn / 2)
        elif order >= 2:
            weights.append(alpha_t * (1 - drawn / hh))
        if order == 3:
            weights.append(alpha_t * ((drawn - hh) / hh**2 + 0.5))
        terms += _differences(weights, history[-order:], self._ratios(i, order, here, h))
        if self.sde:
            assert noise is not None
            terms.append((sigma_t * math.sqrt(drawn), noise))
        return combine(*terms), SolverState(step=i + 1, history=history)

    def _order_at(self, i: int, known: int) -> int:
        steps_left = len(self.schedule) - i
        few = self.lower_order_final and self.schedule.num_inference_steps < _FEW_STEPS
        to_zero = self.schedule.target(i)[1] == 0.0
        if steps_left == 1 and (self.euler_at_final or few or to_zero):
            return 1
        return min(self.order, known, 2 if steps_left == 2 and few else self.order)

    def _ratios(self, i: int, order: int, here: float, h: float) -> list[float]:
        """The lengths of the steps before, in units of this one's, the latest first."""
        lambdas = [here] + [log_snr(self.schedule.level(i - k)) for k in range(1, order)]
        return [(lambdas[k] - lambdas[k + 1]) / h for k in range(order - 1)]


def _differences(
    weights: list[float], outputs: tuple[torch.Tensor, ...], ratios: list[float]
) -> list[tuple[float, torch.Tensor]]:
    """sum of weights * (D0, D1, D2) as terms on the outputs, oldest first in `outputs`.

    D0 = m0; of order 2, D1 = (m0 - m1) / r0; of order 3, with d0 = (m0 - m1) / r0 and
    d1 = (m1 - m2) / r1, D1 = d0 + r0 / (r0 + r1) (d0 - d1) and D2 = (d0 - d1) / (r0 + r1).
    """
    m0 = outputs[-1]
    if len(outputs) == 1:
        return [(weights[0], m0)]
    r0 = ratios[0]
    if len(outputs) == 2:
        slope = weights[1] / r0
        return [(weights[0] + slope, m0), (-slope, outputs[-2])]
    r1 = ratios[1]
    bend = (weights[1] * r0 + weights[2]) / (r0 + r1)
    on_d0, on_d1 = (weights[1] + bend) / r0, -bend / r1
    return [
        (weights[0] + on_d0, m0),
        (on_d1 - on_d0, outputs[-2]),
        (-on_d1, outputs[-3]),
    ]
