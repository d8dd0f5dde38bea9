"""Gated residual, normalisation and modulation in plain PyTorch. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.modulate.reference import modulate, normalise, rows_of


def unsupported(case: Case) -> str | None:
    return None


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
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    branch = x.to(wide)
    if gate is not None:
        branch = branch * rows_of(gate, index, wide)
    residual = (residual.to(wide) + branch).to(residual.dtype)
    y = normalise(residual.to(wide), kind, weight, bias, eps)
    return residual, modulate(y, scale, shift, index).to(x.dtype)
