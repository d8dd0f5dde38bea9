"""QK normalisation and rotary embedding by csrc: one pass over memory. On the CPU, csrc/cpu."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case
from sora_kernels.rope.operands import Operands


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case)


def run(call: Operands) -> tuple[Tensor, Tensor]:
    rotation = call.cos, call.sin, call.across_heads, call.interleaved, call.eps
    return call.each(lambda x, weight: torch.ops.sora.native_norm_rope(x, weight, *rotation))
