"""`plan_attention`: tile tables and block lists, made once for many layers and steps.

A flat table of query tiles lets no kernel search for its segment.
Searching is what made 8,192 segments of 34 tokens 73 times slower than the dense case in a kernel
that scans segments (flash-attention issue 2520).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from sora_kernels import checks
from sora_kernels.dispatch import OPS, Case
from sora_kernels.grids import Grid, check_grids, flatten
from sora_kernels.launch import architecture, find_or_raise
from sora_kernels.windowed.plan import BlockPlan, build, build_cached, check_masks, check_window


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Query tiles of one packed batch; it serves every layer and step with the same offsets.

    tiles: int32 `[tiles, 2]`, each the segment and the first query in it; a segment of -1 is
    padding. block: queries a tile.
    """

    tiles: Tensor
    block: int


def padded_width(head_dim: int) -> int:
    """head_dim rounded up to a power of two, 16 at least (the smallest matrix product)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def plan_tiles(cu_seqlens: Tensor, num_tokens: int, block: int) -> Tensor:
    """The tile table, made where `cu_seqlens` is and without waiting for it.

    The number of tiles is not known on the host, but at most `num_tokens / block + segments`, so
    the table has that many rows, the last of which may be padding.
    """
    segments = cu_seqlens.shape[0] - 1
    bound = num_tokens // block + segments
    counts = (cu_seqlens.diff() + (block - 1)) // block
    ends = counts.cumsum(0)
    tile = torch.arange(bound, device=cu_seqlens.device)
    if segments == 0:
        return torch.empty(0, 2, dtype=torch.int32, device=cu_seqlens.device)
    segment = torch.searchsorted(ends, tile, right=True)
    live = segment < segments
    segment = segment.clamp(max=segments - 1)
    start = (tile - (ends - counts)[segment]) * block
    table = torch.stack((torch.where(live, segment, -1), start), dim=1)
    return table.to(torch.int32)


@overload
def plan_attention(
    cu_seqlens_q: Tensor,
    *,
    num_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    backend: str = "auto",
) -> AttentionPlan: ...


@overload
def plan_attention(
    cu_seqlens_q: Tensor,
    *,
    num_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    grids: Sequence[Sequence[int]],
    window: Sequence[int] = (-1, -1, -1),
    key_grids: Sequence[Sequence[int]] | None = None,
    origins: Sequence[Sequence[int]] | None = None,
    masks: Tensor | Sequence[Tensor] | None = None,
    cell: Sequence[int] = (1, -1, -1),
) -> BlockPlan: ...


def plan_attention(
    cu_seqlens_q: Tensor,
    *,
    num_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    grids: Sequence[Sequence[int]] | None = None,
    window: Sequence[int] = (-1, -1, -1),
    key_grids: Sequence[Sequence[int]] | None = None,
    origins: Sequence[Sequence[int]] | None = None,
    masks: Tensor | Sequence[Tensor] | None = None,
    cell: Sequence[int] = (1, -1, -1),
    backend: str = "auto",
) -> AttentionPlan | BlockPlan:
    """Plan attention once for many calls with the same offsets.

    cu_seqlens_q: int32 or int64 `[segments + 1]`, on the device of the calls; num_tokens: the
    number of queries. Without `grids` the plan is `packed_attention`'s, by the `backend` of its
    calls: calls without one make one each time, which costs a few small kernels.

    With `grids` (frames, rows and columns of each segment) it is `windowed_attention`'s, for its
    `window`, `key_grids` and `origins`. `masks` narrow the window further: for each segment (or one
    for all) bool `[cells of queries, cells of keys]`, true where the keys of one cell are seen by
    the queries of another. `cell` is a cell's extent in frames, rows and columns, -1 for a whole
    axis; cells are counted from each grid's own first token, the columns fastest. By default a
    cell is a frame, so a mask says which frames see which: a window of frames with the first
    frame and key frames beside it, say. Only pairs of tiles in which something is seen cost time.

    Raises ValueError for offsets (read on the CPU alone), grids, windows and masks that do not fit.
    """
    op = "plan_attention"
    checks.check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q)
    offsets = cu_seqlens_q.tolist() if cu_seqlens_q.device.type == "cpu" else None
    if offsets is not None:
        checks.check_offsets(op, "cu_seqlens_q", offsets, num_tokens, num_tokens)
    if not 1 <= head_dim <= checks.MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim {head_dim}; 1 to {checks.MAX_HEAD_DIM} is supported")
    arch, width = architecture(cu_seqlens_q.device), padded_width(head_dim)
    if grids is None:
        block = _tile_of(backend, cu_seqlens_q.device, dtype, head_dim)
        return AttentionPlan(plan_tiles(cu_seqlens_q, num_tokens, block), block)
    queries = check_grids(op, "grids", flatten(op, grids), offsets)
    keys = queries if key_grids is None else check_grids(op, "key_grids", flatten(op, key_grids))
    starts: list[Grid] = [(0, 0, 0)] * len(queries)
    if origins is not None:
        starts = check_grids(op, "origins", flatten(op, origins))
    if not len(queries) == len(keys) == len(starts):
        raise ValueError(
            f"{op}: {len(queries)} grids, {len(keys)} key_grids, {len(starts)} origins; "
            "they must be as many"
        )
    reach = check_window(op, window)
    tile = find_or_raise("windowed_attention", arch, dtype, width).tokens
    place = tuple(queries), tuple(keys), tuple(starts), reach, tile, cu_seqlens_q.device
    if masks is None:
        return build_cached(*place)
    checked = check_masks(masks, queries, keys, cell)
    return build(*place, checked, (cell[0], cell[1], cell[2]))


def _tile_of(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """Queries a tile: of a kernel that has one size, or of the portable one by the launch table."""
    if device.type == "cuda":
        case = Case(device.type, device.index, dtype, head_dim)
        kernel = OPS["packed_attention"].resolve(backend, case)
        if hasattr(kernel, "BLOCK_M"):
            return int(kernel.BLOCK_M)
    arch, width = architecture(device), padded_width(head_dim)
    return int(find_or_raise("packed_attention", arch, dtype, width).block_m)
