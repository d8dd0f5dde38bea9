"""Low-rank changes as two Triton kernels: down to the ranks, and up to the result.

Rows are cut into tiles that have the same adapters (the grouped products of Punica, arXiv
2310.18547). A table on the device says of each tile which rows it has and which adapters, and of
each adapter where its factors lie: one launch serves adapters of any number and ranks. What lies
between the two is float32.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations: they say constexpr, and nothing else.
from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.launch import architecture, matmul
from sora_kernels.lora.operands import Group, Operands
from sora_kernels.transfer import to_device
from sora_kernels.triton_support import dense_rows
from sora_kernels.triton_support import unsupported as no_triton

BLOCK_R = 16
"""Ranks at a time: the least that tensor cores take."""
MAX_TABLES = 2048
"""Tables that are kept: one for each layer of each of the last few compositions."""


def unsupported(case: Case) -> str | None:
    return no_triton(case)


@triton.jit(do_not_specialize=["middle_width"])
def lora_down_kernel(
    x_ptr,
    tiles_ptr,
    entries_ptr,
    scales_ptr,
    middle_ptr,
    x_stride,
    ins,
    middle_width,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid: (tiles, most adapters of a tile). `scale * x @ down.T` of a tile and an adapter."""
    tile = tiles_ptr + tl.program_id(0) * 4
    first = tl.load(tile)
    stop = tl.load(tile + 1)
    if tl.program_id(1) >= tl.load(tile + 3):
        return
    number = tl.load(tile + 2) + tl.program_id(1)
    entry = entries_ptr + number * 4
    down_ptr = tl.load(entry).to(tl.pointer_type(x_ptr.dtype.element_ty))
    rank = tl.load(entry + 2)
    place = tl.load(entry + 3)
    scale = tl.load(scales_ptr + number)
    row = first + tl.arange(0, BLOCK_M)
    in_tile = row < stop
    for start in tl.range(0, rank, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for at in tl.range(0, ins, BLOCK_K):
            column = at + tl.arange(0, BLOCK_K)
            inside = column < ins
            x = tl.load(
                x_ptr + row[:, None] * x_stride + column[None, :],
                mask=in_tile[:, None] & inside[None, :],
                other=0.0,
            )
            down = tl.load(
                down_ptr + ranks[None, :] * ins + column[:, None],
                mask=(ranks < rank)[None, :] & inside[:, None],
                other=0.0,
            )
            acc = tl.dot(x, down, acc, input_precision=PRECISION)
        tl.store(
            middle_ptr + row[:, None] * middle_width + place + ranks[None, :],
            scale * acc,
            mask=in_tile[:, None] & (ranks < rank)[None, :],
        )


@triton.jit(do_not_specialize=["middle_width"])
def lora_up_kernel(
    base_ptr,
    tiles_ptr,
    entries_ptr,
    middle_ptr,
    out_ptr,
    base_stride,
    outs,
    middle_width,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid: (tiles, tiles of columns). `base`, and `middle @ up.T` of each of a tile's adapters."""
    tile = tiles_ptr + tl.program_id(0) * 4
    row = tl.load(tile) + tl.arange(0, BLOCK_M)
    in_tile = row < tl.load(tile + 1)
    number = tl.load(tile + 2)
    count = tl.load(tile + 3)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < outs
    mask = in_tile[:, None] & inside[None, :]
    acc = tl.load(base_ptr + row[:, None] * base_stride + column[None, :], mask=mask, other=0.0)
    acc = acc.to(tl.float32)
    for own in tl.range(0, count):
        entry = entries_ptr + (number + own) * 4
        up_ptr = tl.load(entry + 1).to(tl.pointer_type(base_ptr.dtype.element_ty))
        rank = tl.load(entry + 2)
        place = tl.load(entry + 3)
        for start in tl.range(0, rank, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            middle = tl.load(
                middle_ptr + row[:, None] * middle_width + place + ranks[None, :],
                mask=in_tile[:, None] & (ranks < rank)[None, :],
                other=0.0,
            )
            up = tl.load(
                up_ptr + column[None, :].to(tl.int64) * rank + ranks[:, None],
                mask=inside[None, :] & (ranks < rank)[:, None],
                other=0.0,
            )
            acc = tl.dot(middle, up.to(tl.float32), acc, input_precision=PRECISION)
    tl.store(
        out_ptr + row[:, None] * outs + column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


class Table(NamedTuple):
    """tiles: int64 `[tiles, 4]`: first row, row behind the last, first entry, entries. entries:
    int64 `[entries, 4]`: addresses of down and up, rank, place in the middle. most: adapters of a
    tile. width: ranks of a tile, together."""

    tiles: Tensor
    entries: Tensor
    scales: Tensor
    most: int
    width: int


_tables: OrderedDict[tuple[object, ...], Table] = OrderedDict()


def table_of(groups: list[Group], rows: int, block: int, device: torch.device) -> Table:
    """The table of a call; one that was made before where all that it says is the same."""
    said = [
        (g.down.data_ptr(), g.up.data_ptr(), g.down.shape[0], g.start, g.stop, g.scale)
        for g in groups
    ]
    key = (*said, rows, block, device)
    table = _tables.get(key)
    if table is None:
        table = _tables[key] = _lay_out(groups, rows, block, device)
        while len(_tables) > MAX_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    return table


def _lay_out(groups: list[Group], rows: int, block: int, device: torch.device) -> Table:
    cuts = sorted({0, rows, *(place for g in groups for place in (g.start, g.stop))})
    tiles: list[list[int]] = []
    entries: list[list[int]] = []
    scales: list[float] = []
    most = width = 0
    for start, stop in itertools.pairwise(cuts):
        own = [g for g in groups if g.start <= start and g.stop >= stop]
        first, place = len(entries), 0
        for group in own:
            rank = group.down.shape[0]
            entries.append([group.down.data_ptr(), group.up.data_ptr(), rank, place])
            scales.append(group.scale)
            place += rank
        most, width = max(most, len(own)), max(width, place)
        tiles += [[at, min(at + block, stop), first, len(own)] for at in range(start, stop, block)]
    return Table(
        to_device(torch.tensor(tiles, dtype=torch.int64), device),
        to_device(torch.tensor(entries, dtype=torch.int64).reshape(-1, 4), device),
        to_device(torch.tensor(scales, dtype=torch.float32), device),
        most,
        width,
    )


def run(call: Operands) -> Tensor:
    x, base = dense_rows(call.x), dense_rows(call.base)
    (rows, ins), outs = x.shape, base.shape[1]
    groups = [
        Group(g.down.contiguous(), g.up.contiguous(), g.start, g.stop, g.scale)
        for g in call.groups
        if g.start < g.stop
    ]
    if not groups:
        return base.clone(memory_format=torch.contiguous_format)
    out = base.new_empty(rows, outs)
    launch = matmul("lora_linear", architecture(x.device), x.dtype)
    table = table_of(groups, rows, launch.block_m, x.device)
    middle = torch.empty(rows, table.width, dtype=torch.float32, device=x.device)
    exact = "tf32x3" if x.dtype == torch.float32 else "tf32"
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    lora_down_kernel[(len(table.tiles), table.most)](
        x,
        table.tiles,
        table.entries,
        table.scales,
        middle,
        x.stride(0),
        ins,
        table.width,
        PRECISION=exact,
        BLOCK_M=launch.block_m,
        BLOCK_K=launch.block_k,
        BLOCK_R=BLOCK_R,
        **options,
    )
    lora_up_kernel[(len(table.tiles), triton.cdiv(outs, launch.block_n))](
        base,
        table.tiles,
        table.entries,
        middle,
        out,
        base.stride(0),
        outs,
        table.width,
        PRECISION=exact,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BLOCK_R=BLOCK_R,
        **options,
    )
    return out
