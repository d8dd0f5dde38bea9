"""UniPC: a predictor and a corrector of one family (Zhao et al., arXiv 2302.04867)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from sora_engine.samplers.prediction import to_epsilon, to_x0
from sora_engine.samplers.schedule import log_snr
from sora_engine.samplers.solver import Solver, SolverState, combine


@dataclass(frozen=True)
class UniPCSolver(Solver):
    """Multistep UniPC of order 1 to 3, in the data prediction or the noise prediction.

    variant: B(h) of the paper, "bh1" is h and "bh2" is e^h - 1. disable_corrector: steps of the
    full schedule after which nothing is corrected. The corrector of step i acts on the sample with
    the prediction that step i is given, so a step costs one call of the model.
    """

    order: int = 2
    variant: Literal["bh1", "bh2"] = "bh2"
    predict_x0: bool = True
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()

    def _step(
        self,
        state: SolverState,
        i: int,
        sample: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, SolverState]:
        convert = to_x0 if self.predict_x0 else to_epsilon
        output = convert(self.schedule.prediction_type, sample, prediction, *self.schedule.level(i))
        if state.last_sample is not None and self._corrected(i):
            order = self._order_at(i - 1, len(state.history))
            sample = self._advance(i - 1, order, state.last_sample, state.history, output)
        history = (*state.history, output)[-self.order :]
        order = self._order_at(i, len(history))
        moved = self._advance(i, order, sample, history, None)
        return moved, SolverState(step=i + 1, history=history, last_sample=sample)

    def _corrected(self, i: int) -> bool:
        return self.schedule.start + i - 1 not in self.disable_corrector

    def _order_at(self, i: int, known: int) -> int:
        """The order of step i when the outputs of `known` steps, its own among them, are there."""
        order = min(self.order, known)
        return min(order, len(self.schedule) - i) if self.lower_order_final else order

    def _advance(
        self,
        i: int,
        order: int,
        sample: torch.Tensor,
        history: tuple[torch.Tensor, ...],
        arrived: torch.Tensor | None,
    ) -> torch.Tensor:
        """From level i to level i + 1: UniP, or UniC where the output `arrived` at i + 1 is known.

        history: the outputs at levels ..., i - 1, i.
        """
        start, end = self.schedule.level(i), self.schedule.target(i)
        (alpha_s, sigma_s), (alpha_t, sigma_t) = start, end
        here = log_snr(start)
        h = log_snr(end) - here
        if self.predict_x0:
            # sigma_t / sigma_s x - alpha_t (e^-h - 1) m0; alpha_t e^-h is alpha_s sigma_t / sigma_s
            kept, scale = sigma_t / sigma_s, alpha_t
            drawn = alpha_t - alpha_s * sigma_t / sigma_s
            hh = -h
        else:
            # alpha_t / alpha_s x - sigma_t (e^h - 1) m0, written so that sigma_t may be 0
            kept, scale = alpha_t / alpha_s, sigma_t
            drawn = sigma_t - sigma_s * alpha_t / alpha_s
            hh = h
        newest = history[-1]
        terms = [(kept, sample)]
        on_newest = drawn
        if order > 1 or arrived is not None:
            ratios = [(log_snr(self.schedule.level(i - k)) - here) / h for k in range(1, order)]
            base = hh if self.variant == "bh1" else math.expm1(hh)
            weights = _weights(ratios, hh, base, corrector=arrived is not None)
            for k, ratio in enumerate(ratios):
                weight = -scale * base * weights[k] / ratio
                terms.append((weight, history[-2 - k]))
                on_newest -= weight
            if arrived is not None:
                weight = -scale * base * weights[-1]
                terms.append((weight, arrived))
                on_newest -= weight
        terms.insert(1, (on_newest, newest))
        return combine(*terms)


def _weights(ratios: list[float], hh: float, base: float, *, corrector: bool) -> list[float]:
    """The weights rho of the divided differences: R rho = b of the paper's theorem 3.1.

    ratios: (lambda of an older level - lambda here) / h, without the 1 of the level arrived at.
    """
    if not corrector and len(ratios) == 1:
        return [0.5]  # the authors' choice for order 2, whatever the step sizes are
    if corrector and not ratios:
        return [0.5]
    points = np.array([*ratios, 1.0] if corrector else ratios)
    phi = math.expm1(hh) / hh - 1
    right = []
    factorial = 1
    for k in range(1, len(points) + 1):
        right.append(phi * factorial / base)
        factorial *= k + 1
        phi = phi / hh - 1 / factorial
    matrix = np.stack([points**k for k in range(len(points))])
    return [float(w) for w in np.linalg.solve(matrix, np.array(right))]
