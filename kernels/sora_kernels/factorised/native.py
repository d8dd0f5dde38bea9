"""Temporal attention by csrc/cpu: one (position, head) at a time, read with its stride."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels import csrc
from sora_kernels.cpu_attention import outrun_by_sdpa
from sora_kernels.dispatch import Case
from sora_kernels.grids import Grid, starts_of


def unsupported(case: Case) -> str | None:
    return csrc.unsupported(case)


def outrun(case: Case) -> str | None:
    return outrun_by_sdpa(case)


def run(q: Tensor, k: Tensor, v: Tensor, grids: list[Grid], *, scale: float) -> Tensor:
    parts = []
    for start, (t, h, w) in zip(starts_of(grids), grids, strict=False):
        part = torch.empty(h * w, 6, dtype=torch.int64)
        part[:, 0] = part[:, 3] = torch.arange(start, start + h * w)
        part[:, 1] = part[:, 4] = max(1, h * w)
        part[:, 2] = part[:, 5] = t
        parts.append(part)
    spans = torch.cat(parts) if parts else torch.empty(0, 6, dtype=torch.int64)
    return torch.ops.sora.native_attention(q, k, v, spans, scale, False)[0]
