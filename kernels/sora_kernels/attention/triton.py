"""Packed attention as a portable Triton kernel (FlashAttention-2's schedule, arXiv 2307.08691).

A program is one tile of queries of one head; the tile table names its segment. The main loop runs
over whole blocks of keys without a mask, and one masked block takes the rest. Padding's key is the
running softmax's first state, and costs no block. Loads go through host
tensor descriptors where the architecture has TMA, and through pointers elsewhere.

fp32 queries wider than 64 do not fit the registers in the two halves that tf32x3 takes: their
scores are a sum over parts of the width, for which queries are read again at every block of keys.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations: they say constexpr, and nothing else.
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_kernels.attention.operands import Operands
from sora_kernels.attention.plan import padded_width, plan_tiles
from sora_kernels.dispatch import Case
from sora_kernels.launch import architecture, find, find_or_raise, has_tma
from sora_kernels.replay import launch as launch_kernel
from sora_kernels.triton_support import dense_rows, describable
from sora_kernels.triton_support import unsupported as no_triton

TAKES_PLAN = True
PART = 64  # channels of fp32 that scores are summed over at a time


def parts_of(dtype: torch.dtype, width: int) -> int:
    """Over how many parts of the width the scores are summed."""
    return max(1, width // PART) if dtype == torch.float32 else 1


def unsupported(case: Case) -> str | None:
    problem = no_triton(case)
    if problem is not None:
        return problem
    arch = architecture(torch.device(case.device_type, case.device_index or 0))
    if find("packed_attention", arch, case.dtype, padded_width(case.width)) is None:
        return f"{case.dtype} head_dim {case.width} spills registers on sm_{arch}"
    return None


@triton.jit
def _rows(
    source, stride, head_stride, first, last, head, head_dim, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, start=0,
):  # fmt: skip
    """[BLOCK, WIDTH] from row `first` and column `start` of one head; rows from `last` on are zero
    where MASKED.

    A descriptor reads on into the next segment, whose values (or NaN) must not count.
    """
    row = first + tl.arange(0, BLOCK)
    if TMA:
        tile = source.load([first, head, start]).reshape(BLOCK, WIDTH)
        if MASKED:
            tile = tl.where((row < last)[:, None], tile, 0.0)
    else:
        column = start + tl.arange(0, WIDTH)
        inside = column[None, :] < head_dim
        if MASKED:
            inside = inside & (row < last)[:, None]
        at = row[:, None].to(tl.int64) * stride + head * head_stride + column[None, :]
        tile = tl.load(source + at, mask=inside, other=0.0)
    return tile


@triton.jit
def _scores_by_parts(
    q_source, k_source, q_stride, k_stride, q_head_stride, k_head_stride, q_first, q_last, at,
    k_last, head, head_dim, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N], with queries and keys brought in PARTS pieces of their width."""
    PIECE: tl.constexpr = WIDTH // PARTS
    scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for part in tl.static_range(PARTS):
        q = _rows(
            q_source, q_stride, q_head_stride, q_first, q_last, head, head_dim, BLOCK_M, PIECE,
            TMA, not TMA, part * PIECE,
        )  # fmt: skip
        k = _rows(
            k_source, k_stride, k_head_stride, at, k_last, head, head_dim, BLOCK_N, PIECE, TMA,
            MASKED, part * PIECE,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    return scores


@triton.jit
def _attend_block(
    acc, total, top, scores, v, keys, scale2, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running softmax. `top` and `scale2` are in powers of two."""
    if MASKED:
        scores = tl.where((tl.arange(0, BLOCK_N) < keys)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale2)
    # scores * scale2 - top is one fused multiply-add.
    weights = tl.exp2(scores * scale2 - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def _padding_scores(
    q, key_ptr, head, head_dim, first, WIDTH: tl.constexpr, live,
):  # fmt: skip
    """[BLOCK_M], of columns `first` and on; a key that is not live is not read, and counts as 0."""
    column = first + tl.arange(0, WIDTH)
    key = tl.load(key_ptr + head * head_dim + column, mask=(column < head_dim) & live, other=0.0)
    return tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], axis=1)


@triton.jit(do_not_specialize=["q_len", "k_len"])
def packed_attention_kernel(
    q_source,
    k_source,
    v_source,
    out_ptr,
    lse_ptr,
    q_stride,
    k_stride,
    v_stride,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    tiles_ptr,
    cu_q_ptr,
    cu_k_ptr,
    padding_key_ptr,
    padding_value_ptr,
    counts_ptr,
    q_len,
    k_len,
    heads,
    head_dim,
    scale2,
    UNIFORM: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: (tiles, heads). UNIFORM: all segments have q_len queries and k_len keys, no table."""
    head = tl.program_id(1)
    if UNIFORM:
        tiles = tl.cdiv(q_len, BLOCK_M)
        segment = tl.program_id(0) // tiles
        start = (tl.program_id(0) % tiles) * BLOCK_M
        q_first = segment * q_len
        q_last = q_first + q_len
        k_first = segment * k_len
        k_last = k_first + k_len
    else:
        segment = tl.load(tiles_ptr + 2 * tl.program_id(0))
        start = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
        if segment < 0:
            return
        q_first = tl.load(cu_q_ptr + segment).to(tl.int32)
        q_last = tl.load(cu_q_ptr + segment + 1).to(tl.int32)
        k_first = tl.load(cu_k_ptr + segment).to(tl.int32)
        k_last = tl.load(cu_k_ptr + segment + 1).to(tl.int32)
    q_first += start
    # Queries past the segment's end are not stored, so only pointers need to be kept in bounds.
    if PARTS == 1:
        q = _rows(
            q_source, q_stride, q_head_stride, q_first, q_last, head, head_dim, BLOCK_M, WIDTH,
            TMA, not TMA,
        )  # fmt: skip
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if HAS_PADDING:
        count = tl.load(counts_ptr + segment)
        live = count > 0
        if PARTS == 1:
            score = _padding_scores(q, padding_key_ptr, head, head_dim, 0, WIDTH, live)
        else:
            PIECE: tl.constexpr = WIDTH // PARTS
            score = tl.zeros((BLOCK_M,), tl.float32)
            for part in tl.range(PARTS):  # a loop: unrolled, sm_90 spills at head_dim 256
                some = _rows(
                    q_source, q_stride, q_head_stride, q_first, q_last, head, head_dim, BLOCK_M,
                    PIECE, TMA, not TMA, part * PIECE,
                )  # fmt: skip
                score += _padding_scores(
                    some, padding_key_ptr, head, head_dim, part * PIECE, PIECE, live
                )
        log_count = tl.log2(tl.maximum(count, 1).to(tl.float32))
        top = score * scale2 + tl.where(live, log_count, float("-inf"))
        total += tl.where(live, 1.0, 0.0)
        column = tl.arange(0, WIDTH)
        inside = (column < head_dim) & live
        value = tl.load(padding_value_ptr + head * head_dim + column, mask=inside, other=0.0)
        acc += value.to(tl.float32)[None, :]
    whole = k_first + (k_last - k_first) // BLOCK_N * BLOCK_N
    for at in tl.range(k_first, whole, BLOCK_N):
        if PARTS == 1:
            k = _rows(
                k_source, k_stride, k_head_stride, at, k_last, head, head_dim, BLOCK_N, WIDTH,
                TMA, False,
            )  # fmt: skip
            v = _rows(
                v_source, v_stride, v_head_stride, at, k_last, head, head_dim, BLOCK_N, WIDTH,
                TMA, False,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            scores = _scores_by_parts(
                q_source, k_source, q_stride, k_stride, q_head_stride, k_head_stride, q_first,
                q_last, at, k_last, head, head_dim, BLOCK_M, BLOCK_N, WIDTH, PARTS, TMA, False,
                PRECISION,
            )  # fmt: skip
            v = _rows(
                v_source, v_stride, v_head_stride, at, k_last, head, head_dim, BLOCK_N, WIDTH,
                TMA, False,
            )  # fmt: skip
        acc, total, top = _attend_block(
            acc, total, top, scores, v, BLOCK_N, scale2, BLOCK_N, False, PRECISION
        )
    if whole < k_last:
        if PARTS == 1:
            k = _rows(
                k_source, k_stride, k_head_stride, whole, k_last, head, head_dim, BLOCK_N, WIDTH,
                TMA, True,
            )  # fmt: skip
            v = _rows(
                v_source, v_stride, v_head_stride, whole, k_last, head, head_dim, BLOCK_N, WIDTH,
                TMA, True,
            )  # fmt: skip
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            scores = _scores_by_parts(
                q_source, k_source, q_stride, k_stride, q_head_stride, k_head_stride, q_first,
                q_last, whole, k_last, head, head_dim, BLOCK_M, BLOCK_N, WIDTH, PARTS, TMA, True,
                PRECISION,
            )  # fmt: skip
            v = _rows(
                v_source, v_stride, v_head_stride, whole, k_last, head, head_dim, BLOCK_N, WIDTH,
                TMA, True,
            )  # fmt: skip
        acc, total, top = _attend_block(
            acc, total, top, scores, v, k_last - whole, scale2, BLOCK_N, True, PRECISION
        )
    # Without keys total is 0: the result is 0 and the log-sum-exp -inf.
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    row = q_first + tl.arange(0, BLOCK_M)
    column = tl.arange(0, WIDTH)
    at = (row[:, None].to(tl.int64) * heads + head) * head_dim + column[None, :]
    mask = (row < q_last)[:, None] & (column < head_dim)[None, :]
    tl.store(out_ptr + at, (acc * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    if HAS_LSE:
        lse = tl.where(total > 0, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
        tl.store(lse_ptr + row.to(tl.int64) * heads + head, lse, mask=row < q_last)


def _addressable(tensor: Tensor) -> Tensor:
    """The tensor itself where it is dense or its rows begin at multiples of 16 bytes, else a copy.

    Other rows are read an element at a time, which costs more than the copy and spills registers.
    """
    return tensor if tensor.is_contiguous() or describable(tensor) else tensor.contiguous()


def _source(tensor: Tensor, block: int, width: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [block, 1, width])


def run(call: Operands) -> tuple[Tensor, Tensor]:
    q, k, v = (_addressable(dense_rows(x)) for x in (call.q, call.k, call.v))
    tokens, heads, head_dim = q.shape
    tiles, most_q, most_k = call.tiles, call.max_seqlen_q, call.max_seqlen_k
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), call.lse()
    segments = call.cu_seqlens_q.shape[0] - 1
    if tokens == 0:
        return out, lse
    arch = architecture(q.device)
    width = padded_width(head_dim)
    launch = find_or_raise("packed_attention", arch, q.dtype, width)
    # No segment is longer than max_seqlen, so this says that none is shorter either.
    uniform = segments * most_q == tokens and segments * most_k == k.shape[0]
    if uniform:
        count = segments * triton.cdiv(most_q, launch.block_m)
        tiles = call.cu_seqlens_q
    else:
        if tiles is None:
            tiles = plan_tiles(call.cu_seqlens_q, tokens, launch.block_m)
        elif call.block != launch.block_m:
            raise ValueError(
                f"packed_attention: the plan has tiles of {call.block} queries, this kernel "
                f"{launch.block_m}; plan with this dtype, head_dim and device"
            )
        count = tiles.shape[0]
    tma = has_tma(arch) and k.shape[0] > 0 and all(describable(t) for t in (q, k, v))
    parts = parts_of(q.dtype, width)
    sources: tuple[Any, Any, Any] = (q, k, v)
    if tma:
        sources = (
            _source(q, launch.block_m, width // parts),
            _source(k, launch.block_n, width // parts),
            _source(v, launch.block_n, width),
        )
    launch_kernel(
        packed_attention_kernel,
        (count, heads),
        *sources,
        out,
        lse,
        *(t.stride(0) for t in (q, k, v)),
        *(t.stride(1) for t in (q, k, v)),
        tiles,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        *call.padding_parts(out),
        most_q,
        most_k,
        heads,
        head_dim,
        call.scale * math.log2(math.e),
        UNIFORM=uniform,
        HAS_LSE=call.return_lse,
        HAS_PADDING=call.padding is not None,
        TMA=tma,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        PARTS=parts,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        WIDTH=width,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out, lse
