"""A flat table of query tiles, so that no kernel searches for its segment.

Searching is what made 8,192 segments of 34 tokens 73 times slower than the dense case in a kernel
that scans segments (flash-attention issue 2520).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sora_kernels.launch import architecture, attention_launch


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


def plan_attention(
    cu_seqlens_q: Tensor,
    *,
    num_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
) -> AttentionPlan:
    """Plan packed attention once for many calls with the same offsets.

    cu_seqlens_q: int32 or int64 `[segments + 1]`; num_tokens: the number of queries. Calls without
    a plan make one each time, which costs a few small kernels. Raises ValueError for offsets that
    are no offsets (read on the CPU alone).
    """
    from sora_kernels import checks

    checks.check_cu_seqlens("plan_attention", "cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_q.device.type == "cpu":
        checks.check_offsets(
            "plan_attention", "cu_seqlens_q", cu_seqlens_q.tolist(), num_tokens, num_tokens
        )
    launch = attention_launch(architecture(cu_seqlens_q.device), dtype, padded_width(head_dim))
    return AttentionPlan(plan_tiles(cu_seqlens_q, num_tokens, launch.block_m), launch.block_m)
