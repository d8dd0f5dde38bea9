"""Packed attention for Blackwell in Gluon, after FlashAttention-4's division of work.

A persistent program has two softmax groups of 128 queries each, a warp that issues products and a
warp that brings tiles by TMA. Scores and sums lie in tensor memory. A group turns its scores into
weights where they lie, for the product with the values, and scales its sum there; the warp of
products serves the two groups in turn, so that one's softmax runs under the other's products. The
masked block of keys comes first, so the loop has no mask. A sum is scaled in blocks alone in which
a score rises far above what its row has met: weights of up to 256 are as exact as those below 1.

It compiles ahead of time without spills, its source runs on an emulator (`testing/gluon`), and it
**has never run on a GPU**: it serves when asked for by name on sm_100, and `auto` does not choose
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
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    get_tmem_reg_layout,
    mbarrier,
    tcgen05_commit,
    tcgen05_mma,
    tma,
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

ROWS = gl.constexpr(128)  # queries of a softmax group
STAGES = gl.constexpr(2)  # blocks of keys, and of values, in shared memory
RISE = gl.constexpr(8.0)
"""How far scores may pass a row's top, in powers of two, before its sum is scaled to a new one."""
BLOCK_M = 256
TAKES_PLAN = True
WARPS = 4  # of the default partition, which is the first softmax group


def unsupported(case: Case) -> str | None:
    problem = no_triton(case)
    if problem is not None:
        return problem
    if case.device_type != "cuda":
        return f"Gluon has no interpreter, so it does not run on {case.device_type}"
    arch = architecture(torch.device(case.device_type, case.device_index or 0))
    if arch != 100:
        return f"it is for sm_100, and this device is sm_{arch}"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"{case.dtype}; it takes fp16 and bf16"
    if case.width not in WIDTHS:
        return f"head_dim {case.width}; it takes 64 and 128"
    return None


@gluon.jit
def _bring(
    q_source, k_source, v_source, tiles_ptr, cu_q_ptr, cu_k_ptr, items, heads, q_tiles, k_tiles,
    v_tiles, q_ready, q_free, k_ready, k_free, v_ready, v_free, WIDTH: gl.constexpr,
):  # fmt: skip
    """The warp of copies. `free` barriers are first waited for in the phase before the first."""
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
def weights_in(scores, dtype: gl.constexpr):
    """Where a group's weights lie: in the place of its scores, two to a column."""
    layout: gl.constexpr = TensorMemoryLayout((ROWS, BLOCK_N), col_stride=1)
    return scores._reinterpret(dtype, [ROWS, BLOCK_N], layout)


@gluon.jit
def _multiply(
    tiles_ptr, cu_q_ptr, cu_k_ptr, items, heads, q_tiles, k_tiles, v_tiles, scores, sums, q_ready,
    q_free, k_ready, k_free, v_ready, v_free, s_ready, p_ready, o_ready, HAS_PADDING: gl.constexpr,
):  # fmt: skip
    """The warp of products. They take place in the order of their issue, so a group's next scores
    may be issued while its weights, in whose place they come, are still read; and whoever waits for
    scores knows that the product before them has ended too."""
    count = 0
    turn = 0
    issued = 0
    tiles = items // heads
    dtype: gl.constexpr = v_tiles.dtype
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        _, _, _, _, _, _, blocks = decode(item, tiles, tiles_ptr, cu_q_ptr, cu_k_ptr)
        mbarrier.wait(q_ready, turn & 1)
        stage = count % STAGES
        mbarrier.wait(k_ready.index(stage), (count // STAGES) & 1)
        for group in gl.static_range(2):
            tcgen05_mma(
                q_tiles.index(group), k_tiles.index(stage).permute((1, 0)), scores.index(group),
                use_acc=False, mbarriers=[s_ready.index(group), k_free.index(stage)],
            )  # fmt: skip
        for i in range(1, blocks):
            next_count = count + 1
            stage = count % STAGES
            next_stage = next_count % STAGES
            mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)
            mbarrier.wait(k_ready.index(next_stage), (next_count // STAGES) & 1)
            for group in gl.static_range(2):
                mbarrier.wait(p_ready.index(group), issued & 1)
                tcgen05_mma(
                    weights_in(scores.index(group), dtype), v_tiles.index(stage),
                    sums.index(group), use_acc=(i > 1) | HAS_PADDING,
                    mbarriers=[v_free.index(stage)],
                )  # fmt: skip
                tcgen05_mma(
                    q_tiles.index(group), k_tiles.index(next_stage).permute((1, 0)),
                    scores.index(group), use_acc=False,
                    mbarriers=[s_ready.index(group), k_free.index(next_stage)],
                )  # fmt: skip
            issued += 1
            count = next_count
        tcgen05_commit(q_free)
        stage = count % STAGES
        mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)
        for group in gl.static_range(2):
            mbarrier.wait(p_ready.index(group), issued & 1)
            tcgen05_mma(
                weights_in(scores.index(group), dtype), v_tiles.index(stage), sums.index(group),
                use_acc=(blocks > 1) | HAS_PADDING,
                mbarriers=[o_ready.index(group), v_free.index(stage)],
            )  # fmt: skip
        issued += 1
        count += 1
        turn += 1  # noqa: SIM113


@gluon.jit
def _soften(
    out_ptr, lse_ptr, tiles_ptr, cu_q_ptr, cu_k_ptr, padding_key_ptr, padding_value_ptr, counts_ptr,
    items, heads, scale2, q_tiles, v_tiles, scores, sums, q_ready, q_free, v_ready, s_ready,
    p_ready, o_ready, GROUP: gl.constexpr, HAS_LSE: gl.constexpr, HAS_PADDING: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """A softmax group: 128 queries of each item, a row a thread."""
    s_tile = scores.index(GROUP)
    o_tile = sums.index(GROUP)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    p_tile = weights_in(s_tile, dtype)
    s_layout: gl.constexpr = get_tmem_reg_layout(gl.float32, (ROWS, BLOCK_N), scores.layout, 4)
    p_layout: gl.constexpr = get_tmem_reg_layout(dtype, (ROWS, BLOCK_N), p_tile.layout, 4)
    o_layout: gl.constexpr = get_tmem_reg_layout(gl.float32, (ROWS, WIDTH), sums.layout, 4)
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    count = 0
    turn = 0
    issued = 0
    tiles = items // heads
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        segment, head, q_first, q_last, k_first, k_last, blocks = decode(
            item, tiles, tiles_ptr, cu_q_ptr, cu_k_ptr
        )
        if HAS_PADDING:
            mbarrier.wait(q_ready, turn & 1)
            repeats = gl.load(counts_ptr + segment)
            before = padding_scores(
                q_tiles.index(GROUP), padding_key_ptr, repeats, head, scale2, q_layout, WIDTH
            )
            before = gl.convert_layout(before, rows)
            mbarrier.arrive(q_free, count=1)
        # The masked block.
        mbarrier.wait(s_ready.index(GROUP), issued & 1)
        weights = s_tile.load(s_layout)
        left = k_last - k_first - (blocks - 1) * BLOCK_N
        key = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
        weights = gl.where((key < left)[None, :], weights, float("-inf"))
        top = gl.max(weights, axis=1) * scale2
        seen = left > 0
        if HAS_PADDING:
            seen = seen | (repeats > 0)
            top = gl.maximum(top, before)
        # Only an item without keys has no finite top.
        top = gl.where(seen, top, 0.0)
        weights = gl.exp2(weights * scale2 - top[:, None])
        total = gl.sum(weights, axis=1)
        p_tile.store(gl.convert_layout(weights.to(dtype), p_layout))
        if HAS_PADDING:
            shrink = gl.exp2(before - top)
            total = total + shrink
            o_tile.store(padding_sums(shrink, padding_value_ptr, repeats, head, o_layout, WIDTH))
        if GROUP == 0:  # noqa: SIM102
            # For both groups, as the second's product comes behind the first's. Rows past the end
            # are another segment's, where 0 * NaN would be NaN.
            if left < BLOCK_N:
                stage = count % STAGES
                mbarrier.wait(v_ready.index(stage), (count // STAGES) & 1)
                clear_rows(v_tiles.index(stage), left, WIDTH)
        mbarrier.arrive(p_ready.index(GROUP), count=1)
        issued += 1
        for _ in range(1, blocks):
            mbarrier.wait(s_ready.index(GROUP), issued & 1)
            weights = s_tile.load(s_layout)
            new_top = gl.max(weights, axis=1) * scale2
            new_top = gl.where(new_top > top + RISE, new_top, top)
            weights = gl.exp2(weights * scale2 - new_top[:, None])
            shrink = gl.exp2(top - new_top)
            total = total * shrink + gl.sum(weights, axis=1)
            top = new_top
            p_tile.store(gl.convert_layout(weights.to(dtype), p_layout))
            if gl.min(shrink, axis=0) < 1.0:
                acc = o_tile.load(o_layout)
                o_tile.store(acc * gl.convert_layout(shrink, out_rows)[:, None])
            mbarrier.arrive(p_ready.index(GROUP), count=1)
            issued += 1
        mbarrier.wait(o_ready.index(GROUP), turn & 1)
        count += blocks
        turn += 1  # noqa: SIM113
        acc = o_tile.load(o_layout)
        inverse = gl.where(total > 0, 1.0 / total, 0.0)
        acc = acc * gl.convert_layout(inverse, out_rows)[:, None]
        row = q_first + GROUP * ROWS + gl.arange(0, ROWS, out_rows)
        column = gl.arange(0, WIDTH, gl.SliceLayout(0, o_layout))
        at = (row[:, None].to(gl.int64) * heads + head) * WIDTH + column[None, :]
        gl.store(out_ptr + at, acc.to(dtype), mask=(row < q_last)[:, None])
        if HAS_LSE:
            row = q_first + GROUP * ROWS + gl.arange(0, ROWS, rows)
            lse = (top + gl.log2(total)) * 0.6931471805599453
            lse = gl.where(total > 0, lse, float("-inf"))
            gl.store(lse_ptr + row.to(gl.int64) * heads + head, lse, mask=row < q_last)


@gluon.jit(do_not_specialize=["items"])
def blackwell_attention_kernel(
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
    s_layout: gl.constexpr = TensorMemoryLayout((ROWS, BLOCK_N), col_stride=1)
    o_layout: gl.constexpr = TensorMemoryLayout((ROWS, WIDTH), col_stride=1)
    scores = allocate_tensor_memory(gl.float32, [2, ROWS, BLOCK_N], s_layout)
    sums = allocate_tensor_memory(gl.float32, [2, ROWS, WIDTH], o_layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    s_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)  # scores
    p_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)  # weights, and the scaled sum
    o_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)  # the sum, once it is whole
    mbarrier.init(q_ready, count=1)
    if HAS_PADDING:
        mbarrier.init(q_free, count=3)  # softmax groups read queries too
    else:
        mbarrier.init(q_free, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(s_ready.index(i), count=1)
        mbarrier.init(p_ready.index(i), count=1)
        mbarrier.init(o_ready.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _soften,
                (
                    out_ptr, lse_ptr, tiles_ptr, cu_q_ptr, cu_k_ptr, padding_key_ptr,
                    padding_value_ptr, counts_ptr, items, heads, scale2, q_tiles, v_tiles, scores,
                    sums, q_ready, q_free, v_ready, s_ready, p_ready, o_ready, gl.constexpr(0),
                    HAS_LSE, HAS_PADDING, WIDTH,
                ),
            ),
            (
                _soften,
                (
                    out_ptr, lse_ptr, tiles_ptr, cu_q_ptr, cu_k_ptr, padding_key_ptr,
                    padding_value_ptr, counts_ptr, items, heads, scale2, q_tiles, v_tiles, scores,
                    sums, q_ready, q_free, v_ready, s_ready, p_ready, o_ready, gl.constexpr(1),
                    HAS_LSE, HAS_PADDING, WIDTH,
                ),
            ),
            (
                _multiply,
                (
                    tiles_ptr, cu_q_ptr, cu_k_ptr, items, heads, q_tiles, k_tiles, v_tiles, scores,
                    sums, q_ready, q_free, k_ready, k_free, v_ready, v_free, s_ready, p_ready,
                    o_ready, HAS_PADDING,
                ),
            ),
            (
                _bring,
                (
                    q_source, k_source, v_source, tiles_ptr, cu_q_ptr, cu_k_ptr, items, heads,
                    q_tiles, k_tiles, v_tiles, q_ready, q_free, k_ready, k_free, v_ready, v_free,
                    WIDTH,
                ),
            ),
        ],
        [4, 1, 1],  # warps, and registers of a thread, of the partitions behind the first
        [216, 40, 24],
    )  # fmt: skip


def run(call: Operands) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    tokens, heads, head_dim = q.shape
    if tokens == 0 or (k.shape[0] == 0 and call.padding is None):
        return call.without_keys()
    if k.shape[0] == 0:  # a descriptor has rows: these are no segment's
        k, v = q[:1], q[:1]
    lse = call.lse()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tiles = call.tiles
    if tiles is None or call.block != BLOCK_M:
        tiles = plan_tiles(call.cu_seqlens_q, tokens, BLOCK_M)
    items = tiles.shape[0] * heads
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    blackwell_attention_kernel[(min(items, processors),)](
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
