"""Block lists where frames are seen whole or not at all: in closed form.

All tiles of queries of a frame meet the same tiles of keys, so they share one list. At 53 frames of
3600 tokens that is 160 thousand entries in place of nine million.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sora_kernels.grids import Grid


class TileLists(NamedTuple):
    """The lists of one segment's tiles of queries.

    tiles: int64 `[tiles, 3]`: start of its list, how many partial and how many full tiles of keys
    it has. blocks: int64 `[entries]`, tiles of keys, partial ones before full ones.
    bits: int64 `[patterns, tokens of a tile]`, for each query a bit for each key that it sees.
    patterns: int64 `[entries]`, which of them a partial tile has, -1 for full ones. Both are None
    where sight follows from coordinates.
    """

    tiles: Tensor
    blocks: Tensor
    bits: Tensor | None = None
    patterns: Tensor | None = None


def are_whole(window: Grid, cell: Grid, masked: bool, grids: Sequence[Grid]) -> bool:
    """Whether frames are seen whole or not at all, so that their rows need not be told apart."""
    cells_are_whole = all(
        size == -1 or all(grid[axis] <= size for grid in grids)
        for axis, size in zip((1, 2), cell[1:], strict=True)
    )
    return window[1:] == (-1, -1) and (not masked or cells_are_whole)


def fill_tiles(grids: Sequence[Grid], tokens: int) -> bool:
    """Whether tiles along one axis are the best for frames of so many tokens each: where a frame
    has at least a tile's."""
    return all(h * w >= tokens for t, h, w in grids if t)


def frame_lists(
    grid: Grid, key_grid: Grid, origin: int, reach: int, mask: Tensor | None, cell: int, tokens: int
) -> TileLists:
    """Lists for frames in one row each, `grid = (frames, 1, tokens of a frame)`, cut into tiles of
    `tokens` along it.

    origin: the first query frame's place among the key frames. reach: of the window, in frames.
    mask: bool `[cells of queries, cells of keys]` of `cell` frames each, -1: one cell.
    """
    (frames, _, length), (key_frames, _, key_length) = grid, key_grid
    at_q, at_k = torch.arange(frames), torch.arange(key_frames)
    sees = (at_q[:, None] + origin - at_k).abs() <= reach
    if mask is not None and key_frames:
        size = max(frames, key_frames) if cell == -1 else cell
        sees &= mask[at_q // size][:, at_k // size]
    across, rest = -(-key_length // tokens), key_length % tokens
    cut = torch.zeros(across, dtype=torch.bool)
    if rest:
        cut[-1] = True  # it sticks out of the frame
    # [frames, partial or full, tiles of keys]
    kinds = torch.stack([sees[:, :, None] & cut, sees[:, :, None] & ~cut], dim=1).flatten(2)
    entries = kinds.nonzero()
    counts = kinds.sum(2)
    starts = counts.sum(1).cumsum(0) - counts.sum(1)
    lists = torch.cat([starts[:, None], counts], dim=1)
    tiles = lists.repeat_interleave(-(-length // tokens), dim=0)
    if mask is None:
        return TileLists(tiles, entries[:, 2])
    first_keys = (torch.ones((), dtype=torch.int64) << rest) - 1
    # Partial tiles are of kind 0, and all have the one pattern.
    return TileLists(tiles, entries[:, 2], first_keys.expand(1, tokens), -entries[:, 1])
