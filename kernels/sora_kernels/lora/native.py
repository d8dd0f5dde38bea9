"""Low-rank changes by csrc/cpu: one pass over the rows, for all adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case
from sora_kernels.lora.operands import Operands


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case)


def run(call: Operands) -> Tensor:
    return torch.ops.sora.native_lora_linear(
        call.x, call.base, call.down, call.up, call.rows, call.scale
    )
