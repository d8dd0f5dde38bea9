"""Gated residual, normalisation and modulation by the Triton kernel of `norm_modulate`."""

from __future__ import annotations

from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.modulate.triton import launch
from sora_kernels.triton_support import unsupported_row


def unsupported(case: Case) -> str | None:
    if "residual torch.float64" in case.traits:
        return "a float64 residual"
    return unsupported_row(case)


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
    return launch(x, residual, gate, scale, shift, index, kind, weight, bias, eps)
