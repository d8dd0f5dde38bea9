"""int8 times int8 on a CPU: rows of x are quantised by csrc/cpu, and multiplied by oneDNN.

Lossy: x is rounded to 255 levels of each row's largest value (dynamic quantisation, one scale a
token), so it serves by name alone. A weight of another format than int8 with a scale for each row
is made one first, which loses a little more. `pack` does what is of the weight once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case
from sora_kernels.quant.formats import INT8, dequantise
from sora_kernels.quant.operands import GELUS, Operands

ZERO = 128
"""The zero point of x as uint8: the instructions take unsigned times signed."""


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case) or problem()


def problem() -> str | None:
    """Loads the native library. Returns why there are no int8 products here, or None."""
    why = csrc.problem()
    if why is not None:
        return why
    if "onednn" not in torch.backends.quantized.supported_engines:
        return "this PyTorch was built without oneDNN's int8 products"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class PackedInt8:
    """A weight in oneDNN's own layout. scale: float32 `[out]`."""

    packed: Any
    scale: Tensor
    zeros: Tensor
    outs: int
    ins: int

    @property
    def nbytes(self) -> int:
        return self.outs * self.ins + self.scale.nbytes


def quantise_weight(dense: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[out, in]` and float32 scales `[out, 1]` of a dense weight: each row's largest value is
    127."""
    dense = dense.float()
    scale = dense.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (dense / scale).round_().to(torch.int8), scale


def pack(weight: Tensor, scale: Tensor) -> PackedInt8:
    """int8 `[out, in]` with scales `[out, 1]` or `[1, 1]`, for good."""
    outs, ins = weight.shape
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scale = scale.float().expand(outs, 1).reshape(outs).contiguous()
    return PackedInt8(packed, scale, torch.zeros(outs, dtype=torch.int32), outs, ins)


def multiply(x: Tensor, weight: PackedInt8, bias: Tensor | None, gelu: str = "") -> Tensor:
    """`x @ weight.T + bias`, x quantised row by row; `[rows, out]` in x's dtype."""
    if not x.shape[0]:
        return x.new_empty(0, weight.outs)
    codes, scale = torch.ops.sora.native_quantise_rows(x)
    sums = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, ZERO, weight.packed, weight.scale, weight.zeros, None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return torch.ops.sora.native_finish_rows(sums, scale, bias, GELUS.index(gelu), x.dtype)


def run(call: Operands) -> Tensor:
    weight, scale = call.weight, call.scale
    if call.format != INT8 or scale is None or scale.shape[1] != 1:
        weight, scale = quantise_weight(dequantise(weight, scale, call.format))
    return multiply(call.x, pack(weight, scale), call.bias, call.gelu)
