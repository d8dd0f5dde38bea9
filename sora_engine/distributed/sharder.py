"""A packed batch over the ranks of one forward pass: any number of them, any mix of segments.

All that a model does to a token by itself stays with it: its row of the modulation table, its
coordinates and the text that it reads are cut alike. Only self-attention looks beyond.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sora_engine.denoise.adapting import AdapterRun
from sora_engine.denoise.packing import VIDEO, ContextRuns, PackedBatch
from sora_engine.distributed.attention import ShardedAttention
from sora_engine.distributed.mesh import Mesh
from sora_engine.distributed.shard import TokenShard, clip_offsets, longest, shard_tokens
from sora_engine.errors import LayoutError
from sora_kernels.transfer import to_device


@dataclass(slots=True)
class BatchSharder:
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
        if set(batch.streams) != {VIDEO}:
            raise LayoutError(
                f"streams {sorted(set(batch.streams) - {VIDEO})} beside the video's are not "
                "sharded over ranks; ulysses=1 and ring=1 would work"
            )
        video, mine = batch.video, shard.tokens
        stream = replace(
            video,
            tokens=video.tokens[mine],
            rows=None if video.rows is None else video.rows[mine],
            coords=video.coords[mine],
            extents=None if video.extents is None else video.extents[mine],
            rates=None if video.rates is None else video.rates[mine],
            places=None if video.places is None else video.places[mine],
            control=None if video.control is None else video.control[mine],
            attend=ShardedAttention(shard),
            plans=shard.plans,
        )
        adapters = _cut_adapters(batch.adapters, mine)
        return replace(batch, streams={VIDEO: stream}, contexts=contexts, adapters=adapters)

    def _cut(self, batch: PackedBatch) -> tuple[TokenShard, dict[str, ContextRuns]]:
        video = batch.video
        offsets = video.cu_seqlens.tolist()
        shard = shard_tokens(self.mesh, offsets, video.grids, video.tokens.device)
        return shard, _cut_runs(batch.contexts, shard.tokens)

    def gather(self, predictions: Tensor, batch: PackedBatch) -> Tensor:
        """Every rank's predictions `[tokens of the rank, channels]` as one, in packed order.

        batch: the sharded one.
        """
        if not isinstance(batch.video.attend, ShardedAttention):
            return predictions
        shard = batch.video.attend.shard
        shapes = [(b - a, predictions.shape[1]) for a, b in itertools.pairwise(shard.bounds)]
        return torch.cat(self.mesh.sequence.all_gather(predictions, shapes))

    def clear(self) -> None:
        """Forget all layouts, and the text keys that they hold."""
        self._kept.clear()


def _cut_adapters(runs: Sequence[AdapterRun], mine: slice) -> tuple[AdapterRun, ...]:
    """The runs of tokens with adapters within a stretch of the tokens, counted from its start."""
    cut = []
    for run in runs:
        start = max(run.start, mine.start)
        stop = mine.stop if run.stop is None else min(run.stop, mine.stop)
        if start < stop:
            cut.append(AdapterRun(run.adapters, start - mine.start, stop - mine.start))
    return tuple(cut)


def _cut_runs(contexts: Mapping[str, ContextRuns], mine: slice) -> dict[str, ContextRuns]:
    """Context runs over a stretch of the tokens. Keys stay whole, as every rank has all texts, and
    so does padding, which is a run's."""
    cut = {}
    for name, runs in contexts.items():
        parts, at = [], 0
        for own, length in runs.stretches:
            start, stop = max(mine.start, at), min(mine.stop, at + length)
            if start < stop:
                parts.append((_clipped(own, start - at, stop - at), stop - start))
            at += length
        if len(parts) > 1:
            cut[name] = replace(parts[0][0], stretches=tuple(parts))
        elif parts:
            cut[name] = parts[0][0]
        elif runs.stretches:  # this rank has no tokens
            cut[name] = _clipped(runs.stretches[0][0], 0, 0)
        else:
            cut[name] = _clipped(runs, mine.start, mine.stop)
    return cut


def _clipped(runs: ContextRuns, start: int, stop: int) -> ContextRuns:
    offsets = clip_offsets(runs.cu_seqlens_q.tolist(), start, stop)
    return replace(
        runs,
        cu_seqlens_q=to_device(torch.tensor(offsets, dtype=torch.int32), runs.keys.device),
        max_seqlen_q=longest(offsets),
        plans={},
    )
