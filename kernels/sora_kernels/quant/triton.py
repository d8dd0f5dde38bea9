"""The linear layer as a Triton kernel that dequantises in its loop.

A program is one tile of rows and columns of the result, as of `invariant_linear`: it sums over the
whole width by itself, so no row's bits depend on the rows beside it. The weight's values are put
together from bytes as `formats.py` has them; a scale or a minimum is loaded for each value, which
the first-level cache makes cheap. fp8 is taken apart by its bits: not every architecture has it.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations: they say constexpr, and nothing else.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.launch import architecture, matmul
from sora_kernels.quant.formats import BLOCKS, FORMATS
from sora_kernels.quant.operands import GELUS, Operands
from sora_kernels.replay import launch
from sora_kernels.triton_support import dense_rows
from sora_kernels.triton_support import unsupported as no_triton

GROUP = 8  # tiles of rows that go through a column of weights before the next: those stay in cache


def unsupported(case: Case) -> str | None:
    return no_triton(case)


@triton.jit
def _byte(weight_ptr, at, mask):
    return tl.load(weight_ptr + at, mask=mask, other=0).to(tl.int32)


@triton.jit
def _half(half_ptr, at, mask):
    return tl.load(half_ptr + at // 2, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _plain(weight_ptr, scale_ptr, row, column, mask, row_bytes, scale_stride, stretch,
           FORMAT: tl.constexpr, HAS_SCALE: tl.constexpr):  # fmt: skip
    """int8, e4m3, e5m2. e4m3 by way of float16: its bits an exponent up, 2^8 too small."""
    raw = tl.load(weight_ptr + row * row_bytes + column, mask=mask, other=0)
    if FORMAT == 0:
        value = raw.to(tl.int8, bitcast=True).to(tl.float32)
    elif FORMAT == 1:
        wide = raw.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where((wide & 0x7F) == 0x7F, float("nan"), value)
    else:
        value = (raw.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    if HAS_SCALE:
        value *= tl.load(scale_ptr + row * scale_stride + column // stretch, mask=mask, other=0.0)
    return value


@triton.jit
def _of_32(weight_ptr, half_ptr, base, j, mask, FORMAT: tl.constexpr):
    """Q4_0, Q4_1, Q5_0, Q5_1 (3 to 6) and Q8_0 (7)."""
    d = _half(half_ptr, base, mask)
    if FORMAT == 7:
        code = _byte(weight_ptr, base + 2 + j, mask)
        value = d * tl.where(code > 127, code - 256, code).to(tl.float32)
    else:
        MINIMUM: tl.constexpr = FORMAT == 4 or FORMAT == 6
        FIFTH: tl.constexpr = FORMAT >= 5
        first = 4 if MINIMUM else 2
        codes = first + (4 if FIFTH else 0)
        code = (_byte(weight_ptr, base + codes + j % 16, mask) >> (j // 16 * 4)) & 15
        if FIFTH:
            code |= ((_byte(weight_ptr, base + first + j // 8, mask) >> (j % 8)) & 1) << 4
        if MINIMUM:
            value = d * code.to(tl.float32) + _half(half_ptr, base + 2, mask)
        elif FIFTH:
            value = d * (code - 16).to(tl.float32)
        else:
            value = d * (code - 8).to(tl.float32)
    return value


@triton.jit
def _of_256(weight_ptr, half_ptr, base, j, mask, FORMAT: tl.constexpr):
    """Q2_K to Q6_K (8 to 12)."""
    if FORMAT == 8:
        both = _byte(weight_ptr, base + j // 16, mask)
        code = _byte(weight_ptr, base + 16 + j // 128 * 32 + j % 32, mask) >> (j // 32 % 4 * 2)
        value = _half(half_ptr, base + 80, mask) * (both & 15).to(tl.float32)
        value *= (code & 3).to(tl.float32)
        value -= _half(half_ptr, base + 82, mask) * (both >> 4).to(tl.float32)
    elif FORMAT == 9:
        sub = j // 16
        scale = (_byte(weight_ptr, base + 96 + sub % 8, mask) >> (sub // 8 * 4)) & 15
        high = (_byte(weight_ptr, base + 104 + sub % 4, mask) >> (sub // 4 * 2)) & 3
        scale = (scale | (high << 4)) - 32
        code = _byte(weight_ptr, base + 32 + j // 128 * 32 + j % 32, mask) >> (j // 32 % 4 * 2)
        third = (_byte(weight_ptr, base + j % 32, mask) >> (j // 32)) & 1
        code = (code & 3) + 4 * third - 4
        value = _half(half_ptr, base + 108, mask) * scale.to(tl.float32) * code.to(tl.float32)
    elif FORMAT == 12:
        scale = _byte(weight_ptr, base + 192 + j // 16, mask)
        scale = tl.where(scale > 127, scale - 256, scale)
        low = _byte(weight_ptr, base + j // 128 * 64 + j % 64, mask) >> (j % 128 // 64 * 4)
        high = _byte(weight_ptr, base + 128 + j // 128 * 32 + j % 32, mask) >> (j // 32 % 4 * 2)
        code = ((low & 15) | ((high & 3) << 4)) - 32
        value = _half(half_ptr, base + 208, mask) * scale.to(tl.float32) * code.to(tl.float32)
    else:  # scales and minima of six bits: the upper two of the last four lie with the first four
        sub = j // 32
        late = sub >= 4
        near = _byte(weight_ptr, base + 4 + tl.where(late, sub + 4, sub), mask)
        far = _byte(weight_ptr, base + 4 + tl.where(late, sub - 4, sub), mask)
        other = _byte(weight_ptr, base + 4 + tl.where(late, sub, sub + 4), mask)
        scale = tl.where(late, (near & 15) | ((far >> 6) << 4), near & 63)
        least = tl.where(late, (near >> 4) | ((other >> 6) << 4), other & 63)
        CODES: tl.constexpr = 16 if FORMAT == 10 else 48
        code = _byte(weight_ptr, base + CODES + j // 64 * 32 + j % 32, mask) >> (sub % 2 * 4)
        code &= 15
        if FORMAT == 11:
            code |= ((_byte(weight_ptr, base + 16 + j % 32, mask) >> sub) & 1) << 4
        value = _half(half_ptr, base, mask) * scale.to(tl.float32) * code.to(tl.float32)
        value -= _half(half_ptr, base + 2, mask) * least.to(tl.float32)
    return value


@triton.jit(do_not_specialize=["rows"])
def quant_linear_kernel(
    x_ptr,
    weight_ptr,
    half_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    x_stride,
    row_bytes,
    scale_stride,
    stretch,
    rows,
    outs,
    ins,
    FORMAT: tl.constexpr,
    VALUES: tl.constexpr,
    BYTES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid: (tiles of rows * tiles of columns,). FORMAT: its place in `FORMATS`; VALUES, BYTES: of
    a block. GELU: 0 none, 1 by erf, 2 by tanh."""
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(outs, BLOCK_N)
    group = tl.program_id(0) // (GROUP * column_tiles)
    members = min(row_tiles - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * column_tiles)
    first = (group * GROUP + within % members) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    out_column = within // members * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = out_column.to(tl.int64)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in tl.range(0, ins, BLOCK_K):
        column = at + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + row[:, None].to(tl.int64) * x_stride + column[None, :],
            mask=(row < rows)[:, None] & (column < ins)[None, :],
            other=0.0,
        )
        mask = (column < ins)[:, None] & (out_column < outs)[None, :]
        if FORMAT < 3:
            values = _plain(weight_ptr, scale_ptr, weight_row, column[:, None], mask, row_bytes,
                            scale_stride, stretch, FORMAT, HAS_SCALE)  # fmt: skip
        else:
            base = weight_row * row_bytes + column[:, None] // VALUES * BYTES
            j = column[:, None] % VALUES
            if FORMAT < 8:
                values = _of_32(weight_ptr, half_ptr, base, j, mask, FORMAT)
            else:
                values = _of_256(weight_ptr, half_ptr, base, j, mask, FORMAT)
        values = tl.where(mask, values, 0.0)
        acc = tl.dot(x, values.to(x.dtype), acc, input_precision=PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + out_column, mask=out_column < outs, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if GELU == 1:
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    if GELU == 2:
        # 0.5 * (1 + tanh(u)) is sigmoid(2 u).
        acc = acc * tl.sigmoid(1.5957691216057308 * (acc + 0.044715 * acc * acc * acc))
    tl.store(
        out_ptr + row[:, None].to(tl.int64) * outs + out_column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(row < rows)[:, None] & (out_column < outs)[None, :],
    )


def run(call: Operands) -> Tensor:
    x, out = dense_rows(call.x), call.out()
    rows = x.shape[0]
    if rows == 0:
        return out
    block, scale = BLOCKS.get(call.format), call.scale
    raw = call.weight.view(torch.uint8)
    sizes = matmul("quant_linear", architecture(x.device), x.dtype)
    grid = triton.cdiv(rows, sizes.block_m) * triton.cdiv(call.outs, sizes.block_n)
    launch(
        quant_linear_kernel,
        (grid,),
        x,
        raw,
        x if block is None else raw.view(torch.float16),
        x if scale is None else scale,
        x if call.bias is None else call.bias.contiguous(),
        out,
        x.stride(0),
        raw.shape[1],
        0 if scale is None or scale.shape[0] == 1 else scale.shape[1],
        call.ins if scale is None else call.ins // scale.shape[1],
        rows,
        call.outs,
        call.ins,
        FORMAT=FORMATS.index(call.format),
        VALUES=1 if block is None else block.values,
        BYTES=1 if block is None else block.size_bytes,
        HAS_SCALE=scale is not None,
        HAS_BIAS=call.bias is not None,
        GELU=GELUS.index(call.gelu),
        PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32",
        BLOCK_M=sizes.block_m,
        BLOCK_N=sizes.block_n,
        BLOCK_K=sizes.block_k,
        GROUP=GROUP,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
    return out
