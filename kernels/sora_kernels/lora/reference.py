"""Low-rank changes in plain PyTorch, one adapter after the other. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.lora.operands import Operands


def unsupported(case: Case) -> str | None:
    return None


def run(call: Operands) -> Tensor:
    wide = torch.promote_types(call.x.dtype, torch.float32)
    out = call.base.to(wide, copy=True)
    for group in call.groups:
        rows = call.x[group.start : group.stop].to(wide)
        change = (rows @ group.down.to(wide).T) @ group.up.to(wide).T
        out[group.start : group.stop] += group.scale * change
    return out.to(call.x.dtype)
