"""GroupNorm and SiLU by csrc/cpu: one pass over memory for the moments, and one for the result."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case)


def run(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, *, eps: float, silu: bool
) -> Tensor:
    return torch.ops.sora.native_group_norm(x, groups, weight, bias, eps, silu)
