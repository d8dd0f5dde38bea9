"""Packed attention for Hopper in Gluon, after FlashAttention-3 (arXiv 2407.08608).

A persistent program has a producer warp, which brings tiles of queries, keys and values by TMA, and
two warpgroups of 64 queries each. A warpgroup issues the next block's scores before this block's
product with the values, and takes its softmax while that runs; the two take turns at issuing, so
that one's softmax runs under the other's products. The masked block of keys comes first, so the
loop has no mask.

It compiles ahead of time without spills, its source runs on an emulator (`testing/gluon`), and it
**has never run on a GPU**: it serves when asked for by name on sm_90, and `auto` does not choose
it.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads a kernel's annotations: they say constexpr, and nothing else.
from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sora_kernels.attention.items import (
    BLOCK_N,
    WIDTHS,
    clear_rows,
    decode,
    padding_scores,
    padding_sums,
    source_of,
)
from sora_kernels.attention.operands import Operands
from sora_kernels.attention.plan import plan_tiles
from sora_kernels.dispatch import Case
from sora_kernels.launch import architecture
from sora_kernels.triton_support import unsupported as no_triton

ROWS = gl.constexpr(64)  # queries of a warpgroup
STAGES = gl.constexpr(2)  # blocks of keys, and of values, in shared memory
BLOCK_M = 128
WARPS = 4  # of the default partition, which is the first warpgroup
TAKES_PLAN = True


def unsupported(case: Case) -> str | None:
    problem = no_triton(case)
    if problem is not None:
        return problem
    if case.device_type != "cuda":
        return f"Gluon has no interpreter, so it does not run on {case.device_type}"
    arch = architecture(torch.device(case.device_type, case.device_index or 0))
    if arch != 90:
        return f"it is for sm_90, and this device is sm_{arch}"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"{case.dtype}; it takes fp16 and bf16"
    if case.width not in WIDTHS:
        return f"head_dim {case.width}; it takes 64 and 128"
    return None


@gluon.jit
def _produce(
    q_source, k_source, v_source, tiles_ptr, cu_q_ptr, cu_k_ptr, items, heads, q_tiles, k_tiles,
    v_tiles, q_ready, q_free, k_ready, k_free, v_ready, v_free, WIDTH: gl.constexpr,
):  # fmt: skip
    """The producer warp. `free` barriers are first waited for in the phase before the first."""
    count = 0
    turn = 0
    tiles = items // heads
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        _, head, q_first, _, k_first, _, blocks = decode(item, tiles, tiles_ptr, cu_q_ptr, cu_k_ptr)
        column = head * WIDTH
        mbarrier.wait(q_free, (turn & 1) ^ 1)
        mbarrier.expect(q_ready, 2 * q_source.block_type.nbytes)
        tma.async_copy_global_to_shared(q_source, [q_first, column], q_ready, q_tiles.index(0))
        tma.async_copy_global_to_shared(
            q_source, [q_first + ROWS, column], q_ready, q_tiles.index(1)
        )
        for i in range(blocks):
            # From the last block, the masked one, to the first.
            row = k_first + (blocks - 1 - i) * BLOCK_N
            stage = count % STAGES
            phase = (count // STAGES) & 1
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            mbarrier.expect(k_ready.index(stage), k_source.block_type.nbytes)
            tma.async_copy_global_to_shared(
                k_source, [row, column], k_ready.index(stage), k_tiles.index(stage)
            )
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            mbarrier.expect(v_ready.index(stage), v_source.block_type.nbytes)
            tma.async_copy_global_to_shared(
                v_source, [row, column], v_ready.index(stage), v_tiles.index(stage)
            )
            count += 1
        turn += 1  # noqa: SIM113


@gluon.jit
def _consume(
    out_ptr, lse_ptr, tiles_ptr, cu_q_ptr, cu_k_ptr, padding_key_ptr, padding_value_ptr, counts_ptr,
    items, heads, scale2, q_tiles, k_tiles, v_tiles, q_ready, q_free, k_ready, k_free, v_ready,
    v_free, turns, GROUP: gl.constexpr, HAS_LSE: gl.constexpr, HAS_PADDING: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 queries of each item."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    q_tile = q_tiles.index(GROUP)
    count = 0
    turn = 0
    issued = 0
    tiles = items // heads
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        segment, head, q_first, q_last, k_first, k_last, blocks = decode(
            item, tiles, tiles_ptr, cu_q_ptr, cu_k_ptr
        )
        mbarrier.wait(q_ready, turn & 1)
        if HAS_PADDING:
            repeats = gl.load(counts_ptr + segment)
            before = padding_scores(
                q_tile, padding_key_ptr, repeats, head, scale2, out_layout, WIDTH
            )
            before = gl.convert_layout(before, rows)
        # The masked block.
        stage = count % STAGES
        phase = (count // STAGES) & 1
        mbarrier.wait(k_ready.index(stage), phase)
        zero = gl.zeros((ROWS, BLOCK_N), gl.float32, scores_layout)
        token = warpgroup_mma(
            q_tile, k_tiles.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, (token,))
        mbarrier.arrive(k_free.index(stage), count=1)
        left = k_last - k_first - (blocks - 1) * BLOCK_N
        key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
        scores = gl.where((key < left)[None, :], scores, float("-inf"))
        top = gl.max(scores, axis=1) * scale2
        seen = left > 0
        if HAS_PADDING:
            seen = seen | (repeats > 0)
            top = gl.maximum(top, before)
        # Only an item without keys has no finite top.
        top = gl.where(seen, top, 0.0)
        weights = gl.exp2(scores * scale2 - top[:, None])
        total = gl.sum(weights, axis=1)
        factors = gl.convert_layout(weights.to(dtype), weights_layout)
        mbarrier.wait(v_ready.index(stage), phase)
        if left < BLOCK_N:
            # Rows past the end are another segment's, where 0 * NaN would be NaN.
            clear_rows(v_tiles.index(stage), left, WIDTH)
        acc = gl.zeros((ROWS, WIDTH), gl.float32, out_layout)
        if HAS_PADDING:
            shrink = gl.exp2(before - top)
            total = total + shrink
            acc = padding_sums(shrink, padding_value_ptr, repeats, head, out_layout, WIDTH)
        for _ in range(1, blocks):
            next_count = count + 1
            next_stage = next_count % STAGES
            stage = count % STAGES
            mbarrier.wait(k_ready.index(next_stage), (next_count // STAGES) & 1)
            mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)
            # One warpgroup issues at a time; the first need not wait for its first turn.
            mbarrier.wait(turns.index(GROUP), (issued & 1) ^ (1 - GROUP))
            scores_token = warpgroup_mma(
                q_tile,
                k_tiles.index(next_stage).permute((1, 0)),
                zero,
                use_acc=False,
                is_async=True,
            )
            acc_token = warpgroup_mma(factors, v_tiles.index(stage), acc, is_async=True)
            mbarrier.arrive(turns.index(1 - GROUP), count=1)
            issued += 1
            scores = warpgroup_mma_wait(1, (scores_token,))
            mbarrier.arrive(k_free.index(next_stage), count=1)
            new_top = gl.maximum(top, gl.max(scores, axis=1) * scale2)
            weights = gl.exp2(scores * scale2 - new_top[:, None])
            shrink = gl.exp2(top - new_top)
            total = total * shrink + gl.sum(weights, axis=1)
            top = new_top
            acc = warpgroup_mma_wait(0, (acc_token,))
            mbarrier.arrive(v_free.index(stage), count=1)
            acc = acc * gl.convert_layout(shrink, out_rows)[:, None]
            factors = gl.convert_layout(weights.to(dtype), weights_layout)
            count = next_count
        mbarrier.arrive(q_free, count=1)
        stage = count % STAGES
        mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)
        acc_token = warpgroup_mma(factors, v_tiles.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, (acc_token,))
        mbarrier.arrive(v_free.index(stage), count=1)
        count += 1
        turn += 1  # noqa: SIM113
        inverse = gl.where(total > 0, 1.0 / total, 0.0)
        acc = acc * gl.convert_layout(inverse, out_rows)[:, None]
        row = q_first + GROUP * ROWS + gl.arange(0, ROWS, out_rows)
        column = gl.arange(0, WIDTH, gl.SliceLayout(0, out_layout))
        at = (row[:, None].to(gl.int64) * heads + head) * WIDTH + column[None, :]
        gl.store(out_ptr + at, acc.to(dtype), mask=(row < q_last)[:, None])
        if HAS_LSE:
            row = q_first + GROUP * ROWS + gl.arange(0, ROWS, rows)
            lse = (top + gl.log2(total)) * 0.6931471805599453
            lse = gl.where(total > 0, lse, float("-inf"))
            gl.store(lse_ptr + row.to(gl.int64) * heads + head, lse, mask=row < q_last)


@gluon.jit(do_not_specialize=["items"])
def hopper_attention_kernel(
    q_source,
    k_source,
    v_source,
    out_ptr,
    lse_ptr,
    tiles_ptr,
    cu_q_ptr,
    cu_k_ptr,
    padding_key_ptr,
    padding_value_ptr,
    counts_ptr,
    items,
    heads,
    scale2,
    HAS_LSE: gl.constexpr,
    HAS_PADDING: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """Persistent grid. Sources are 2-D descriptors `[tokens, heads * head_dim]`."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    q_tiles = gl.allocate_shared_memory(dtype, [2, ROWS, WIDTH], q_source.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, WIDTH], k_source.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, WIDTH], v_source.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    out_ptr, lse_ptr, tiles_ptr, cu_q_ptr, cu_k_ptr, padding_key_ptr,
                    padding_value_ptr, counts_ptr, items, heads, scale2, q_tiles, k_tiles, v_tiles,
                    q_ready, q_free, k_ready, k_free, v_ready, v_free, turns, gl.constexpr(0),
                    HAS_LSE, HAS_PADDING, WIDTH,
                ),
            ),
            (
                _consume,
                (
                    out_ptr, lse_ptr, tiles_ptr, cu_q_ptr, cu_k_ptr, padding_key_ptr,
                    padding_value_ptr, counts_ptr, items, heads, scale2, q_tiles, k_tiles, v_tiles,
                    q_ready, q_free, k_ready, k_free, v_ready, v_free, turns, gl.constexpr(1),
                    HAS_LSE, HAS_PADDING, WIDTH,
                ),
            ),
            (
                _produce,
                (
                    q_source, k_source, v_source, tiles_ptr, cu_q_ptr, cu_k_ptr, items, heads,
                    q_tiles, k_tiles, v_tiles, q_ready, q_free, k_ready, k_free, v_ready, v_free,
                    WIDTH,
                ),
            ),
        ],
        [4, 1],  # warps, and registers of a thread, of the second warpgroup and the producer
        [240, 24],
    )  # fmt: skip


def run(call: Operands) -> tuple[Tensor, Tensor]:
    q, k, v, tiles = call.q, call.k, call.v, call.tiles
    tokens, heads, head_dim = q.shape
    if tokens == 0 or (k.shape[0] == 0 and call.padding is None):
        return call.without_keys()
    if k.shape[0] == 0:  # a descriptor has rows: these are no segment's
        k, v = q[:1], q[:1]
    lse = call.lse()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # A plan for the portable kernel has the same tiles where its block is 128 too.
    if tiles is None or call.block != BLOCK_M:
        tiles = plan_tiles(call.cu_seqlens_q, tokens, BLOCK_M)
    items = tiles.shape[0] * heads
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    hopper_attention_kernel[(min(items, processors),)](
        source_of(q, ROWS.value),
        source_of(k, BLOCK_N.value),
        source_of(v, BLOCK_N.value),
        out,
        lse,
        tiles,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        *call.padding_parts(out),
        items,
        heads,
        call.scale * math.log2(math.e),
        HAS_LSE=call.return_lse,
        HAS_PADDING=call.padding is not None,
        WIDTH=head_dim,
        num_warps=WARPS,
    )
    return out, lse
