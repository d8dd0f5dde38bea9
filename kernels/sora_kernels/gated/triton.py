"""Gated residual, normalisation and modulation by the Triton kernel of `norm_modulate`."""

from __future__ import annotations

from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.modulate.operands import Operands
from sora_kernels.modulate.triton import launch
from sora_kernels.triton_support import unsupported_row


def unsupported(case: Case) -> str | None:
    if "residual torch.float64" in case.traits:
        return "a float64 residual"
    return unsupported_row(case)


def run(call: Operands) -> tuple[Tensor, Tensor]:
    return launch(call)
