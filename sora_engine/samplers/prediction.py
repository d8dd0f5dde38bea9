"""What a model predicts, turned into what a solver integrates. All element-wise, any shape.

At a level (alpha, sigma), `x = alpha x0 + sigma eps`. The predictions: epsilon is `eps`; sample is
`x0`; v_prediction is `alpha eps - sigma x0` (arXiv 2202.00512); flow_prediction is `eps - x0`.
"""

from __future__ import annotations

import torch

from sora_engine.samplers.config import PredictionType


def to_x0(
    kind: PredictionType, sample: torch.Tensor, prediction: torch.Tensor, alpha: float, sigma: float
) -> torch.Tensor:
    """The clean sample that `prediction` implies at (alpha, sigma)."""
    if kind == "sample":
        return prediction
    if kind == "epsilon":
        return (sample - sigma * prediction) / alpha
    if kind == "v_prediction":
        return alpha * sample - sigma * prediction
    return sample - sigma * prediction


def to_epsilon(
    kind: PredictionType, sample: torch.Tensor, prediction: torch.Tensor, alpha: float, sigma: float
) -> torch.Tensor:
    """The noise that `prediction` implies at (alpha, sigma)."""
    if kind == "epsilon":
        return prediction
    if kind == "sample":
        return (sample - alpha * prediction) / sigma
    if kind == "v_prediction":
        return alpha * prediction + sigma * sample
    return sample + alpha * prediction


def to_velocity(
    kind: PredictionType, sample: torch.Tensor, prediction: torch.Tensor, alpha: float, sigma: float
) -> torch.Tensor:
    """The flow `eps - x0` that `prediction` implies at a flow level (alpha + sigma = 1)."""
    if kind == "flow_prediction":
        return prediction
    if kind == "sample":
        return (sample - prediction) / sigma
    return (prediction - sample) / alpha
