"""Work items of the Gluon kernels of packed attention: their tiles by TMA, padding, cleared rows.

A persistent program takes work items in turn: an item is a tile of queries of one head, and blocks
of its segment's keys come from the last, which may be masked, to the first.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations: they say constexpr, and nothing else.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

BLOCK_N = gl.constexpr(128)  # keys a block
WIDTHS = (64, 128)


@gluon.jit
def decode(item, tiles, tiles_ptr, cu_q_ptr, cu_k_ptr):
    """Segment, head, first and last query, first and last key of a work item; no query where the
    table is filled up.

    Items go through the tiles of one head before the next head's. The programs that run at a time
    then share one or two heads' keys and values, which stay in the second-level cache. With heads
    fastest they would share none: `sora_kernels.testing.gluon.traffic` counts it.
    """
    head = item // tiles
    tile = item % tiles
    segment = gl.load(tiles_ptr + 2 * tile)
    start = gl.load(tiles_ptr + 2 * tile + 1)
    live = segment >= 0
    segment = gl.maximum(segment, 0)
    q_first = gl.load(cu_q_ptr + segment).to(gl.int32) + start
    q_last = gl.load(cu_q_ptr + segment + 1).to(gl.int32)
    k_first = gl.load(cu_k_ptr + segment).to(gl.int32)
    k_last = gl.load(cu_k_ptr + segment + 1).to(gl.int32)
    q_last = gl.where(live, q_last, q_first)
    # At least one block, all of it masked where there are no keys, keeps the barriers in step.
    blocks = gl.maximum((k_last - k_first + BLOCK_N - 1) // BLOCK_N, 1)
    return segment, head, q_first, q_last, k_first, k_last, blocks


@gluon.jit
def _of_padding(pointer, repeats, head, layout: gl.constexpr, WIDTH: gl.constexpr):
    """Its key or value in fp32; 0, and nothing read, where it counts for nothing."""
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    counted = column < gl.where(repeats > 0, WIDTH, 0)
    return gl.load(pointer + head * WIDTH + column, mask=counted, other=0.0).to(gl.float32)


@gluon.jit
def padding_scores(
    q_tile, padding_key_ptr, repeats, head, scale2, layout: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Padding's score of each query, in powers of two; -inf where it counts for nothing.

    It is the top that the running softmax begins with: one key, as often as it counts.
    """
    key = _of_padding(padding_key_ptr, repeats, head, layout, WIDTH)
    scores = gl.sum(q_tile.load(layout).to(gl.float32) * key[None, :], axis=1) * scale2
    log_count = gl.log2(gl.maximum(repeats, 1).to(gl.float32))
    return scores + gl.where(repeats > 0, log_count, float("-inf"))


@gluon.jit
def padding_sums(
    weights, padding_value_ptr, repeats, head, layout: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """The weighted value of padding: what the sum over values begins with."""
    value = _of_padding(padding_value_ptr, repeats, head, layout, WIDTH)
    return gl.convert_layout(weights, gl.SliceLayout(1, layout))[:, None] * value[None, :]


@gluon.jit
def clear_rows(tile, left, WIDTH: gl.constexpr):
    """Zero in rows `left` and on of a block of values, 16 rows at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    row = gl.arange(0, 16, gl.SliceLayout(1, layout))
    for first in gl.static_range(0, BLOCK_N, 16):
        if left < first + 16:
            part = tile.slice(first, 16)
            values = part.load(layout)
            part.store(gl.where((row + first < left)[:, None], values, 0.0).to(tile.dtype))
    fence_async_shared()


def shared_layout() -> Any:
    """Of tiles of 16-bit elements at least 64 wide."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def source_of(tensor: Tensor, rows: int) -> Any:
    """A descriptor of `[tokens, heads, head_dim]` as `[tokens, heads * head_dim]`, by boxes of one
    head. The tensor is copied where its heads do not lie side by side in rows that TMA can address.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    fits = (
        tensor.stride(2) == 1
        and tensor.stride(1) == tensor.shape[2]
        and tensor.stride(0) % 8 == 0
        and tensor.data_ptr() % 16 == 0
    )
    if not fits:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    tokens, heads, head_dim = tensor.shape
    flat = [tokens, heads * head_dim]
    return TensorDescriptor(tensor, flat, [tensor.stride(0), 1], [rows, head_dim], shared_layout())
