"""Temporal attention as a Triton kernel: many short sequences a tile, read in place.

A tile holds `SEQUENCES` positions of `FRAMES` frames (a power of two that holds the video's), so
its scores are one product of which the block diagonal counts. Longer videos take several tiles a
position and walk over blocks of keys.
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
from sora_kernels.grids import Grid, starts_of
from sora_kernels.launch import architecture, find, find_or_raise
from sora_kernels.replay import launch as launch_kernel
from sora_kernels.triton_support import dense_rows
from sora_kernels.triton_support import unsupported as no_triton


def unsupported(case: Case) -> str | None:
    problem = no_triton(case)
    if problem is not None:
        return problem
    arch = architecture(torch.device(case.device_type, case.device_index or 0))
    if find("temporal_attention", arch, case.dtype, padded_width(case.width)) is None:
        return f"{case.dtype} head_dim {case.width} spills registers on sm_{arch}"
    return None


@triton.jit(do_not_specialize=["first_token", "frames", "positions"])
def temporal_attention_kernel(
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
    first_token,
    frames,
    positions,
    heads,
    head_dim,
    scale2,
    PRECISION: tl.constexpr,
    FRAMES: tl.constexpr,
    SEQUENCES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Grid: (tiles of positions and frames, heads). A tile is SEQUENCES x FRAMES tokens."""
    head = tl.program_id(1)
    frame_tiles = tl.cdiv(frames, FRAMES)
    position_tile = tl.program_id(0) // frame_tiles
    frame_tile = tl.program_id(0) % frame_tiles
    row = tl.arange(0, SEQUENCES * FRAMES)
    sequence = row // FRAMES
    position = position_tile * SEQUENCES + sequence
    frame = frame_tile * FRAMES + row % FRAMES
    token = (first_token + frame * positions + position).to(tl.int64)
    live = (frame < frames) & (position < positions)
    column = tl.arange(0, WIDTH)
    wide = (column < head_dim)[None, :]
    at = token[:, None] * q_stride + head * q_head_stride + column[None, :]
    q = tl.load(q_ptr + at, mask=live[:, None] & wide, other=0.0)
    acc = tl.zeros((SEQUENCES * FRAMES, WIDTH), tl.float32)
    total = tl.zeros((SEQUENCES * FRAMES,), tl.float32)
    top = tl.full((SEQUENCES * FRAMES,), float("-inf"), tl.float32)
    for start in tl.range(0, frames, FRAMES):
        key_frame = start + row % FRAMES
        key = (first_token + key_frame * positions + position).to(tl.int64)
        key_live = (key_frame < frames) & (position < positions)
        mask = key_live[:, None] & wide
        at = key[:, None] * k_stride + head * k_head_stride + column[None, :]
        k = tl.load(k_ptr + at, mask=mask, other=0.0)
        at = key[:, None] * v_stride + head * v_head_stride + column[None, :]
        v = tl.load(v_ptr + at, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        # Rows of positions past the last see the (zero) keys of their own, so that none is empty.
        seen = (sequence[:, None] == sequence[None, :]) & (key_frame < frames)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale2)
        weights = tl.exp2(scores * scale2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    out = acc * (1.0 / total)[:, None]
    at = (token[:, None] * heads + head) * head_dim + column[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=live[:, None] & wide)


def run(q: Tensor, k: Tensor, v: Tensor, grids: list[Grid], *, scale: float) -> Tensor:
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _, heads, head_dim = q.shape
    width = padded_width(head_dim)
    tile, warps, stages = find_or_raise(
        "temporal_attention", architecture(q.device), q.dtype, width
    )
    for start, (t, h, w) in zip(starts_of(grids), grids, strict=False):
        if t * h * w == 0:
            continue
        frames = min(tile, triton.next_power_of_2(t))
        sequences = tile // frames
        count = triton.cdiv(h * w, sequences) * triton.cdiv(t, frames)
        launch_kernel(
            temporal_attention_kernel,
            (count, heads),
            q,
            k,
            v,
            out,
            *(x.stride(0) for x in (q, k, v)),
            *(x.stride(1) for x in (q, k, v)),
            start,
            t,
            h * w,
            heads,
            head_dim,
            scale * math.log2(math.e),
            PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
            FRAMES=frames,
            SEQUENCES=sequences,
            WIDTH=width,
            num_warps=warps,
            num_stages=stages,
        )
    return out
