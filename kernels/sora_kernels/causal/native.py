"""Norm, SiLU, causal padding and cache by csrc/cpu: one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case)


def run(
    x: Tensor,
    past: Tensor,
    weight: Tensor | None,
    *,
    eps: float,
    bias: Tensor | None = None,
    before: int = 0,
    after: int = 0,
    keep: int | None = None,
) -> tuple[Tensor, Tensor]:
    keep = past.shape[1] if keep is None else keep
    return torch.ops.sora.native_causal_norm_silu(x, past, weight, bias, eps, before, after, keep)
