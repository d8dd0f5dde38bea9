"""The weight dequantised whole, and a product of float32, in plain PyTorch. Differentiable in x."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.quant.formats import dequantise
from sora_kernels.quant.operands import Operands


def unsupported(case: Case) -> str | None:
    return None


def run(call: Operands) -> Tensor:
    wide = torch.promote_types(call.x.dtype, torch.float32)
    weight = dequantise(call.weight, call.scale, call.format, wide)
    bias = None if call.bias is None else call.bias.to(wide)
    # Rounded as a dense weight in x's dtype would be.
    out = F.linear(call.x.to(wide), weight.to(call.x.dtype).to(wide), bias)
    return (F.gelu(out, approximate=call.gelu) if call.gelu else out).to(call.x.dtype)
