"""Packed attention by csrc/cpu: a share of the queries of one (segment, head) at a time.

SDPA spends its time on set-up where segments are a few tokens long. Of longer ones see
`cpu_attention.outrun_by_sdpa`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.attention.operands import Operands
from sora_kernels.cpu_attention import outrun_by_sdpa
from sora_kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case)


def outrun(case: Case) -> str | None:
    return outrun_by_sdpa(case)


def run(call: Operands) -> tuple[Tensor, Tensor]:
    spans = torch.ones(call.cu_seqlens_q.shape[0] - 1, 6, dtype=torch.int64)
    for column, offsets in ((0, call.cu_seqlens_q), (3, call.cu_seqlens_k)):
        spans[:, column] = offsets[:-1]
        spans[:, column + 2] = offsets.diff()
    padding: tuple[Tensor | None, ...] = (None, None, None)
    if call.padding is not None:
        padding = call.padding.key, call.padding.value, call.padding.counts.float().log()
    return torch.ops.sora.native_attention(
        call.q, call.k, call.v, spans, call.scale, call.return_lse, *padding
    )
