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

TILE_BYTES = 64 << 20
"""Of a tile. Most layers are one: a product of fewer columns lays x out anew for each (a third of
the time at 4 MiB)."""


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case)


def tile_rows(ins: int, itemsize: int, outs: int) -> int:
    """Rows of a tile: a multiple of 64, or all."""
    return min(outs, max(64, TILE_BYTES // (ins * itemsize) // 64 * 64))


def unpack(call: Operands, first: int, count: int) -> Tensor:
    """Rows of the weight, dense in x's dtype."""
    number = FORMATS.index(call.format)
    return torch.ops.sora.native_unpack(
        call.weight, call.scale, number, call.ins, first, count, call.x.dtype
    )


def run(call: Operands) -> Tensor:
    x, rows = call.x, call.x.shape[0]
    # Products of a few rows go another way, in which sums have another order: a row's bits would
    # depend on its company.
    least = 8 * torch.get_num_threads()
    if rows < least:
        x = F.pad(x, (0, 0, 0, least - rows))
    outs = call.outs
    step = tile_rows(call.ins, x.element_size(), outs)
    out = x.new_empty(x.shape[0], outs)
    bias = None if call.bias is None else call.bias.to(x.dtype)
    for first in range(0, outs, step):
        tile = unpack(call, first, min(step, outs - first))
        own = out[:, first : first + len(tile)]
        if bias is None:
            torch.mm(x, tile.T, out=own)
        else:
            torch.addmm(bias[first : first + len(tile)], x, tile.T, out=own)
        if call.gelu:
            torch.ops.sora.native_gelu_rows(own, GELUS.index(call.gelu))
    return out[:rows]
