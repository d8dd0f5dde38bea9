"""Block lists for windowed attention: which tiles of keys each tile of queries meets, and how.

A video is cut into 3-D tiles (sliding tile attention, arXiv 2502.04507), so that most pairs of
tiles lie wholly inside a window or wholly outside. Pairs outside are not listed and cost nothing;
pairs inside run without a mask.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_kernels.grids import Grid, starts_of


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Tiles and block lists of one packed batch, int32, on the batch's device.

    segments: `[segments, 11]`: first query, query grid, first key, key grid, origin of the query
    grid in the key grid. tiles: `[tiles, 5]`: segment, tile of queries, start of its list, how many
    partial and how many full tiles of keys it has. blocks: `[entries]`, tiles of keys, a tile's
    partial ones before its full ones. shape: extents of a tile.
    """

    segments: Tensor
    tiles: Tensor
    blocks: Tensor
    shape: Grid


def radii(window: Grid) -> Grid:
    """How far a window of odd extents reaches to each side; -1 reaches over the whole axis."""
    t, h, w = (1 << 30 if extent == -1 else extent // 2 for extent in window)
    return t, h, w


def _axis(queries: int, keys: int, origin: int, radius: int, tile: int) -> tuple[Tensor, Tensor]:
    """For each pair of tiles of one axis: whether any pair of tokens meets, and whether all do."""
    first_q = torch.arange(0, queries, tile)[:, None]
    last_q = (first_q + tile).clamp(max=queries) - 1
    first_q, last_q = first_q + origin, last_q + origin
    first_k = torch.arange(0, keys, tile)[None, :]
    last_k = first_k + tile - 1
    inside = last_k < keys
    last_k = last_k.clamp(max=keys - 1)
    some = (first_k - last_q <= radius) & (first_q - last_k <= radius)
    every = (last_k - first_q <= radius) & (last_q - first_k <= radius) & inside
    return some, every & some


def _pairs(axes: list[Tensor]) -> Tensor:
    """The conjunction over axes for flattened 3-D tiles: `[query tiles, key tiles]`."""
    t, h, w = axes
    joined = (t[:, None, None, :, None, None] & h[None, :, None, None, :, None]) & w[
        None, None, :, None, None, :
    ]
    return joined.flatten(3).flatten(0, 2)


@functools.lru_cache(maxsize=64)
def plan_windows(
    grids: tuple[Grid, ...],
    key_grids: tuple[Grid, ...],
    origins: tuple[Grid, ...],
    window: Grid,
    shape: Grid,
    device: torch.device,
) -> WindowPlan:
    """Plan once for the many layers and steps that share grids and window."""
    reach = radii(window)
    segments, tiles, blocks = [], [], []
    listed = 0
    starts = zip(starts_of(grids), starts_of(key_grids), strict=True)
    for i, (grid, key_grid, origin) in enumerate(zip(grids, key_grids, origins, strict=True)):
        q_start, k_start = next(starts)
        segments.append([q_start, *grid, k_start, *key_grid, *origin])
        if 0 in grid:
            continue
        axes = [_axis(*axis) for axis in zip(grid, key_grid, origin, reach, shape, strict=True)]
        full = _pairs([every for _, every in axes])
        partial = _pairs([some for some, _ in axes]) & ~full
        counts = torch.stack((partial.sum(1), full.sum(1)), dim=1)
        ends = counts.sum(1).cumsum(0)
        number = torch.arange(full.shape[0])
        columns = (
            torch.full_like(number, i),
            number,
            listed + ends - counts.sum(1),
            *counts.unbind(1),
        )
        tiles.append(torch.stack(columns, dim=1))
        # Sorted by query tile, then partial before full, then key tile.
        kinds = torch.stack((partial, full), dim=1)
        blocks.append(kinds.nonzero()[:, 2])
        listed += int(ends[-1])

    def table(parts: list[Tensor], *empty: int) -> Tensor:
        joined = torch.cat(parts) if parts else torch.empty(*empty, dtype=torch.int64)
        return joined.to(torch.int32).to(device)

    return WindowPlan(
        torch.tensor(segments, dtype=torch.int32).reshape(-1, 11).to(device),
        table(tiles, 0, 5),
        table(blocks, 0),
        shape,
    )
