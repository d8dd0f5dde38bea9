"""Gated residual, normalisation and modulation in plain PyTorch. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.modulate.operands import Operands
from sora_kernels.modulate.reference import modulate, normalise, rows_of


def unsupported(case: Case) -> str | None:
    return None


def run(call: Operands) -> tuple[Tensor, Tensor]:
    x, residual = call.x, call.residual
    assert residual is not None
    wide = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), torch.float32)
    branch = x.to(wide)
    if call.gate is not None:
        branch = branch * rows_of(call.gate, call.index, wide)
    residual = (residual.to(wide) + branch).to(residual.dtype)
    y = normalise(residual.to(wide), call.kind, call.weight, call.bias, call.eps)
    return residual, modulate(y, call.scale, call.shift, call.index).to(x.dtype)
