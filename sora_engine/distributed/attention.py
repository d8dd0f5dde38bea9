"""Self-attention of one rank's share of a batch's tokens: whole, or sparse."""

from __future__ import annotations

from torch import Tensor

from sora_engine.denoise.packing import Stream
from sora_engine.distributed.sequence import (
    sharded_attention,
    trade_heads_for_tokens,
    trade_tokens_for_heads,
)
from sora_engine.distributed.shard import TokenShard
from sora_engine.distributed.sparse import SparseRing, sparse_ring_attention
from sora_engine.models.attention import planned, sparse_attention


class ShardedAttention:
    """`packing.SelfAttention` of a stream that `shard` describes, for the layers of one pass."""

    def __init__(self, shard: TokenShard) -> None:
        self.shard = shard
        self._ring: SparseRing | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, stream: Stream, *, backend: str) -> Tensor:
        """q, k, v: the rank's own tokens `[tokens, heads, head_dim]`; returns the same shape."""
        shard, heads = self.shard, q.shape[1]
        if stream.sees is None:
            plan = planned(stream.plans, q, shard.cu_seqlens, backend, len(shard.own_block))
            return sharded_attention(q, k, v, shard, plan=plan, backend=backend)
        q, k, v = trade_tokens_for_heads(q, k, v, shard)
        if shard.mesh.ring.size == 1:
            out = sparse_attention(q, k, v, stream, backend=backend)
        else:
            out = self._sparse_ring(q, k, v, stream, backend)
        return trade_heads_for_tokens(out, shard, heads)

    def _sparse_ring(self, q: Tensor, k: Tensor, v: Tensor, stream: Stream, backend: str) -> Tensor:
        assert stream.sees is not None
        if self._ring is None:
            self._ring = SparseRing.of(self.shard, stream.sees, q.device)
        key = q.shape[-1], q.dtype
        if key not in stream.sparse_plans and len(q):
            stream.sparse_plans[key] = self._ring.plan(q)
        plan = stream.sparse_plans.get(key)
        return sparse_ring_attention(q, k, v, self.shard, self._ring, plan=plan, backend=backend)
