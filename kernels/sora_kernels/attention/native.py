"""Packed attention over short segments by csrc/cpu: one (segment, head) at a time in the cache.

SDPA spends its time on set-up where segments are a few tokens long; above `api.SHORT` tokens
its blocked kernel wins and this one does not serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.attention.operands import Operands
from sora_kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    if "short" not in case.traits:
        return "it serves short segments alone (64 tokens)"
    return csrc.unsupported(case)


def run(call: Operands) -> tuple[Tensor, Tensor]:
    spans = torch.ones(call.cu_seqlens_q.shape[0] - 1, 6, dtype=torch.int64)
    for column, offsets in ((0, call.cu_seqlens_q), (3, call.cu_seqlens_k)):
        spans[:, column] = offsets[:-1]
        spans[:, column + 2] = offsets.diff()
    return torch.ops.sora.native_short_attention(
        call.q, call.k, call.v, spans, call.scale, call.return_lse
    )
