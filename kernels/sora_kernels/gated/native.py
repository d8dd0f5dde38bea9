"""Gated residual, normalisation and modulation by csrc/cpu: one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    if "residual torch.float64" in case.traits:
        return "a float64 residual"
    return csrc.unsupported(case)


def run(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    index: Tensor | None,
    *,
    kind: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return torch.ops.sora.native_gate_residual_norm_modulate(
        x, residual, gate, scale, shift, index, kind, weight, bias, eps
    )
