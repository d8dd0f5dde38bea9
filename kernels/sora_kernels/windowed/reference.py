"""Windowed attention in plain PyTorch: a mask over pairs, in chunks of queries. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.grids import Grid, starts_of
from sora_kernels.windowed.plan import WindowPlan, radii

PAIRS = 1 << 22  # of the mask at a time


def unsupported(case: Case) -> str | None:
    return None


def coordinates(grid: Grid, origin: Grid, device: torch.device) -> Tensor:
    """`[tokens, 3]`: frame, row and column of each token."""
    axes = [
        torch.arange(first, first + extent, device=device)
        for first, extent in zip(origin, grid, strict=True)
    ]
    return torch.cartesian_prod(*axes).reshape(-1, 3)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grids: list[Grid],
    key_grids: list[Grid],
    origins: list[Grid],
    window: Grid,
    *,
    scale: float,
    plan: WindowPlan | None,
) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    reach = torch.tensor(radii(window), device=q.device)
    parts = [q.new_empty(0, *q.shape[1:])]
    q_starts, k_starts = starts_of(grids), starts_of(key_grids)
    for i, (grid, key_grid, origin) in enumerate(zip(grids, key_grids, origins, strict=True)):
        keys = k[k_starts[i] : k_starts[i + 1]].permute(1, 2, 0)
        values = v[k_starts[i] : k_starts[i + 1]].transpose(0, 1)
        at_q = coordinates(grid, origin, q.device)
        at_k = coordinates(key_grid, (0, 0, 0), q.device)
        some = max(1, PAIRS // max(1, len(at_k)))
        for first in range(0, len(at_q), some):
            last = min(first + some, len(at_q))
            seen = ((at_q[first:last, None] - at_k[None]).abs() <= reach).all(-1)
            queries = q[q_starts[i] + first : q_starts[i] + last].transpose(0, 1)
            scores = ((queries * scale) @ keys).to(wide).masked_fill(~seen, float("-inf"))
            # A query without keys has no finite score: 0, and not 0 / 0.
            weights = torch.softmax(scores, dim=-1).masked_fill(~seen.any(-1)[:, None], 0.0)
            parts.append((weights.to(v.dtype) @ values).transpose(0, 1))
    return torch.cat(parts)
