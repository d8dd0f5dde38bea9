"""Norm, SiLU, causal padding and cache as one Triton kernel, several pixels a program.

Each program copies or computes its pixels and stores them twice where they are to be kept.
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
from sora_kernels.replay import launch as launch_kernel
from sora_kernels.triton_support import unsupported_row


def unsupported(case: Case) -> str | None:
    if case.traits:
        return "it has a weight and no bias, and repeats no frames"
    return unsupported_row(case)


@triton.jit(do_not_specialize=["rows", "fresh", "kept"])
def causal_norm_silu_rows(
    x_ptr,
    past_ptr,
    weight_ptr,
    joined_ptr,
    cache_ptr,
    rows,
    fresh,
    kept,
    channels,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """fresh, kept: rows of x and of past in one video; rows: of the result, all videos together."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < channels
    live = row < rows
    video = row // (fresh + kept)
    at = row % (fresh + kept)
    old = live & (at < kept)
    new = live & (at >= kept)
    from_past = (video * kept + at)[:, None] * channels + column[None, :]
    from_x = (video * fresh + at - kept)[:, None] * channels + column[None, :]
    past = tl.load(past_ptr + from_past, mask=old[:, None] & inside[None, :], other=0.0)
    x = tl.load(x_ptr + from_x, mask=new[:, None] & inside[None, :], other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    mean_square = tl.sum(x * x, axis=1) / channels
    normed = x * (1.0 / tl.sqrt(mean_square + eps))[:, None] * weight[None, :]
    y = normed / (1.0 + tl.exp(-normed))
    # One of the two is zero; adding fp32 values of the storage type loses nothing.
    y = y.to(joined_ptr.dtype.element_ty).to(tl.float32) + past.to(tl.float32)
    y = y.to(joined_ptr.dtype.element_ty)
    tl.store(
        joined_ptr + row[:, None] * channels + column[None, :],
        y,
        mask=live[:, None] & inside[None, :],
    )
    keep = live & (at >= fresh)
    to_cache = (video * kept + at - fresh)[:, None] * channels + column[None, :]
    tl.store(cache_ptr + to_cache, y, mask=keep[:, None] & inside[None, :])


def run(x: Tensor, past: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    x, past = x.contiguous(), past.contiguous()
    batch, frames, pixels, channels = x.shape
    kept = past.shape[1]
    shape = (batch, kept + frames, pixels, channels)
    joined = torch.empty(shape, dtype=x.dtype, device=x.device)
    cache = torch.empty_like(past)
    rows = batch * shape[1] * pixels
    if rows:
        block, height = norm_block(channels)
        # As wide a program as that of norm_modulate, whose table serves.
        warps = row_warps("norm_modulate", architecture(x.device), block * height)
        launch_kernel(
            causal_norm_silu_rows,
            (triton.cdiv(rows, height),),
            x, past, weight.contiguous(), joined, cache,
            rows, frames * pixels, kept * pixels, channels, eps,
            ROWS=height, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return joined, cache
