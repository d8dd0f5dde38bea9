"""GroupNorm and SiLU in plain PyTorch, at least in fp32. Differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.dispatch import Case


def unsupported(case: Case) -> str | None:
    return None


def run(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, *, eps: float, silu: bool
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = x.to(wide).unflatten(2, (groups, -1))
    centred = parts - parts.mean(dim=(1, 3), keepdim=True)
    variance = centred.square().mean(dim=(1, 3), keepdim=True)
    normed = (centred * torch.rsqrt(variance + eps)).flatten(2)
    if weight is not None:
        normed = normed * weight.to(wide)
    if bias is not None:
        normed = normed + bias.to(wide)
    return (F.silu(normed) if silu else normed).to(x.dtype)
