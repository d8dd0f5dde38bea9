"""Gated residual, normalisation and modulation by csrc: one pass over memory. On the CPU,
csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case
from sora_kernels.modulate.operands import Operands


def unsupported(case: Case) -> str | None:
    if "residual torch.float64" in case.traits:
        return "a float64 residual"
    return csrc.unsupported(case)


def run(call: Operands) -> tuple[Tensor, Tensor]:
    return torch.ops.sora.native_gate_residual_norm_modulate(
        call.x,
        call.residual,
        call.gate,
        call.scale,
        call.shift,
        call.index,
        call.kind,
        call.weight,
        call.bias,
        call.eps,
    )
