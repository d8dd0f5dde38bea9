"""fp8 times fp8 on GPUs that have it, by `torch._scaled_mm`.

Lossy: x is rounded to e4m3, one scale a row, so it serves by name alone. It has not run on a GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.quant.formats import E4M3
from sora_kernels.quant.operands import Operands

TOP = 448.0
"""The largest e4m3 value."""


def unsupported(case: Case) -> str | None:
    if E4M3 not in case.traits:
        return f"it multiplies float8_e4m3fn weights, and this is {', '.join(sorted(case.traits))}"
    if case.dtype != torch.bfloat16:
        return f"it gives bf16, and x is {case.dtype}"
    if case.width % 16:
        return f"width {case.width} is no multiple of 16"
    if case.device_type == "cuda" and torch.cuda.get_device_capability(case.device_index) < (8, 9):
        return "it needs compute capability 8.9"
    if case.device_type not in ("cuda", "cpu"):
        return f"it does not run on {case.device_type}"
    return None


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as e4m3, and a scale for each row `[rows, 1]`."""
    top = x.abs().amax(dim=1, keepdim=True).float()
    scale = top.clamp_min(torch.finfo(torch.float32).tiny) / TOP
    return (x.float() / scale).clamp_(-TOP, TOP).to(torch.float8_e4m3fn), scale


def run(call: Operands) -> Tensor:
    scale = call.scale
    if scale is not None and scale.shape[1] != 1:
        raise ValueError("quant_linear: scaled_mm takes one scale a row or a tensor of the weight")
    codes, row_scale = quantise_rows(call.x)
    own = torch.ones(1, 1, device=codes.device) if scale is None else scale
    column_scale = own.expand(call.outs, 1).T.contiguous()
    bias = None if call.bias is None else call.bias.to(call.x.dtype)
    out = torch._scaled_mm(
        codes,
        call.weight.T,
        scale_a=row_scale,
        scale_b=column_scale,
        bias=bias,
        out_dtype=call.x.dtype,
    )
    return F.gelu(out, approximate=call.gelu) if call.gelu else out
