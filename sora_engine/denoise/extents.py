"""The size of the picture that each token is a part of, for positions that are relative to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def extents_of(grids: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """int64 `[N, 2]`, rows and columns of patches of each token's segment.

    grids: of each segment, patches in frames, rows and columns.

    Filled on the device: few families read it, and the others wait for no copy. Where all segments
    have one size, as in most batches, it takes no memory.
    """

    def filled(size: tuple[int, int]) -> Tensor:
        return torch.stack([torch.full((), side, device=device) for side in size])

    sides = {size: filled(size) for size in {(rows, columns) for _, rows, columns in grids}}
    if len(sides) == 1:
        return sides[grids[0][1:]].expand(sum(map(math.prod, grids)), 2)
    return torch.cat([sides[grid[1:]].expand(math.prod(grid), 2) for grid in grids])
