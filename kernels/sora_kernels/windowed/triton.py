"""Windowed attention as a Triton kernel over 3-D tiles and block lists.

A tile's tokens are read in place: runs along a row are consecutive, so nothing is reordered in
memory. Tiles of keys that a window cuts are masked by coordinates, those that a mask cuts by a row
of bits a query, and tiles wholly inside not at all.
"""
# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations: they say constexpr, and nothing else.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_kernels.attention.plan import padded_width
from sora_kernels.dispatch import Case
from sora_kernels.launch import architecture, find, find_or_raise
from sora_kernels.replay import launch as launch_kernel
from sora_kernels.triton_support import dense_rows
from sora_kernels.triton_support import unsupported as no_triton
from sora_kernels.windowed.operands import Operands
from sora_kernels.windowed.plan import build_cached, radii


def unsupported(case: Case) -> str | None:
    problem = no_triton(case)
    if problem is not None:
        return problem
    arch = architecture(torch.device(case.device_type, case.device_index or 0))
    if find("windowed_attention", arch, case.dtype, padded_width(case.width)) is None:
        return f"{case.dtype} head_dim {case.width} spills registers on sm_{arch}"
    return None


@triton.jit
def _place(number, rows, columns, TT: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """Frame, row and column of each token of tile `number` in a grid of `rows` x `columns`."""
    across = tl.cdiv(columns, TW)
    down = tl.cdiv(rows, TH)
    slot = tl.arange(0, TT * TH * TW)
    t = number // (across * down) * TT + slot // (TH * TW)
    h = number // across % down * TH + slot // TW % TH
    w = number % across * TW + slot % TW
    return t, h, w


@triton.jit
def _meet(
    acc, total, top, q, q_t, q_h, q_w, number, k_ptr, v_ptr, k_stride, v_stride, k_first, frames,
    rows, columns, reach_t, reach_h, reach_w, sight, wide, column, scale2, PARTIAL: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, TT: tl.constexpr, TH: tl.constexpr,
    TW: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax."""
    t, h, w = _place(number, rows, columns, TT, TH, TW)
    key = (k_first + (t * rows + h) * columns + w).to(tl.int64)
    if PARTIAL:
        live = (t < frames) & (h < rows) & (w < columns)
        inside = live[:, None] & wide
    else:
        inside = wide
    k = tl.load(k_ptr + key[:, None] * k_stride + column[None, :], mask=inside, other=0.0)
    v = tl.load(v_ptr + key[:, None] * v_stride + column[None, :], mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if PARTIAL:
        if HAS_MASK:
            seen = ((sight[:, None] >> tl.arange(0, TT * TH * TW)[None, :]) & 1) != 0
        else:
            seen = (tl.abs(q_t[:, None] - t[None, :]) <= reach_t) & live[None, :]
            seen = seen & (tl.abs(q_h[:, None] - h[None, :]) <= reach_h)
            seen = seen & (tl.abs(q_w[:, None] - w[None, :]) <= reach_w)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale2)
    # A row that has met no key yet keeps a top of -inf, which may not be subtracted from itself.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * scale2 - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit(do_not_specialize=["reach_t", "reach_h", "reach_w"])
def windowed_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    q_stride,
    k_stride,
    v_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    segments_ptr,
    tiles_ptr,
    blocks_ptr,
    patterns_ptr,
    bits_ptr,
    heads,
    head_dim,
    scale2,
    reach_t,
    reach_h,
    reach_w,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    TT: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: (tiles, heads)."""
    head = tl.program_id(1)
    tile = tiles_ptr + 5 * tl.program_id(0)
    segment = segments_ptr + 16 * tl.load(tile)
    number = tl.load(tile + 1)
    start = tl.load(tile + 2)
    listed = blocks_ptr + start
    partial = tl.load(tile + 3)
    full = tl.load(tile + 4)
    q_first = tl.load(segment)
    q_rows = tl.load(segment + 2)
    q_columns = tl.load(segment + 3)
    k_first = tl.load(segment + 4)
    frames = tl.load(segment + 5)
    rows = tl.load(segment + 6)
    columns = tl.load(segment + 7)
    t, h, w = _place(number, q_rows, q_columns, TT, TH, TW)
    live = (t < tl.load(segment + 1)) & (h < q_rows) & (w < q_columns)
    token = (q_first + (t * q_rows + h) * q_columns + w).to(tl.int64)
    q_t = t + tl.load(segment + 8)
    q_h = h + tl.load(segment + 9)
    q_w = w + tl.load(segment + 10)
    column = tl.arange(0, WIDTH)
    wide = (column < head_dim)[None, :]
    inside = live[:, None] & wide
    at = token[:, None] * q_stride + head * q_head_stride + column[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    k_ptr += head * k_head_stride
    v_ptr += head * v_head_stride
    acc = tl.zeros((TT * TH * TW, WIDTH), tl.float32)
    total = tl.zeros((TT * TH * TW,), tl.float32)
    top = tl.full((TT * TH * TW,), float("-inf"), tl.float32)
    sight = tl.zeros((TT * TH * TW,), tl.int64)
    for i in tl.range(0, partial):
        if HAS_MASK:
            pattern = tl.load(patterns_ptr + start + i).to(tl.int64) * (TT * TH * TW)
            sight = tl.load(bits_ptr + pattern + tl.arange(0, TT * TH * TW))
        acc, total, top = _meet(
            acc, total, top, q, q_t, q_h, q_w, tl.load(listed + i), k_ptr, v_ptr, k_stride,
            v_stride, k_first, frames, rows, columns, reach_t, reach_h, reach_w, sight, wide,
            column, scale2, True, HAS_MASK, PRECISION, TT, TH, TW,
        )  # fmt: skip
    for i in tl.range(partial, partial + full):
        acc, total, top = _meet(
            acc, total, top, q, q_t, q_h, q_w, tl.load(listed + i), k_ptr, v_ptr, k_stride,
            v_stride, k_first, frames, rows, columns, reach_t, reach_h, reach_w, sight, wide,
            column, scale2, False, HAS_MASK, PRECISION, TT, TH, TW,
        )  # fmt: skip
    out = acc * tl.where(total > 0, 1.0 / total, 0.0)[:, None]
    at = (token[:, None] * heads + head) * head_dim + column[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def run(call: Operands) -> Tensor:
    q, k, v, plan = dense_rows(call.q), dense_rows(call.k), dense_rows(call.v), call.plan
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _, heads, head_dim = q.shape
    width = padded_width(head_dim)
    arch = architecture(q.device)
    launch = find_or_raise("windowed_attention", arch, q.dtype, width)
    if plan is None:
        place = call.grids, call.key_grids, call.origins, call.window
        plan = build_cached(*place, launch.tokens, q.device)
    elif math.prod(plan.shape) != launch.tokens:
        raise ValueError(
            f"windowed_attention: the plan has tiles of {math.prod(plan.shape)} tokens, this "
            f"kernel {launch.tokens}; plan with this dtype, head_dim and device"
        )
    if plan.tiles.shape[0] == 0:
        return out
    reach = radii(call.window)
    launch_kernel(
        windowed_attention_kernel,
        (plan.tiles.shape[0], heads),
        q,
        k,
        v,
        out,
        *(x.stride(0) for x in (q, k, v)),
        *(x.stride(1) for x in (q, k, v)),
        plan.segments,
        plan.tiles,
        plan.blocks,
        plan.patterns,
        plan.bits,
        heads,
        head_dim,
        call.scale * math.log2(math.e),
        *reach,
        HAS_MASK=plan.mask.numel() > 0,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        TT=plan.shape[0],
        TH=plan.shape[1],
        TW=plan.shape[2],
        WIDTH=width,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out
