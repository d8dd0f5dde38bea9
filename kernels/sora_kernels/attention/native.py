"""Packed attention over short segments by csrc/cpu: one (segment, head) at a time in the cache.

SDPA spends its time on set-up where segments are a few tokens long; above `api.SHORT` tokens
its blocked kernel wins and this one does not serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    if "short" not in case.traits:
        return "it serves short segments alone (64 tokens)"
    return csrc.unsupported(case)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    return_lse: bool,
    q_offsets: list[int] | None,
    k_offsets: list[int] | None,
    tiles: Tensor | None = None,
    block: int = 0,
) -> tuple[Tensor, Tensor]:
    spans = torch.ones(cu_seqlens_q.shape[0] - 1, 6, dtype=torch.int64)
    for column, offsets in ((0, cu_seqlens_q), (3, cu_seqlens_k)):
        spans[:, column] = offsets[:-1]
        spans[:, column + 2] = offsets.diff()
    out, lse = torch.ops.sora.native_short_attention(q, k, v, spans, scale, return_lse)
    return out, lse if return_lse else lse.new_empty(0)
