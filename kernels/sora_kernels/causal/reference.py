"""Norm, SiLU, causal padding and cache in plain PyTorch, at least in fp32. Differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    return None


def run(x: Tensor, past: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps)
    joined = torch.cat([past, F.silu(normed).to(x.dtype)], dim=1)
    return joined, joined[:, x.shape[1] :].clone()
