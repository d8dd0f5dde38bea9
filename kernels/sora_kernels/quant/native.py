"""Weights unpacked by csrc/cpu, a tile of their rows at a time, and multiplied by PyTorch's product.

A tile is dense in x's dtype, so the product runs at the rate that it has for dense weights; one
tile at a time is in memory. Unpacking is in proportion to the weight, the product to the weight
times the rows: of a video it is a few per cent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case
from sora_kernels.quant.formats import FORMATS
from sora_kernels.quant.operands import GELUS, Operands

TILE_BYTES = 4 << 20
"""Of a tile."""


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case)


def tile_rows(ins: int, itemsize: int, outs: int) -> int:
    """Rows of a tile: a multiple of 64, or all."""
    return min(outs, max(64, TILE_BYTES // (ins * itemsize) // 64 * 64))


def unpack(call: Operands, first: int, out: Tensor) -> None:
    """Rows of the weight from `first` on, as many as `out` has, in its dtype."""
    number = FORMATS.index(call.format)
    torch.ops.sora.native_unpack(call.weight, call.scale, number, first, out)


def run(call: Operands) -> Tensor:
    x, rows = call.x, call.x.shape[0]
    # Products of a few rows go another way, in which sums have another order: a row's bits would
    # depend on its company.
    least = 8 * torch.get_num_threads()
    if rows < least:
        x = F.pad(x, (0, 0, 0, least - rows))
    outs, ins = call.outs, call.ins
    step = tile_rows(ins, x.element_size(), outs)
    tile = x.new_empty(step, ins)
    out = x.new_empty(x.shape[0], outs)
    bias = None if call.bias is None else call.bias.to(x.dtype)
    for first in range(0, outs, step):
        part = tile[: min(step, outs - first)]
        unpack(call, first, part)
        own = out[:, first : first + len(part)]
        if bias is None:
            torch.mm(x, part.T, out=own)
        else:
            torch.addmm(bias[first : first + len(part)], x, part.T, out=own)
        if call.gelu:
            torch.ops.sora.native_gelu_rows(own, GELUS.index(call.gelu))
    return out[:rows]
