"""Sparse attention over a ring: of other ranks' keys, the frames that a rank's own frames see.

Which frames see which is known at every rank, so each works out what it is to send and to whom; the
keys cross at once, and one call attends to them. A rank's block of tokens may begin and end within
a frame: such a part of a frame counts as a segment of its own, with the keys that its frame sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_engine.denoise.packing import Grid
from sora_engine.distributed.shard import TokenShard
from sora_engine.models.attention import NO_WINDOW
from sora_kernels import BlockPlan, plan_attention, windowed_attention
from sora_kernels.transfer import to_device


@dataclass(frozen=True, slots=True, eq=False)
class SparseRing:
    """What a ring block sends, receives and attends to, for one step's masks.

    sends: for each peer of the ring, which of the block's own rows; receives: from each, how many.
    own: the block's own rows that it sees itself. `keys` picks the keys of the segments, end to
    end, from own and received ones laid in order of ranks. cu_seqlens, grids, key_grids, masks: the
    block's queries as segments, as `plan_attention` takes them.
    """

    sends: dict[int, Tensor]
    receives: dict[int, int]
    own: Tensor
    keys: Tensor
    cu_seqlens: Tensor
    grids: tuple[Grid, ...]
    key_grids: tuple[Grid, ...]
    masks: tuple[Tensor, ...]

    @classmethod
    def of(cls, shard: TokenShard, sees: Sequence[Tensor], device: torch.device) -> SparseRing:
        """sees: for each segment of the whole batch bool `[T, T]`, on the host."""
        ring = shard.mesh.ring
        mine = shard.own_block
        needed = [_frames_seen(shard, sees, shard.block(i)) for i in range(ring.size)]
        sends = {i: to_device(_rows(shard, needed[i], mine), device) for i in range(ring.size)}
        own = sends.pop(ring.index)
        wanted = needed[ring.index]
        receives = {
            i: len(_rows(shard, wanted, shard.block(i)))
            for i in range(ring.size)
            if i != ring.index
        }

        grids, key_grids, masks, keys = [], [], [], []
        pooled = 0
        for start, grid, sight, seen in zip(
            shard.segments, shard.grids, sees, wanted, strict=False
        ):
            frame = grid[1] * grid[2]
            place = pooled + frame * (seen.cumsum(0) - 1)  # of each frame's first key
            pooled += frame * int(seen.sum())
            first, last = (min(max(x - start, 0), grid[0] * frame) for x in (mine.start, mine.stop))
            for frames, part in _parts(first, last, grid):
                sub = sight[frames.start : frames.stop]
                visible = sub.any(0).nonzero().flatten()
                grids.append(part)
                key_grids.append((len(visible), grid[1], grid[2]))
                masks.append(sub[:, visible])
                keys.append((place[visible][:, None] + torch.arange(frame)).flatten())
        offsets = [0, *itertools.accumulate(t * h * w for t, h, w in grids)]
        return cls(
            sends={i: rows for i, rows in sends.items() if len(rows)},
            receives={i: n for i, n in receives.items() if n},
            own=own,
            keys=to_device(torch.cat([torch.empty(0, dtype=torch.int64), *keys]), device),
            cu_seqlens=to_device(torch.tensor(offsets, dtype=torch.int32), device),
            grids=tuple(grids),
            key_grids=tuple(key_grids),
            masks=tuple(masks),
        )

    def plan(self, q: Tensor) -> BlockPlan:
        """Of the attention, for all layers of a step."""
        return plan_attention(
            self.cu_seqlens,
            num_tokens=len(q),
            head_dim=q.shape[-1],
            dtype=q.dtype,
            grids=self.grids,
            key_grids=self.key_grids,
            masks=self.masks,
        )


def sparse_ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: TokenShard,
    sparse: SparseRing,
    *,
    plan: BlockPlan | None,
    backend: str,
) -> Tensor:
    """Attention of a block's queries over the frames that they see; q, k, v:
    `[the block's tokens, heads, head_dim]`. plan: None where the block has no tokens."""
    both = torch.stack((k, v), dim=1)
    send = {peer: both[rows] for peer, rows in sparse.sends.items()}
    parts = {peer: both.new_empty(n, *both.shape[1:]) for peer, n in sparse.receives.items()}
    shard.mesh.ring.start(send, parts).wait()
    if plan is None:
        return torch.empty_like(q)
    parts[shard.mesh.ring.index] = both[sparse.own]
    pool = torch.cat([parts[i] for i in sorted(parts)])
    keys, values = pool[sparse.keys].unbind(1)
    return windowed_attention(
        q,
        keys.contiguous(),
        values.contiguous(),
        sparse.cu_seqlens,
        sparse.grids,
        NO_WINDOW,
        key_grids=sparse.key_grids,
        plan=plan,
        backend=backend,
    )


def _frames_seen(shard: TokenShard, sees: Sequence[Tensor], block: range) -> list[Tensor]:
    """For each segment bool `[T]`: which frames those of a block see."""
    found = []
    for start, grid, sight in zip(shard.segments, shard.grids, sees, strict=False):
        frame = grid[1] * grid[2]
        first, last = (min(max(x - start, 0), grid[0] * frame) for x in (block.start, block.stop))
        found.append(sight[first // frame : -(-last // frame) if last > first else 0].any(0))
    return found


def _rows(shard: TokenShard, seen: Sequence[Tensor], block: range) -> Tensor:
    """The rows of a block (int64, from its first one) that belong to the frames in `seen`."""
    found = [torch.empty(0, dtype=torch.int64)]
    for start, grid, frames in zip(shard.segments, shard.grids, seen, strict=False):
        at = torch.arange(start, start + grid[0] * grid[1] * grid[2])
        at = at[frames.repeat_interleave(grid[1] * grid[2])]
        found.append(at[(at >= block.start) & (at < block.stop)] - block.start)
    return torch.cat(found)


def _parts(first: int, last: int, grid: Grid) -> list[tuple[range, Grid]]:
    """Tokens `first` to `last` of a segment as grids: the frames of each, and its extents."""
    frame = grid[1] * grid[2]
    parts = []
    while first < last:
        t, inside = divmod(first, frame)
        whole = (last - first) // frame
        if inside or not whole:
            length = min(frame - inside, last - first)
            parts.append((range(t, t + 1), (1, 1, length)))
        else:
            length = whole * frame
            parts.append((range(t, t + whole), (whole, grid[1], grid[2])))
        first += length
    return parts
