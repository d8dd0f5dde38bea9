"""Temporal attention by torch's SDPA on strided views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.factorised.reference import time_last
from sora_kernels.grids import Grid, starts_of


def unsupported(case: Case) -> str | None:
    return "SDPA is kept to fp32, fp16 and bf16" if case.dtype == torch.float64 else None


def run(q: Tensor, k: Tensor, v: Tensor, grids: list[Grid], *, scale: float) -> Tensor:
    if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for start, grid in zip(starts_of(grids), grids, strict=False):
        if grid[0] * grid[1] * grid[2] == 0:
            continue
        result = F.scaled_dot_product_attention(
            time_last(q, start, grid),
            time_last(k, start, grid),
            time_last(v, start, grid),
            scale=scale,
        )
        time_last(out, start, grid).copy_(result)
    return out
