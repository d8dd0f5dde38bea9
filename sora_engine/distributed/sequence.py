"""Self-attention over sharded tokens: Ulysses, ring, and both as two axes of one mesh.

Ulysses (arXiv 2309.14509): a rank trades its tokens of all heads for all tokens of its heads, q, k
and v in one exchange, and trades the result back. Nothing is padded: token counts and head counts
may be uneven.

Ring (arXiv 2310.01889): a rank keeps its queries and attends to one block of keys after another,
joined by their log-sum-exps, while the next block is under way. Segments and blocks are stretches
of the same order, so two blocks share one segment at most, and of a block only that stretch is
sent: where they share none, nothing.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from sora_engine.distributed.comm import Pending
from sora_engine.distributed.shard import TokenShard
from sora_kernels import AttentionPlan, packed_attention


def sharded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: TokenShard,
    *,
    plan: AttentionPlan | None = None,
    backend: str,
) -> Tensor:
    """Each token attends to all tokens of its own segment, wherever they are.

    q, k, v: this rank's tokens `[tokens, heads, head_dim]`; returns the same shape. plan: for
    `shard.cu_seqlens` and the tokens of the rank's own block.
    """
    heads = q.shape[1]
    q, k, v = trade_tokens_for_heads(q, k, v, shard)
    out = ring_attention(q, k, v, shard, plan=plan, backend=backend)
    return trade_heads_for_tokens(out, shard, heads)


def trade_tokens_for_heads(
    q: Tensor, k: Tensor, v: Tensor, shard: TokenShard
) -> tuple[Tensor, Tensor, Tensor]:
    """`[own tokens, all heads, head_dim]` of each rank of the Ulysses group -> `[the group's
    tokens, own heads, head_dim]`, q, k and v in one exchange."""
    channel = shard.mesh.ulysses
    if channel.size == 1:
        return q, k, v
    tokens, _, head_dim = q.shape
    heads = shard.heads(q.shape[1])
    sizes = [tokens * 3 * n * head_dim for n in heads]
    packed = q.new_empty(sum(sizes))
    # For each rank a block [tokens, 3, its heads, head_dim].
    first = 0
    for part, n in zip(packed.split(sizes), heads, strict=True):
        block = part.view(tokens, 3, n, head_dim)
        for i, x in enumerate((q, k, v)):
            block[:, i] = x[:, first : first + n]
        first += n
    mine = heads[channel.index]
    width = 3 * mine * head_dim
    received = channel.all_to_all(packed, sizes, [n * width for n in shard.group_tokens])
    q, k, v = received.view(-1, 3, mine, head_dim).unbind(1)
    return q, k, v


def trade_heads_for_tokens(out: Tensor, shard: TokenShard, num_heads: int) -> Tensor:
    """The way back: from `[group tokens, own heads, head_dim]` to own tokens of all heads."""
    channel = shard.mesh.ulysses
    if channel.size == 1:
        return out
    head_dim = out.shape[2]
    heads = shard.heads(num_heads)
    width = heads[channel.index] * head_dim
    counts = shard.group_tokens
    tokens = counts[channel.index]
    sizes = [tokens * n * head_dim for n in heads]
    received = channel.all_to_all(out.reshape(-1), [n * width for n in counts], sizes)
    parts = received.split(sizes)
    return torch.cat(
        [part.view(tokens, n, head_dim) for part, n in zip(parts, heads, strict=True)], dim=1
    )


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: TokenShard,
    *,
    plan: AttentionPlan | None = None,
    backend: str,
) -> Tensor:
    """Attention of a block's queries over the whole segments that they belong to.

    q, k, v: `[the block's tokens, heads, head_dim]`.

    Step i brings the keys of the rank i places back. Each rank sends its own block straight to the
    one that is due, in place of passing on what it got: the bytes are those of the ring, and what
    a rank does not need is not sent through it.
    """
    offsets, longest = shard.cu_seqlens, shard.max_seqlen
    steps = _ring_steps(shard)
    if not steps:
        return packed_attention(
            q,
            k,
            v,
            offsets,
            offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            plan=plan,
            backend=backend,
        )
    ring, start = shard.mesh.ring, shard.own_block.start

    def begin(step: int) -> Pending:
        send_to, keys_out, keys_in = steps[step]
        send, receive = {}, {}
        if keys_out is not None:
            rows = slice(keys_out.start - start, keys_out.stop - start)
            send[send_to] = torch.stack((k[rows], v[rows]))
        if keys_in is not None:
            source = (ring.index - step) % ring.size
            receive[source] = k.new_empty(2, len(keys_in), *k.shape[1:])
        return ring.start(send, receive)

    order = sorted(steps)
    pending = begin(order[0])
    narrow, lse = packed_attention(
        q,
        k,
        v,
        offsets,
        offsets,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        plan=plan,
        return_lse=True,
        backend=backend,
    )
    out = narrow.float()
    for i, step in enumerate(order):
        received = pending.wait()
        if i + 1 < len(order):
            pending = begin(order[i + 1])
        source = (ring.index - step) % ring.size
        if source not in received:
            continue
        keys, values = received[source]
        queries = _meeting(shard.own_block, shard.block(source), shard.segments)
        assert queries is not None
        rows = slice(queries.start - start, queries.stop - start)
        merge(out[rows], lse[rows], *_dense(q[rows], keys, values, shard, backend))
    return out.to(q.dtype)


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Join attention over further keys into `out [n, heads, head_dim]` and `lse [n, heads]`.

    Both are float32 and written in place; `lse` is finite (a token attends to itself).
    """
    joint = torch.logaddexp(lse, other_lse)
    out *= torch.exp(lse - joint)[..., None]
    out += other.float() * torch.exp(other_lse - joint)[..., None]
    lse.copy_(joint)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, shard: TokenShard, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of all q over all k, with its log-sum-exp."""
    return packed_attention(
        q,
        k,
        v,
        shard.whole(len(q)),
        shard.whole(len(k)),
        max_seqlen_q=len(q),
        max_seqlen_k=len(k),
        return_lse=True,
        backend=backend,
    )


def _ring_steps(shard: TokenShard) -> dict[int, tuple[int, range | None, range | None]]:
    """For each step that moves anything: whom to send to, which own keys, and which keys come."""
    ring, own = shard.mesh.ring, shard.own_block
    steps = {}
    for step in range(1, ring.size):
        target, source = (ring.index + step) % ring.size, (ring.index - step) % ring.size
        keys_out = _meeting(own, shard.block(target), shard.segments)
        keys_in = _meeting(shard.block(source), own, shard.segments)
        if keys_out is not None or keys_in is not None:
            steps[step] = (target, keys_out, keys_in)
    return steps


def _meeting(a: range, b: range, segments: Sequence[int]) -> range | None:
    """The tokens of block `a` in a segment that reaches into block `b`, if there is one."""
    if not a or not b:
        return None
    edge = a[-1] if a.start < b.start else a.start
    i = bisect.bisect_right(segments, edge) - 1
    first, last = segments[i], segments[i + 1]
    reaches = last > b.start if a.start < b.start else first < b.stop
    return range(max(a.start, first), min(a.stop, last)) if reaches else None
