"""The attention calls that models make. Only this file knows whether tokens are sharded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sora_engine.packing import ContextRuns, Stream
from sora_kernels import packed_attention


def self_attention(q: Tensor, k: Tensor, v: Tensor, stream: Stream, *, backend: str) -> Tensor:
    """Each token attends to all tokens of its own segment.

    q, k, v: `[tokens, heads, head_dim]`; returns the same shape.
    """
    return packed_attention(
        q,
        k,
        v,
        stream.cu_seqlens,
        stream.cu_seqlens,
        max_seqlen_q=stream.max_seqlen,
        max_seqlen_k=stream.max_seqlen,
        backend=backend,
    )


def cross_attention(q: Tensor, runs: ContextRuns, layer: int, *, backend: str) -> Tensor:
    """Each token attends to the context of its run, and to that context's padding.

    q: `[tokens, heads, head_dim]`; returns the same shape.

    Padding tokens have one key and one value. `n` identical keys are one key with `log n` added
    to its logit, and one key merges with the attention over the others through their log-sum-exp:
    so a padded text costs what its real tokens cost, and nothing is approximated.
    """
    operands = (q, runs.keys[layer], runs.values[layer], runs.cu_seqlens_q, runs.cu_seqlens_k)
    if runs.log_padding is None:
        return packed_attention(
            *operands,
            max_seqlen_q=runs.max_seqlen_q,
            max_seqlen_k=runs.max_seqlen_k,
            backend=backend,
        )
    assert runs.padding_keys is not None
    assert runs.padding_values is not None
    attended, lse = packed_attention(
        *operands,
        max_seqlen_q=runs.max_seqlen_q,
        max_seqlen_k=runs.max_seqlen_k,
        return_lse=True,
        backend=backend,
    )
    key, value = runs.padding_keys[layer].float(), runs.padding_values[layer].float()
    logits = torch.einsum("nhd,hd->nh", q.float(), key) / math.sqrt(q.shape[-1])
    share = torch.sigmoid(logits + runs.log_padding[:, None] - lse)
    return torch.lerp(attended.float(), value.expand_as(attended), share[..., None]).to(q.dtype)
