"""The attention calls that models make."""

from __future__ import annotations

import torch
from torch import Tensor

from sora_engine.denoise.packing import ContextRuns, Plans, Stream
from sora_kernels import (
    AttentionPlan,
    Padding,
    packed_attention,
    plan_attention,
    takes_plan,
    windowed_attention,
)

NO_WINDOW = (-1, -1, -1)
"""The whole of each axis: the masks of a plan alone say who sees whom."""


def planned(
    plans: Plans, q: Tensor, cu_seqlens: Tensor, backend: str, num_tokens: int | None = None
) -> AttentionPlan | None:
    """The plan for these queries, made on the first of the layers and steps that share it.

    num_tokens: where ranks attend to another number of them than q has.
    """
    if not takes_plan(q, backend):
        return None
    head_dim = q.shape[2]
    tokens = q.shape[0] if num_tokens is None else num_tokens
    offsets, plan = plans.get((head_dim, q.dtype), (None, None))
    if offsets is not cu_seqlens or plan is None:
        plan = plan_attention(
            cu_seqlens, num_tokens=tokens, head_dim=head_dim, dtype=q.dtype, backend=backend
        )
        plans[head_dim, q.dtype] = cu_seqlens, plan
    return plan


def self_attention(q: Tensor, k: Tensor, v: Tensor, stream: Stream, *, backend: str) -> Tensor:
    """Each token attends to all tokens of its own segment, or to those of the frames that it sees.

    q, k, v: `[tokens, heads, head_dim]`; returns the same shape.
    """
    if stream.attend is not None:
        return stream.attend(q, k, v, stream, backend=backend)
    if stream.sees is not None:
        return sparse_attention(q, k, v, stream, backend=backend)
    return packed_attention(
        q,
        k,
        v,
        stream.cu_seqlens,
        stream.cu_seqlens,
        max_seqlen_q=stream.max_seqlen,
        max_seqlen_k=stream.max_seqlen,
        plan=planned(stream.plans, q, stream.cu_seqlens, backend),
        backend=backend,
    )


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, stream: Stream, *, backend: str) -> Tensor:
    """Each token attends to the tokens of the frames that its own frame sees.

    q, k, v: `[tokens, heads, head_dim]` of the whole batch's tokens; returns the same shape.
    """
    assert stream.sees is not None
    key = q.shape[-1], q.dtype
    if key not in stream.sparse_plans:
        stream.sparse_plans[key] = plan_attention(
            stream.cu_seqlens,
            num_tokens=q.shape[0],
            head_dim=q.shape[-1],
            dtype=q.dtype,
            grids=stream.grids,
            masks=stream.sees,
        )
    return windowed_attention(
        q,
        k,
        v,
        stream.cu_seqlens,
        stream.grids,
        NO_WINDOW,
        plan=stream.sparse_plans[key],
        backend=backend,
    )


def cross_attention(q: Tensor, runs: ContextRuns, layer: int, *, backend: str) -> Tensor:
    """Each token attends to the context of its run, and to that context's padding.

    q: `[tokens, heads, head_dim]`; returns the same shape.

    Padding tokens have one key and one value, so that they cost next to nothing (`Padding`), and
    nothing is approximated.
    """
    if runs.stretches:
        parts = q.split([length for _, length in runs.stretches])
        done = [
            cross_attention(part, own, layer, backend=backend)
            for part, (own, _) in zip(parts, runs.stretches, strict=True)
        ]
        return torch.cat(done)
    padding = None
    if runs.padding is not None:
        assert runs.padding_keys is not None
        assert runs.padding_values is not None
        padding = Padding(runs.padding_keys[layer], runs.padding_values[layer], runs.padding)
    return packed_attention(
        q,
        runs.keys[layer],
        runs.values[layer],
        runs.cu_seqlens_q,
        runs.cu_seqlens_k,
        max_seqlen_q=runs.max_seqlen_q,
        max_seqlen_k=runs.max_seqlen_k,
        plan=planned(runs.plans, q, runs.cu_seqlens_q, backend),
        padding=padding,
        backend=backend,
    )
