"""Block lists for windowed attention: which tiles of keys each tile of queries meets, and how.

A video is cut into 3-D tiles (sliding tile attention, arXiv 2502.04507), so that most pairs of
tiles lie wholly inside a window or wholly outside. Pairs outside are not listed and cost nothing;
pairs inside run without a mask. A mask over blocks of tokens (a window of frames with key frames
beside it, say) makes lists in the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sora_kernels.grids import Grid, starts_of
from sora_kernels.transfer import to_device
from sora_kernels.windowed.whole_frames import TileLists, are_whole, fill_tiles, frame_lists

OP = "plan_attention"
WHOLE = 1 << 30  # an extent or a reach that covers any axis
COLUMNS = 16  # of a plan's table of segments
# What a masked pair of tiles costs beside one without a mask, in choosing the shape of tiles.
MASKED_COST = 1.25


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """Tiles and block lists of one packed batch, on its device; it serves every layer and step.

    segments: int32 `[segments, 16]`: first query, query grid, first key, key grid, origin of the
    query grid in the key grid, first entry and row length of its mask, extents of the mask's cells.
    tiles: int32 `[tiles, 5]`: segment, tile of queries, start of its list, how many partial and how
    many full tiles of keys it has. Tiles may share a list. blocks: int32 `[entries]`, tiles of
    keys, a list's partial ones before its full ones. mask: int8, the segments' masks end to end;
    empty where there is none.
    patterns: int32, for each entry of blocks the row of bits that says who sees whom (-1 for full
    tiles). bits: int64 `[rows, tokens of a tile]`, for each query a bit for each key of the tile.
    Both are empty without a mask. shape: extents of a tile. The rest says for which call it is.
    """

    segments: Tensor
    tiles: Tensor
    blocks: Tensor
    mask: Tensor
    patterns: Tensor
    bits: Tensor
    shape: Grid
    grids: tuple[Grid, ...]
    key_grids: tuple[Grid, ...]
    origins: tuple[Grid, ...]
    window: Grid


def radii(window: Grid) -> Grid:
    """How far a window of odd extents reaches to each side; -1 reaches over the whole axis."""
    t, h, w = (WHOLE if extent == -1 else extent // 2 for extent in window)
    return t, h, w


def check_window(op: str, window: Sequence[int]) -> Grid:
    if len(window) != 3 or any(n != -1 and (n < 1 or n % 2 == 0) for n in window):
        raise ValueError(f"{op}: window {list(window)}; three odd extents, or -1, are due")
    return window[0], window[1], window[2]


def cells_of(grid: Grid, cell: Grid) -> Grid:
    """How many cells of a mask a grid has on each axis; an extent of -1 is the whole axis."""
    t, h, w = (
        min(extent, 1) if size == -1 else -(-extent // size)
        for extent, size in zip(grid, cell, strict=True)
    )
    return t, h, w


def effective(cell: Grid) -> Grid:
    """A cell's extents, with one beyond any axis for -1."""
    t, h, w = (WHOLE if size == -1 else size for size in cell)
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


def _masked_pairs(
    mask: Tensor, grid: Grid, key_grid: Grid, cell: Grid, shape: Grid
) -> tuple[Tensor, Tensor]:
    """As `_axis`, for a mask over cells: both `[query tiles, key tiles]`.

    Counts the true cells that each pair of tiles touches, by prefix sums along the six axes.
    """
    counts = mask.to(torch.int64).reshape(*cells_of(grid, cell), *cells_of(key_grid, cell))
    touched = torch.ones((), dtype=torch.int64)
    for axis, (extent, size, tile) in enumerate(
        zip((*grid, *key_grid), (*cell, *cell), (*shape, *shape), strict=True)
    ):
        size = max(1, extent) if size == -1 else size
        first = torch.arange(0, extent, tile)
        last = (first + tile).clamp(max=extent) - 1
        sums = torch.cat((torch.zeros_like(counts.narrow(axis, 0, 1)), counts.cumsum(axis)), axis)
        counts = sums.index_select(axis, last // size + 1) - sums.index_select(axis, first // size)
        touched = touched[..., None] * (last // size + 1 - first // size)
    counts, touched = (x.flatten(3).flatten(0, 2) for x in (counts, touched))
    return counts > 0, counts == touched


def _lists(
    grid: Grid, key_grid: Grid, origin: Grid, reach: Grid, mask: Tensor | None, cell: Grid,
    shape: Grid,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which pairs of tiles are listed as partial and as full: both `[query tiles, key tiles]`."""
    axes = [_axis(*axis) for axis in zip(grid, key_grid, origin, reach, shape, strict=True)]
    full = _pairs([every for _, every in axes])
    some = _pairs([some for some, _ in axes])
    if mask is not None and 0 not in key_grid:
        any_cell, every_cell = _masked_pairs(mask, grid, key_grid, cell, shape)
        # A tile of keys that sticks out of the grid is partial even where every cell is true.
        full, some = full & every_cell, some & any_cell
    return some & ~full, full


class SegmentMask(NamedTuple):
    """A segment's mask: bool `[cells of grid, cells of key_grid]` of cells of extents `cell`.

    Where frames are seen whole the grids have one row of all their tokens.
    """

    grid: Grid
    key_grid: Grid
    cell: Grid
    allowed: Tensor


def cell_index(at: Tensor, grid: Grid, cell: Grid) -> Tensor:
    """The mask's cell of each token at `at [..., 3]` of its grid: int64 `[...]`."""
    _, down, across = cells_of(grid, cell)
    t, h, w = (at // torch.tensor(cell, device=at.device)).unbind(-1)
    return (t * down + h) * across + w


def _tile_tokens(tiles: Tensor, grid: Grid, shape: Grid) -> tuple[Tensor, Tensor]:
    """Coordinates `[tiles, tokens, 3]` of tiles' tokens in their grid, and which are in it."""
    _, down, across = (-(-n // size) for n, size in zip(grid, shape, strict=True))
    corner = torch.stack((tiles // (across * down), tiles // across % down, tiles % across), dim=-1)
    inner = torch.cartesian_prod(*(torch.arange(size) for size in shape)).reshape(-1, 3)
    at = (corner * torch.tensor(shape))[:, None] + inner
    return at, (at < torch.tensor(grid)).all(-1)


def pattern_bits(
    pairs: Tensor, mask: SegmentMask, origin: Grid, reach: Grid, shape: Grid, chunk: int = 1024
) -> Tensor:
    """Which queries see which keys in pairs `[n, 2]` of tiles: int64 `[n, tokens of a tile]`.

    Bit j of a query's entry is its sight of key j. Queries and keys outside their grids see and are
    seen by none.
    """
    bit = torch.ones((), dtype=torch.int64) << torch.arange(prod(shape))
    rows = []
    for part in pairs.split(chunk):
        at_q, live_q = _tile_tokens(part[:, 0], mask.grid, shape)
        at_k, live_k = _tile_tokens(part[:, 1], mask.key_grid, shape)
        q_cell = cell_index(at_q, mask.grid, mask.cell).where(live_q, 0)
        k_cell = cell_index(at_k, mask.key_grid, mask.cell).where(live_k, 0)
        seen = mask.allowed[q_cell[:, :, None], k_cell[:, None, :]]
        seen = seen & live_q[:, :, None] & live_k[:, None, :]
        far = (at_q + torch.tensor(origin))[:, :, None] - at_k[:, None, :]
        seen &= (far.abs() <= torch.tensor(reach)).all(-1)
        rows.append((seen * bit).sum(-1))
    return torch.cat(rows) if rows else torch.empty(0, prod(shape), dtype=torch.int64)


def shapes_of(tokens: int) -> tuple[Grid, ...]:
    """The tiles of so many tokens that a plan chooses from, most compact first."""
    if tokens == 64:
        return (4, 4, 4), (2, 4, 8), (1, 8, 8), (1, 4, 16), (1, 1, 64)
    if tokens == 32:
        return (2, 4, 4), (1, 4, 8), (1, 2, 16), (1, 1, 32)
    if tokens == 16:
        return (1, 4, 4), (1, 2, 8), (1, 1, 16)
    raise ValueError(f"no tiles of {tokens} tokens; of 16, 32 and 64 there are")


Place = tuple[Grid, Grid, Grid, Tensor | None]
"""Of a segment: its grid, the keys' grid, its origin in that, and its mask."""


def _best_lists(
    places: Sequence[Place], reach: Grid, cell: Grid, tokens: int
) -> tuple[Grid, list[TileLists]]:
    """The shape of tiles (of so many tokens) that lists the least work, and its lists."""

    def pairs_of(shape: Grid) -> list[tuple[Tensor, Tensor] | None]:
        return [
            None if 0 in grid else _lists(grid, key_grid, origin, reach, mask, cell, shape)
            for grid, key_grid, origin, mask in places
        ]

    def cost(pairs: list[tuple[Tensor, Tensor] | None]) -> float:
        return sum(
            MASKED_COST * int(pair[0].sum()) + int(pair[1].sum())
            for pair in pairs
            if pair is not None
        )

    planned = [(shape, pairs_of(shape)) for shape in shapes_of(tokens)]
    shape, pairs = min(planned, key=lambda entry: cost(entry[1]))
    return shape, [
        _tile_lists(pair, place, reach, cell, shape)
        for pair, place in zip(pairs, places, strict=True)
    ]


def _tile_lists(
    pair: tuple[Tensor, Tensor] | None, place: Place, reach: Grid, cell: Grid, shape: Grid
) -> TileLists:
    """Lists from which pairs of tiles are partial and which full; None for a grid of no tokens."""
    grid, key_grid, origin, mask = place
    if pair is None:
        return TileLists(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    kinds = torch.stack(pair, dim=1)
    counts = kinds.sum(2)
    ends = counts.sum(1).cumsum(0)
    starts = ends - counts.sum(1)
    # Sorted by query tile, then partial before full, then key tile.
    entries = kinds.nonzero()
    tiles = torch.cat([starts[:, None], counts], dim=1)
    if mask is None:
        return TileLists(tiles, entries[:, 2])
    cut = entries[:, 1] == 0
    own = SegmentMask(grid, key_grid, effective(cell), mask)
    bits = pattern_bits(entries[cut][:, ::2], own, origin, reach, shape)
    patterns = torch.full((len(entries),), -1)
    patterns[cut] = torch.arange(len(bits))
    return TileLists(tiles, entries[:, 2], bits, patterns)


def build(
    grids: tuple[Grid, ...],
    key_grids: tuple[Grid, ...],
    origins: tuple[Grid, ...],
    window: Grid,
    tokens: int,
    device: torch.device,
    masks: Sequence[Tensor] | None = None,
    cell: Grid = (1, -1, -1),
) -> BlockPlan:
    """Plan with the shape of tiles (of so many tokens) that lists the least work.

    masks: for each segment bool `[cells of queries, cells of keys]`, cells counted from each grid's
    first token, in the order of tokens.
    """
    asked = grids, key_grids, origins
    whole = are_whole(window, cell, masks is not None, (*grids, *key_grids))
    if whole:
        grids, key_grids = (
            tuple((t, min(h * w, 1), h * w) for t, h, w in of) for of in (grids, key_grids)
        )
        origins = tuple((t, 0, 0) for t, _, _ in origins)
        cell = (cell[0], -1, -1)
    reach = radii(window)
    places = [
        (*place, masks[i] if masks is not None else None)
        for i, place in enumerate(zip(grids, key_grids, origins, strict=True))
    ]
    shape: Grid
    if whole and fill_tiles((*grids, *key_grids), tokens):
        shape = (1, 1, tokens)
        lists = [
            frame_lists(grid, key_grid, origin[0], reach[0], mask, cell[0], tokens)
            for grid, key_grid, origin, mask in places
        ]
    else:
        shape, lists = _best_lists(places, reach, cell, tokens)

    segments: list[list[int]] = []
    tiles: list[Tensor] = []
    patterns: list[Tensor] = []
    bits: list[Tensor] = []
    listed = mask_start = 0
    starts = zip(starts_of(grids), starts_of(key_grids), strict=True)
    for i, ((grid, key_grid, origin, mask), own) in enumerate(zip(places, lists, strict=True)):
        q_start, k_start = next(starts)
        row_length = 0 if mask is None else mask.shape[1]
        segments.append(
            [q_start, *grid, k_start, *key_grid, *origin, mask_start, row_length, *effective(cell)]
        )
        mask_start += 0 if mask is None else mask.numel()
        place = torch.tensor([i, 0, listed, 0, 0]).repeat(len(own.tiles), 1)
        place[:, 1] = torch.arange(len(own.tiles))
        place[:, 2:] += own.tiles
        tiles.append(place)
        listed += len(own.blocks)
        if own.bits is not None and own.patterns is not None:
            before = sum(len(part) for part in bits)
            patterns.append(own.patterns.where(own.patterns < 0, own.patterns + before))
            bits.append(own.bits)

    def table(parts: list[Tensor], dtype: torch.dtype, *empty: int) -> Tensor:
        joined = torch.cat(parts) if parts else torch.empty(*empty)
        return to_device(joined.to(dtype), device)

    # Few patterns are distinct: a window cuts most tiles alike.
    distinct = torch.cat(bits) if bits else torch.empty(0, prod(shape), dtype=torch.int64)
    number = torch.cat(patterns) if patterns else torch.empty(0, dtype=torch.int64)
    if len(distinct):
        distinct, place = torch.unique(distinct, dim=0, return_inverse=True)
        number[number >= 0] = place
    return BlockPlan(
        to_device(torch.tensor(segments, dtype=torch.int32).reshape(-1, COLUMNS), device),
        table(tiles, torch.int32, 0, 5),
        table([own.blocks for own in lists], torch.int32, 0),
        table([mask.flatten() for mask in masks or ()], torch.int8, 0),
        to_device(number.to(torch.int32), device),
        to_device(distinct, device),
        shape,
        *asked,
        window,
    )


def masks_of(plan: BlockPlan | None) -> list[SegmentMask] | None:
    """The masks of a plan, read back from its tables, or None where it has none."""
    if plan is None or plan.mask.numel() == 0:
        return None
    read = []
    for row in plan.segments.tolist():
        grid, key_grid, cell = ((n[0], n[1], n[2]) for n in (row[1:4], row[5:8], row[13:16]))
        start, columns = row[11:13]
        rows = starts_of([cells_of(grid, cell)])[-1]
        mask = plan.mask[start : start + rows * columns].view(rows, columns) != 0
        read.append(SegmentMask(grid, key_grid, cell, mask))
    return read


build_cached = functools.lru_cache(maxsize=64)(build)


def check_masks(
    masks: Sequence[Tensor] | Tensor,
    grids: Sequence[Grid],
    key_grids: Sequence[Grid],
    cell: Sequence[int],
) -> list[Tensor]:
    """A bool mask for each segment, on the CPU, of its cells; one mask serves all segments."""
    if len(cell) != 3 or any(size != -1 and size < 1 for size in cell):
        raise ValueError(f"{OP}: cell {list(cell)}; three extents, or -1, are due")
    given = [masks] * len(grids) if isinstance(masks, Tensor) else list(masks)
    if len(given) != len(grids):
        raise ValueError(f"{OP}: {len(given)} masks for {len(grids)} segments")
    size = cell[0], cell[1], cell[2]
    for i, (mask, grid, key_grid) in enumerate(zip(given, grids, key_grids, strict=True)):
        due = [starts_of([cells_of(of, size)])[-1] for of in (grid, key_grid)]
        if mask.dtype != torch.bool or list(mask.shape) != due:
            raise ValueError(
                f"{OP}: mask {i} is {mask.dtype} {[*mask.shape]}; grids {grid} and {key_grid} in "
                f"cells of {tuple(cell)} take bool {due}"
            )
    return [mask.cpu() for mask in given]
