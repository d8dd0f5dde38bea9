"""Windowed attention in plain PyTorch: a mask over pairs, in chunks of queries. Differentiable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sora_kernels.dispatch import Case
from sora_kernels.grids import Grid
from sora_kernels.windowed.operands import Operands
from sora_kernels.windowed.plan import SegmentMask, cell_index, masks_of, radii

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


def visibility(
    grid: Grid, key_grid: Grid, origin: Grid, reach: Grid, mask: SegmentMask | None,
    device: torch.device,
) -> Callable[[int, int], Tensor]:  # fmt: skip
    """Which keys of a segment its queries `first` to `last` see: a function to bool `[last - first,
    keys]`."""
    at_q = coordinates(grid, origin, device)
    at_k = coordinates(key_grid, (0, 0, 0), device)
    limit = torch.tensor(reach, device=device)

    def window(first: int, last: int) -> Tensor:
        return ((at_q[first:last, None] - at_k[None]).abs() <= limit).all(-1)

    if mask is None:
        return window
    here = (0, 0, 0)
    q_cell = cell_index(coordinates(mask.grid, here, device), mask.grid, mask.cell)
    k_cell = cell_index(coordinates(mask.key_grid, here, device), mask.key_grid, mask.cell)

    def masked(first: int, last: int) -> Tensor:
        return window(first, last) & mask.allowed[q_cell[first:last]][:, k_cell]

    return masked


def run(call: Operands) -> Tensor:
    q, reach, masks = call.q, radii(call.window), masks_of(call.plan)
    wide = torch.promote_types(q.dtype, torch.float32)
    parts = [q.new_empty(0, *q.shape[1:])]
    for i, rows, keys_here, grid, key_grid, origin in call.segments():
        keys = call.k[keys_here].permute(1, 2, 0)
        values = call.v[keys_here].transpose(0, 1)
        seen_by = visibility(grid, key_grid, origin, reach, masks[i] if masks else None, q.device)
        queries_here = rows.stop - rows.start
        some = max(1, PAIRS // max(1, keys.shape[-1]))
        for first in range(0, queries_here, some):
            last = min(first + some, queries_here)
            seen = seen_by(first, last)
            queries = q[rows][first:last].transpose(0, 1)
            scores = ((queries * call.scale) @ keys).to(wide).masked_fill(~seen, float("-inf"))
            # A query without keys has no finite score: 0, and not 0 / 0.
            weights = torch.softmax(scores, dim=-1).masked_fill(~seen.any(-1)[:, None], 0.0)
            parts.append((weights.to(values.dtype) @ values).transpose(0, 1))
    return torch.cat(parts)
