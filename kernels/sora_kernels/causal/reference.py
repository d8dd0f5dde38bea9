"""Norm, SiLU, causal padding and cache in plain PyTorch, at least in fp32. Differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    return None


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
    wide = torch.promote_types(x.dtype, torch.float32)
    gain = None if weight is None else weight.to(wide)
    normed = F.rms_norm(x.to(wide), x.shape[-1:], gain, eps)
    if bias is not None:
        normed = normed + bias.to(wide)
    joined = torch.cat([past, F.silu(normed).to(x.dtype)], dim=1)
    if before or after:
        first, last = joined[:, :1], joined[:, -1:]
        around = first.expand(-1, before, -1, -1), last.expand(-1, after, -1, -1)
        joined = torch.cat([around[0], joined, around[1]], dim=1)
    return joined, joined[:, joined.shape[1] - keep :].clone()
