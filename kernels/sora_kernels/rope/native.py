"""QK normalisation and rotary embedding by csrc/cpu: one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case)


def run(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    across_heads: bool,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    norm_rope = torch.ops.sora.native_norm_rope
    q_out = norm_rope(q, q_weight, cos, sin, across_heads, interleaved, eps)
    if k is None:
        return q_out, q.new_empty(0)
    return q_out, norm_rope(k, k_weight, cos, sin, across_heads, interleaved, eps)
