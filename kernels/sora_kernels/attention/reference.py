"""Packed attention in plain PyTorch: one matmul, softmax and matmul for each run of equal segments.

Softmax runs in fp32 (fp64 for fp64 inputs). Differentiable, log-sum-exp included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sora_kernels.attention.operands import Operands
from sora_kernels.attention.padding import beside
from sora_kernels.dispatch import Case
from sora_kernels.segments import batched, equal_runs


def unsupported(case: Case) -> str | None:
    return None


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Dense attention and its log-sum-exp.

    q: `[..., tokens_q, head_dim]`; k, v: `[..., tokens_k, head_dim]`; bias: what is added to the
    scaled scores, of a shape that broadcasts to `[..., tokens_q, tokens_k]`.
    Returns `[..., tokens_q, head_dim]` in q's dtype and `[..., tokens_q]` in fp32 or fp64.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    # Scaled first: raw scores of fp16 inputs can pass 65504.
    scores = ((q * scale) @ k.transpose(-1, -2)).to(wide)
    if bias is not None:
        scores = scores + bias
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1))
    return weights.to(v.dtype) @ v, lse


def run(call: Operands) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    wide = torch.promote_types(q.dtype, torch.float32)
    runs = equal_runs(*call.offsets(), call.padding_counts())
    # Split rather than sliced: a slice's gradient is as large as the whole tensor.
    q_parts = q.split([part.q_len * part.segments for part in runs])
    kv_sizes = [part.k_len * part.segments for part in runs]
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for part, q_part, k_part, v_part in zip(
        runs, q_parts, k.split(kv_sizes), v.split(kv_sizes), strict=True
    ):
        if part.q_len == 0:
            continue
        if part.k_len == 0 and not part.padded:
            # Times zero, so that these queries stay in the autograd graph with a gradient of 0.
            outs.append(q_part * 0)
            lses.append(q.new_full((len(q_part), q.shape[1]), float("-inf"), dtype=wide))
            continue
        keys, values, bias = beside(
            call,
            part,
            batched(k_part, 0, part.k_len, part.segments),
            batched(v_part, 0, part.k_len, part.segments),
            wide,
        )
        queries = batched(q_part, 0, part.q_len, part.segments)
        out, lse = attend(queries, keys, values, call.scale, bias)
        outs.append(out.transpose(1, 2).flatten(0, 1))
        lses.append(lse.transpose(1, 2).flatten(0, 1))
    out = torch.cat(outs) if outs else q.new_empty(q.shape)
    return out, torch.cat(lses) if lses and call.return_lse else call.lse(wide)
