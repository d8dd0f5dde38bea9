"""Normalisation and modulation in plain PyTorch, in fp32 (fp64 for fp64 inputs). Differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.modulate.operands import Operands


def unsupported(case: Case) -> str | None:
    return None


def rows_of(table: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[rows, channels]` as `[tokens, channels]`, or as one row that broadcasts."""
    if index is not None:
        table = table.index_select(0, index)
    return table.to(dtype)


def normalise(
    x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, in x's dtype."""
    weight = None if weight is None else weight.to(x.dtype)
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.layer_norm(x, x.shape[-1:], weight, None if bias is None else bias.to(x.dtype), eps)


def modulate(x: Tensor, scale: Tensor | None, shift: Tensor | None, index: Tensor | None) -> Tensor:
    """`x * (1 + scale) + shift`, in x's dtype."""
    if scale is not None:
        x = x * (1 + rows_of(scale, index, x.dtype))
    if shift is not None:
        x = x + rows_of(shift, index, x.dtype)
    return x


def run(call: Operands) -> Tensor:
    x = call.x
    wide = torch.promote_types(x.dtype, torch.float32)
    y = normalise(x.to(wide), call.kind, call.weight, call.bias, call.eps)
    return modulate(y, call.scale, call.shift, call.index).to(x.dtype)
