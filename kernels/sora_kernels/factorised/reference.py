"""Temporal attention in plain PyTorch, on views with time beside head_dim. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels.attention.reference import attend
from sora_kernels.dispatch import Case
from sora_kernels.grids import Grid, starts_of


def unsupported(case: Case) -> str | None:
    return None


def time_last(tensor: Tensor, start: int, grid: Grid) -> Tensor:
    """A segment of `[tokens, heads, head_dim]` as a view `[positions, heads, frames, head_dim]`."""
    t, h, w = grid
    return tensor.narrow(0, start, t * h * w).unflatten(0, (t, h * w)).permute(1, 2, 0, 3)


def run(q: Tensor, k: Tensor, v: Tensor, grids: list[Grid], *, scale: float) -> Tensor:
    parts = [q.new_empty(0, *q.shape[1:])]
    for start, grid in zip(starts_of(grids), grids, strict=False):
        if grid[0] * grid[1] * grid[2] == 0:
            continue
        views = time_last(q, start, grid), time_last(k, start, grid), time_last(v, start, grid)
        out, _ = attend(*views, scale)
        parts.append(out.permute(2, 0, 1, 3).flatten(0, 1))
    return torch.cat(parts)
