"""Windowed attention by torch's SDPA: a frame of queries against the frames in its reach.

The cost follows the window in time; inside the frames a mask does the rest, and frames with equal
neighbourhoods share it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.grids import Grid, starts_of
from sora_kernels.windowed.plan import WindowPlan, radii
from sora_kernels.windowed.reference import coordinates


def unsupported(case: Case) -> str | None:
    return "SDPA is kept to fp32, fp16 and bf16" if case.dtype == torch.float64 else None


def _frame_mask(
    grid: Grid, key_grid: Grid, origin: Grid, reach: Grid, device: torch.device
) -> Tensor:
    """Which keys of a frame each query of a frame sees: bool `[queries, keys]`."""
    at_q = coordinates((1, *grid[1:]), (0, *origin[1:]), device)
    at_k = coordinates((1, *key_grid[1:]), (0, 0, 0), device)
    limit = torch.tensor(reach, device=device)
    return ((at_q[:, None] - at_k[None]).abs() <= limit).all(-1)


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
    reach = radii(window)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    q_starts, k_starts = starts_of(grids), starts_of(key_grids)
    for i, (grid, key_grid, origin) in enumerate(zip(grids, key_grids, origins, strict=True)):
        q_frame, k_frame = grid[1] * grid[2], key_grid[1] * key_grid[2]
        if q_frame * k_frame == 0:
            continue
        mask = _frame_mask(grid, key_grid, origin, reach, q.device)
        blind = ~mask.any(1)
        whole = bool(mask.all())
        for frame in range(grid[0]):
            first = max(0, origin[0] + frame - reach[0])
            last = min(key_grid[0], origin[0] + frame + reach[0] + 1)
            if first >= last:
                continue
            rows = slice(q_starts[i] + frame * q_frame, q_starts[i] + (frame + 1) * q_frame)
            keys = slice(k_starts[i] + first * k_frame, k_starts[i] + last * k_frame)
            part = F.scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None],
                k[keys].transpose(0, 1)[None],
                v[keys].transpose(0, 1)[None],
                attn_mask=None if whole else mask.repeat(1, last - first),
                scale=scale,
            )[0].transpose(0, 1)
            out[rows] = part if whole else part.masked_fill(blind[:, None, None], 0.0)
    return out
