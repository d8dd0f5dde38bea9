"""The linear layer as a Triton kernel with fixed tiles.

A program is one tile of rows and columns of the result. It sums over the whole width by itself, in
blocks from first to last: no other program adds to it, and how many rows there are changes nothing
in it. Loads go through host tensor descriptors where the architecture has TMA.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations: they say constexpr, and nothing else.
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.invariant.operands import GELUS, Operands
from sora_kernels.launch import architecture, has_tma, matmul
from sora_kernels.replay import launch
from sora_kernels.triton_support import dense_rows, describable
from sora_kernels.triton_support import unsupported as no_triton

GROUP = 8  # tiles of rows that go through a column of weights before the next: those stay in cache


def unsupported(case: Case) -> str | None:
    return no_triton(case)


@triton.jit
def _tile(
    source, stride, first, last, column, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] from row `first` and `column`, zero past `last` and `width`."""
    if TMA:
        tile = source.load([first, column])
    else:
        row = first + tl.arange(0, ROWS)
        at = column + tl.arange(0, COLUMNS)
        inside = (row < last)[:, None] & (at < width)[None, :]
        tile = tl.load(
            source + row[:, None].to(tl.int64) * stride + at[None, :], mask=inside, other=0.0
        )
    return tile


@triton.jit(do_not_specialize=["rows"])
def invariant_linear_kernel(
    x_source,
    weight_source,
    bias_ptr,
    out_ptr,
    x_stride,
    weight_stride,
    rows,
    outs,
    ins,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid: (tiles of rows * tiles of columns,). GELU: 0 none, 1 by erf, 2 by tanh."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(outs, BLOCK_N)
    group = tl.program_id(0) // (GROUP * column_tiles)
    members = min(row_tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * column_tiles)
    first = (group * GROUP + within % members) * BLOCK_M
    column = within // members * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in tl.range(0, ins, BLOCK_K):
        x = _tile(x_source, x_stride, first, rows, at, ins, BLOCK_M, BLOCK_K, TMA)
        weight = _tile(
            weight_source, weight_stride, column, outs, at, ins, BLOCK_N, BLOCK_K, TMA
        )  # fmt: skip
        acc = tl.dot(x, tl.trans(weight), acc, input_precision=PRECISION)
    out_row = first + tl.arange(0, BLOCK_M)
    out_column = column + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + out_column, mask=out_column < outs, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if GELU == 1:
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    if GELU == 2:
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u).
        acc = acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))
    tl.store(
        out_ptr + out_row[:, None].to(tl.int64) * outs + out_column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(out_row < rows)[:, None] & (out_column < outs)[None, :],
    )


def _source(tensor: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


def run(call: Operands) -> Tensor:
    x, weight = dense_rows(call.x), dense_rows(call.weight)
    out = call.out()
    rows, (outs, ins) = x.shape[0], weight.shape
    if rows == 0:
        return out
    arch = architecture(x.device)
    sizes = matmul("invariant_linear", arch, x.dtype)
    # What a row comes to must not hang on where rows begin either: both ways load the same values.
    tma = has_tma(arch) and describable(x) and describable(weight)
    sources: tuple[Any, Any] = (x, weight)
    if tma:
        sources = (
            _source(x, sizes.block_m, sizes.block_k),
            _source(weight, sizes.block_n, sizes.block_k),
        )
    grid = triton.cdiv(rows, sizes.block_m) * triton.cdiv(outs, sizes.block_n)
    launch(
        invariant_linear_kernel,
        (grid,),
        *sources,
        x if call.bias is None else call.bias.contiguous(),
        out,
        x.stride(0),
        weight.stride(0),
        rows,
        outs,
        ins,
        HAS_BIAS=call.bias is not None,
        GELU=GELUS.index(call.gelu),
        TMA=tma,
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
        BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n,
        BLOCK_K=sizes.block_k,
        GROUP=GROUP,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
    return out
