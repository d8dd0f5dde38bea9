"""Weights unpacked by csrc/cpu, some rows at a time, and multiplied.

In bf16, on processors with AVX512-BF16, csrc/cpu multiplies too: 64 rows of the weight are unpacked
into the second cache, and all rows of x go through them. Else a tile is unpacked into memory, dense
in x's dtype, and goes through PyTorch's product, at the rate that it has for dense weights; one
tile at a time is in memory. Unpacking is in proportion to the weight, the product to the weight
times the rows: of a video it is a few per cent.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case
from sora_kernels.quant.formats import FORMATS, dequantise, width_of
from sora_kernels.quant.operands import GELUS, Operands

TILE_BYTES = 64 << 20
"""Of a tile. Most layers are one: a product of fewer columns lays x out anew for each (a third of
the time at 4 MiB)."""


ONEDNN = (torch.float32, torch.bfloat16) if torch.backends.mkldnn.is_available() else ()
"""Dtypes in which whole weights go through oneDNN: 1.1 times MKL's rate on Zen 4, GELU in it."""


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case)


def tile_rows(ins: int, itemsize: int, outs: int) -> int:
    """Rows of a tile: a multiple of 64, or all."""
    return min(outs, max(64, TILE_BYTES // (ins * itemsize) // 64 * 64))


def dequantised(weight: Tensor, scale: Tensor | None, format: str, dtype: torch.dtype) -> Tensor:
    """The values of a weight, dense `[out, in]`, on its device."""
    ins = width_of(format, weight.shape[1])
    if weight.is_meta:
        return weight.new_empty(weight.shape[0], ins, dtype=dtype)
    if weight.device.type != "cpu" or csrc.problem() is not None:
        return dequantise(weight, scale, format).to(dtype)
    number = FORMATS.index(format)
    return torch.ops.sora.native_unpack(weight, scale, number, ins, 0, weight.shape[0], dtype)


@functools.cache
def has_pairs() -> bool:
    """Whether bf16 products are our own: AVX512-BF16, and no AMX, with which oneDNN's are faster
    than any unpacking costs."""
    return torch.ops.sora.native_quant_linear_serves() and not torch.cpu._is_amx_tile_supported()


def unpack(call: Operands, first: int, count: int) -> Tensor:
    """Rows of the weight, dense in x's dtype."""
    number = FORMATS.index(call.format)
    return torch.ops.sora.native_unpack(
        call.weight, call.scale, number, call.ins, first, count, call.x.dtype
    )


@functools.cache
def in_float32() -> bool:
    """Whether bf16 is multiplied as float32: on a processor without products of bf16. What oneDNN
    and MKL have in their place is slower, and a row's bits depend on how many others there are."""
    own = torch.ops.sora.native_quant_linear_serves()
    return not own and not torch.cpu._is_amx_tile_supported()


def run(call: Operands) -> Tensor:
    x, rows = call.x, call.x.shape[0]
    if x.dtype == torch.bfloat16 and call.ins % 32 == 0 and has_pairs():
        number, gelu = FORMATS.index(call.format), GELUS.index(call.gelu)
        return torch.ops.sora.native_quant_linear(
            x, call.weight, call.scale, call.bias, number, gelu
        )
    # Products of a few rows go another way, in which sums have another order: a row's bits would
    # depend on its company.
    least = 8 * torch.get_num_threads()
    if rows < least:
        x = F.pad(x, (0, 0, 0, least - rows))
    outs, dtype = call.outs, x.dtype
    if dtype == torch.bfloat16 and in_float32():
        x = x.float()
    if x.dtype in ONEDNN and tile_rows(call.ins, x.element_size(), outs) == outs:
        bias = None if call.bias is None else call.bias.to(x.dtype)
        activation = ("gelu", call.gelu) if call.gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(
            x, unpack(call, 0, outs).to(x.dtype), bias, activation[0], [], activation[1]
        )[:rows].to(dtype)
    step = tile_rows(call.ins, x.element_size(), outs)
    out = x.new_empty(x.shape[0], outs)
    bias = None if call.bias is None else call.bias.to(x.dtype)
    for first in range(0, outs, step):
        tile = unpack(call, first, min(step, outs - first)).to(x.dtype)
        own = out[:, first : first + len(tile)]
        if bias is None:
            torch.mm(x, tile.T, out=own)
        else:
            torch.addmm(bias[first : first + len(tile)], x, tile.T, out=own)
        if call.gelu:
            torch.ops.sora.native_gelu_rows(own, GELUS.index(call.gelu))
    return out[:rows].to(dtype)
