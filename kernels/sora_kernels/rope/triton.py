"""QK normalisation and rotary embedding as one Triton kernel, a token with all heads a program."""

# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations: they say constexpr, and nothing else.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.launch import architecture, row_warps
from sora_kernels.rope.operands import Operands
from sora_kernels.triton_support import MAX_CHANNELS, dense_rows
from sora_kernels.triton_support import unsupported as no_triton


def unsupported(case: Case) -> str | None:
    return no_triton(case)


@triton.jit
def norm_rope_rows(
    x_ptr,
    token_stride,
    head_stride,
    y_ptr,
    weight_ptr,
    cos_ptr,
    cos_stride,
    sin_ptr,
    sin_stride,
    heads,
    head_dim,
    eps,
    ACROSS_HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROTATE: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """WIDTH and HEADS are powers of two that hold head_dim and heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    half = head_dim // 2
    pair = tl.arange(0, WIDTH // 2)
    x_ptr += token * token_stride
    y_ptr += token * heads * head_dim
    if INTERLEAVED:
        # Whole rows in one access; the pairs are taken apart in registers.
        column = tl.arange(0, WIDTH)
        mask = (head[:, None] < heads) & (column[None, :] < head_dim)
        x = tl.load(x_ptr + head[:, None] * head_stride + column[None, :], mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(x.to(tl.float32), (HEADS, WIDTH // 2, 2)))
        low = 2 * pair
        high = 2 * pair + 1
        inside = (head[:, None] < heads) & (high[None, :] < head_dim)
        last = (head[:, None] < heads) & (low[None, :] < head_dim)
    else:
        low = pair
        high = pair + half
        inside = (head[:, None] < heads) & (pair[None, :] < half)
        last = inside
        first = tl.load(x_ptr + head[:, None] * head_stride + low[None, :], mask=inside, other=0.0)
        second = tl.load(
            x_ptr + head[:, None] * head_stride + high[None, :], mask=inside, other=0.0
        )
        first = first.to(tl.float32)
        second = second.to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=1)
    if ACROSS_HEADS:
        inverse = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / (heads * head_dim) + eps)
        first = first * inverse
        second = second * inverse
        start = head[:, None] * head_dim
    else:
        inverse = 1.0 / tl.sqrt(squares / head_dim + eps)
        first = first * inverse[:, None]
        second = second * inverse[:, None]
        start = head[:, None] * 0
    if HAS_WEIGHT:
        first *= tl.load(weight_ptr + start + low[None, :], mask=last, other=0.0).to(tl.float32)
        second *= tl.load(weight_ptr + start + high[None, :], mask=inside, other=0.0).to(tl.float32)
    if ROTATE:
        cos = tl.load(cos_ptr + token * cos_stride + pair, mask=pair < half, other=0.0)
        sin = tl.load(sin_ptr + token * sin_stride + pair, mask=pair < half, other=0.0)
        cos = cos.to(tl.float32)[None, :]
        sin = sin.to(tl.float32)[None, :]
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
        at = y_ptr + head[:, None] * head_dim
        tl.store(at + low[None, :], first.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(at + high[None, :], second.to(y_ptr.dtype.element_ty), mask=inside)


def _norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    across_heads: bool,
    interleaved: bool,
    eps: float,
) -> Tensor:
    x = dense_rows(x)
    tokens, heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    width, rows = max(2, triton.next_power_of_2(head_dim)), triton.next_power_of_2(heads)
    if width * rows > MAX_CHANNELS:
        raise ValueError(f"qk_norm_rope: {heads} heads of {head_dim}; up to {MAX_CHANNELS} fit")
    rotate = cos is not None and sin is not None
    cos, sin = (x if t is None else dense_rows(t) for t in (cos, sin))
    norm_rope_rows[(tokens,)](
        x,
        x.stride(0),
        x.stride(1),
        y,
        x if weight is None else weight.contiguous(),
        cos,
        cos.stride(0),
        sin,
        sin.stride(0),
        heads,
        head_dim,
        eps,
        ACROSS_HEADS=across_heads,
        # Without rotation the layout of pairs is free; whole rows also take an odd head_dim.
        INTERLEAVED=interleaved or not rotate,
        HAS_WEIGHT=weight is not None,
        ROTATE=rotate,
        HEADS=rows,
        WIDTH=width,
        num_warps=row_warps("qk_norm_rope", architecture(x.device), width * rows),
    )
    return y


def run(call: Operands) -> tuple[Tensor, Tensor]:
    rotation = call.cos, call.sin, call.across_heads, call.interleaved, call.eps
    return call.each(lambda x, weight: _norm_rope(x, weight, *rotation))
