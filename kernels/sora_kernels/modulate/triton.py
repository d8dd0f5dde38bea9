"""Normalisation and modulation as one Triton kernel: a row is read once, held, and written once.

The same kernel serves the gated form, which adds a branch to the residual stream first.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations: they say constexpr, and nothing else.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.launch import architecture, norm_block, row_warps
from sora_kernels.modulate.operands import Operands
from sora_kernels.replay import launch as launch_kernel
from sora_kernels.replay import unread
from sora_kernels.triton_support import dense_rows, unsupported_row

# Whether tokens read one row of the tables, each its own, or that of an index.
ONE_ROW, PER_TOKEN, INDEX = (tl.constexpr(way) for way in range(3))


def unsupported(case: Case) -> str | None:
    return unsupported_row(case)


@triton.jit
def _table_tile(table, stride, rows, columns, mask):
    """fp32 [ROWS, BLOCK] of a [rows, channels] table."""
    at = rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(table + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows_by", "table_rows", "tokens"])
def norm_rows(
    x_ptr,
    x_stride,
    y_ptr,
    residual_ptr,
    residual_stride,
    residual_out_ptr,
    gate_ptr,
    gate_stride,
    scale_ptr,
    scale_stride,
    shift_ptr,
    shift_stride,
    index_ptr,
    rows_by,
    table_rows,
    weight_ptr,
    bias_ptr,
    tokens,
    channels,
    eps,
    GATED: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rows_by: ONE_ROW, PER_TOKEN or INDEX: which row of the tables a token reads. It is no
    constant, so that one kernel serves batches of one noise level and of several.
    """
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = token < tokens
    inside = column < channels
    mask = live[:, None] & inside[None, :]
    token = token.to(tl.int64)
    row = tl.load(index_ptr + token, mask=live & (rows_by == INDEX), other=0).to(tl.int64)
    row = tl.where(rows_by == PER_TOKEN, token, row)
    # Reading the index on the host would wait for the device, so a bad one is held in bounds.
    row = tl.minimum(tl.maximum(row, 0), table_rows - 1)
    x = tl.load(x_ptr + token[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    dense = token[:, None] * channels + column[None, :]
    if GATED:
        if HAS_GATE:
            x = x * _table_tile(gate_ptr, gate_stride, row, column, mask)
        at = token[:, None] * residual_stride + column[None, :]
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        updated = (residual + x).to(residual_out_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + dense, updated, mask=mask)
        x = updated.to(tl.float32)
    if RMS:
        centred = x
    else:
        mean = tl.sum(x, axis=1) / channels
        centred = tl.where(mask, x - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / channels
    y = centred * (1.0 / tl.sqrt(variance + eps))[:, None]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
        y = y * weight[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        y = y + bias[None, :]
    if HAS_SCALE:
        y = y * (1.0 + _table_tile(scale_ptr, scale_stride, row, column, mask))
    if HAS_SHIFT:
        y = y + _table_tile(shift_ptr, shift_stride, row, column, mask)
    tl.store(y_ptr + dense, y.to(y_ptr.dtype.element_ty), mask=mask)


def launch(call: Operands) -> tuple[Tensor, Tensor]:
    """Returns the new residual (x itself when there is none) and y."""
    x, residual, index = dense_rows(call.x), call.residual, call.index
    tokens, channels = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gated = residual is not None
    stream = dense_rows(residual) if residual is not None else x
    out = torch.empty(stream.shape, dtype=stream.dtype, device=x.device) if gated else x
    if tokens == 0:
        return out, y
    tables = [
        None if table is None else dense_rows(table)
        for table in (call.gate, call.scale, call.shift)
    ]
    present = [table for table in tables if table is not None]
    rows = present[0].shape[0] if present else 1
    rows_by = PER_TOKEN if rows > 1 else ONE_ROW
    if index is not None and present:
        rows_by, index = INDEX, index.contiguous()
    else:
        index = unread(torch.int64, x.device)
    # An absent operand is passed as x and never read.
    operands: list[Tensor | int] = []
    for table in tables:
        operands += [x, 0] if table is None else [table, table.stride(0)]
    block, rows_each = norm_block(channels)
    launch_kernel(
        norm_rows,
        (triton.cdiv(tokens, rows_each),),
        x,
        x.stride(0),
        y,
        stream,
        stream.stride(0),
        out,
        *operands,
        index,
        rows_by.value,
        rows,
        x if call.weight is None else call.weight.contiguous(),
        x if call.bias is None else call.bias.contiguous(),
        tokens,
        channels,
        call.eps,
        GATED=gated,
        HAS_GATE=call.gate is not None,
        HAS_SCALE=call.scale is not None,
        HAS_SHIFT=call.shift is not None,
        HAS_WEIGHT=call.weight is not None,
        HAS_BIAS=call.bias is not None,
        RMS=call.kind == "rms",
        ROWS=rows_each,
        BLOCK=block,
        num_warps=row_warps("norm_modulate", architecture(x.device), rows_each * block),
    )
    return out, y


def run(call: Operands) -> Tensor:
    return launch(call)[1]
