"""A packed batch's tokens over the ranks of one forward pass: any number, any mix of segments.

Rank r of P holds the r-th of P stretches of the packed order, as even as can be. All that a model
does to a token by itself stays with it: its row of the modulation table, its coordinates and the
text that it reads are cut alike. Only self-attention looks beyond, by `TokenShard`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sora_engine.denoise.packing import ContextRuns, Grid, PackedBatch, Plans
from sora_engine.distributed.layout import bounds, share
from sora_engine.distributed.mesh import Mesh


@dataclass(frozen=True, slots=True, eq=False)
class TokenShard:
    """Where a rank's tokens lie among all of a batch, as attention needs to know it.

    bounds: offsets `[ranks + 1]` of the ranks' tokens; segments: offsets `[segments + 1]` of the
        segments; grids: the segments' patch grids. All count over the whole batch, on the host.
    cu_seqlens: int32, of the pieces of segments that this rank's ring block holds; max_seqlen: the
        longest piece. A ring block is the tokens of one Ulysses group.
    """

    mesh: Mesh
    bounds: tuple[int, ...]
    segments: tuple[int, ...]
    grids: tuple[Grid, ...]
    cu_seqlens: Tensor
    max_seqlen: int
    plans: Plans = field(default_factory=dict)

    @property
    def tokens(self) -> slice:
        """This rank's own tokens."""
        place = self.mesh.sequence.index
        return slice(self.bounds[place], self.bounds[place + 1])

    def block(self, ring_index: int) -> range:
        """The tokens of one Ulysses group."""
        width = self.mesh.ulysses.size
        return range(self.bounds[ring_index * width], self.bounds[(ring_index + 1) * width])

    @property
    def own_block(self) -> range:
        return self.block(self.mesh.ring.index)

    @property
    def group_tokens(self) -> list[int]:
        """How many tokens each rank of this rank's Ulysses group has."""
        first = self.mesh.ring.index * self.mesh.ulysses.size
        offsets = self.bounds[first : first + self.mesh.ulysses.size + 1]
        return [b - a for a, b in itertools.pairwise(offsets)]

    def heads(self, num_heads: int) -> list[int]:
        """How many heads each rank of the Ulysses group attends with."""
        return share(num_heads, self.mesh.ulysses.size)


def shard_tokens(
    mesh: Mesh, segments: Sequence[int], grids: Sequence[Grid], device: torch.device
) -> TokenShard:
    """Cut `segments[-1]` tokens, laid end to end with these offsets, over a mesh's ranks."""
    total = segments[-1]
    cuts = bounds(total, mesh.sequence.size)
    width = mesh.ulysses.size
    first, last = cuts[mesh.ring.index * width], cuts[(mesh.ring.index + 1) * width]
    pieces = clip_offsets(segments, first, last)
    return TokenShard(
        mesh=mesh,
        bounds=cuts,
        segments=tuple(segments),
        grids=tuple(grids),
        cu_seqlens=torch.tensor(pieces, dtype=torch.int32, device=device),
        max_seqlen=longest(pieces),
    )


def clip_offsets(offsets: Sequence[int], start: int, stop: int) -> list[int]:
    """Offsets as seen from within `start` to `stop`: pieces outside are empty."""
    return [min(max(offset, start), stop) - start for offset in offsets]


def longest(offsets: Sequence[int]) -> int:
    return max((b - a for a, b in itertools.pairwise(offsets)), default=0)


@dataclass(slots=True)
class Sharder:
    """Cuts packed batches, and keeps what depends on their composition alone."""

    mesh: Mesh
    max_layouts: int = 4
    _kept: dict[int, tuple[object, TokenShard, dict[str, ContextRuns]]] = field(
        default_factory=dict
    )

    def shard(self, batch: PackedBatch) -> PackedBatch:
        """This rank's part of a batch."""
        if self.mesh.sequence.size == 1:
            return batch
        # A packer gives the same mapping of contexts to every batch of one composition.
        key = id(batch.contexts)
        if key not in self._kept:
            while len(self._kept) >= self.max_layouts:
                self._kept.pop(next(iter(self._kept)))
            shard, contexts = self._cut(batch)
            self._kept[key] = (batch.contexts, shard, contexts)
        _, shard, contexts = self._kept[key]
        video, mine = batch.video, shard.tokens
        stream = replace(
            video,
            tokens=video.tokens[mine],
            rows=None if video.rows is None else video.rows[mine],
            coords=video.coords[mine],
            shard=shard,
            plans=shard.plans,
        )
        return replace(batch, streams={"video": stream}, contexts=contexts)

    def _cut(self, batch: PackedBatch) -> tuple[TokenShard, dict[str, ContextRuns]]:
        video = batch.video
        offsets = video.cu_seqlens.tolist()
        shard = shard_tokens(self.mesh, offsets, video.grids, video.tokens.device)
        return shard, _cut_runs(batch.contexts, shard.tokens)

    def gather(self, predictions: Tensor, batch: PackedBatch) -> Tensor:
        """Every rank's predictions `[tokens of the rank, channels]` as one, in packed order.

        batch: the sharded one.
        """
        shard = batch.video.shard
        if shard is None:
            return predictions
        shapes = [(b - a, predictions.shape[1]) for a, b in itertools.pairwise(shard.bounds)]
        return torch.cat(self.mesh.sequence.all_gather(predictions, shapes))

    def clear(self) -> None:
        """Forget all layouts, and the text keys that they hold."""
        self._kept.clear()


def _cut_runs(contexts: Mapping[str, ContextRuns], mine: slice) -> dict[str, ContextRuns]:
    """Context runs over a stretch of the tokens. Keys stay whole: every rank has all texts."""
    cut = {}
    for name, runs in contexts.items():
        offsets = clip_offsets(runs.cu_seqlens_q.tolist(), mine.start, mine.stop)
        padding = runs.log_padding
        cut[name] = replace(
            runs,
            cu_seqlens_q=torch.tensor(offsets, dtype=torch.int32, device=runs.keys.device),
            max_seqlen_q=longest(offsets),
            plans={},
            log_padding=None if padding is None else padding[mine],
        )
    return cut
