"""QK normalisation and rotary embedding as one Triton kernel and one launch for q and k.

A program has a token's row of q or of k, with all heads.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations: they say constexpr, and nothing else.
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.launch import architecture, row_warps
from sora_kernels.replay import launch as launch_kernel
from sora_kernels.rope.operands import Operands
from sora_kernels.triton_support import MAX_CHANNELS, dense_rows
from sora_kernels.triton_support import unsupported as no_triton

Side = tuple[Tensor, Tensor | None]
"""q or k, and its weights."""


def unsupported(case: Case) -> str | None:
    return no_triton(case)


@triton.jit
def norm_rope_rows(
    q_ptr,
    q_stride,
    q_head_stride,
    q_out_ptr,
    q_weight_ptr,
    q_heads,
    k_ptr,
    k_stride,
    k_head_stride,
    k_out_ptr,
    k_weight_ptr,
    k_heads,
    cos_ptr,
    cos_stride,
    sin_ptr,
    sin_stride,
    head_dim,
    eps,
    SIDES: tl.constexpr,
    ACROSS_HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """SIDES: 2 for q and k, 1 for q alone. WIDTH and HEADS are powers of two that hold head_dim and
    the heads of either.
    """
    token = (tl.program_id(0) // SIDES).to(tl.int64)
    x_ptr, stride, head_stride, y_ptr = q_ptr, q_stride, q_head_stride, q_out_ptr
    weight_ptr, heads = q_weight_ptr, q_heads
    # Neighbours are a token's q and k, which read the same angles.
    if tl.program_id(0) % SIDES == 1:
        x_ptr, stride, head_stride, y_ptr = k_ptr, k_stride, k_head_stride, k_out_ptr
        weight_ptr, heads = k_weight_ptr, k_heads
    head = tl.arange(0, HEADS)
    half = head_dim // 2
    pair = tl.arange(0, WIDTH // 2)
    x_ptr += token * stride
    y_ptr += token * heads * head_dim
    # Of each head's weights, or of the ones that all heads share.
    start = head[:, None] * head_dim if ACROSS_HEADS else head[:, None] * 0
    if INTERLEAVED:
        # Whole rows in one access; the pairs are taken apart in registers.
        column = tl.arange(0, WIDTH)
        mask = (head[:, None] < heads) & (column[None, :] < head_dim)
        x = tl.load(x_ptr + head[:, None] * head_stride + column[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(x.to(tl.float32), (HEADS, WIDTH // 2, 2)))
    else:
        inside = (head[:, None] < heads) & (pair[None, :] < half)
        at = x_ptr + head[:, None] * head_stride + pair[None, :]
        first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=1)
    if ACROSS_HEADS:
        inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / (heads * head_dim) + eps)
        first = first * inverse
        second = second * inverse
    else:
        inverse = 1.0 / tl.sqrt(squares / head_dim + eps)
        first = first * inverse[:, None]
        second = second * inverse[:, None]
    if HAS_WEIGHT:
        if INTERLEAVED:
            weight = tl.load(weight_ptr + start + column[None, :], mask=mask, other=0.0)
            pairs = tl.reshape(weight.to(tl.float32), (HEADS, WIDTH // 2, 2))
            first_weight, second_weight = tl.split(pairs)
        else:
            at = weight_ptr + start + pair[None, :]
            first_weight = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            second_weight = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        first *= first_weight
        second *= second_weight
    if ROTATE:
        # A row that is broadcast: as a vector it would be read into another layout, a scalar at a
        # time, and go to this one through shared memory.
        turn = pair[None, :]
        cos = tl.load(cos_ptr + token * cos_stride + turn, mask=turn < half, other=0.0)
        sin = tl.load(sin_ptr + token * sin_stride + turn, mask=turn < half, other=0.0)
        cos = cos.to(tl.float32)
        sin = sin.to(tl.float32)
        turned = first * cos - second * sin
        second = first * sin + second * cos
        first = turned
    if INTERLEAVED:
        y = tl.reshape(tl.join(first, second), (HEADS, WIDTH))
        tl.store(
            y_ptr + head[:, None] * head_dim + column[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=mask,
        )
    else:
        at = y_ptr + head[:, None] * head_dim + pair[None, :]
        tl.store(at, first.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(at + half, second.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(call: Operands, sides: Sequence[Side]) -> list[Tensor]:
    """Normalised and rotated sides, q or k or both, whose weights have one dtype or are absent."""
    sources = [(dense_rows(x), weight) for x, weight in sides]
    x = sources[0][0]
    tokens, _, head_dim = x.shape
    results = [torch.empty(y.shape, dtype=y.dtype, device=y.device) for y, _ in sources]
    if tokens == 0:
        return results
    heads = max(y.shape[1] for y, _ in sources)
    width, rows = max(2, triton.next_power_of_2(head_dim)), triton.next_power_of_2(heads)
    if width * rows > MAX_CHANNELS:
        raise ValueError(f"qk_norm_rope: {heads} heads of {head_dim}; up to {MAX_CHANNELS} fit")
    rotate = call.cos is not None and call.sin is not None
    cos, sin = (x if t is None else dense_rows(t) for t in (call.cos, call.sin))
    operands: list[Tensor | int] = []
    for (y, weight), out in zip(sources, results, strict=True):
        # An absent operand is passed as another one and never read.
        weights = y if weight is None else weight.contiguous()
        operands += [y, y.stride(0), y.stride(1), out, weights, y.shape[1]]
    launch_kernel(
        norm_rope_rows,
        (tokens * len(sources),),
        *operands * (3 - len(sources)),
        cos,
        cos.stride(0),
        sin,
        sin.stride(0),
        head_dim,
        call.eps,
        SIDES=len(sources),
        ACROSS_HEADS=call.across_heads,
        # Without rotation the layout of pairs is free; whole rows also take an odd head_dim.
        INTERLEAVED=call.interleaved or not rotate,
        HAS_WEIGHT=sides[0][1] is not None,
        ROTATE=rotate,
        HEADS=rows,
        WIDTH=width,
        num_warps=row_warps("qk_norm_rope", architecture(x.device), width * rows),
    )
    return results


def run(call: Operands) -> tuple[Tensor, Tensor]:
    q = call.q, call.q_weight
    if call.k is None:
        (out,) = _launch(call, [q])
        return out, out.new_empty(0)
    k = call.k, call.k_weight
    dtypes = {None if weight is None else weight.dtype for _, weight in (q, k)}
    if len(dtypes) == 1:
        out, k_out = _launch(call, [q, k])
        return out, k_out
    return _launch(call, [q])[0], _launch(call, [k])[0]
