"""Padding's key for backends whose kernels do not have it: three ways to the same attention.

`beside` makes it one more key of each segment with a bias, `joined` adds it to a finished result
through the log-sum-exp, and `laid_out` repeats it as often as it counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sora_kernels.attention.operands import Operands
from sora_kernels.segments import Run

ROWS = 4096  # queries that `joined` holds in fp32 at a time


def beside(
    call: Operands, part: Run, k: Tensor, v: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values of a run of equal segments with padding's as the last of each segment, and
    what to add to their scaled scores: `[segments, 1, 1, keys]`, 0 but for the last.

    k, v: `[segments, heads, keys, head_dim]`, returned as they are where the run is not padded.
    """
    if not part.padded:
        return k, v, None
    assert call.padding is not None
    more = (part.segments, -1, -1, -1)
    k = torch.cat((k, call.padding.key[None, :, None].expand(more)), dim=2)
    v = torch.cat((v, call.padding.value[None, :, None].expand(more)), dim=2)
    bias = torch.zeros(part.segments, 1, 1, k.shape[2], dtype=dtype, device=k.device)
    counts = call.padding.counts[part.first : part.first + part.segments]
    bias[..., -1] = counts.to(dtype).log()[:, None, None]
    return k, v, bias


def joined(
    attend: Callable[[Operands], tuple[Tensor, Tensor]], call: Operands
) -> tuple[Tensor, Tensor]:
    """What `attend` gives of the call's keys, and padding through the log-sum-exp of that.

    Nothing waits for a device.
    """
    padding = call.padding
    if padding is None:
        return attend(call)
    out, lse = attend(replace(call, padding=None, return_lse=True))
    logs = padding.counts.float().log()
    each = logs.repeat_interleave(call.cu_seqlens_q.diff(), output_size=len(out))
    key, value = padding.key.float(), padding.value.float()
    for first in range(0, len(out), ROWS):
        rows = slice(first, first + ROWS)
        scores = torch.einsum("nhd,hd->nh", call.q[rows].float(), key) * call.scale
        scores += each[rows, None]
        joint = torch.logaddexp(lse[rows], scores)
        # Where a query sees neither keys nor padding all three are -inf, and the result stays 0.
        share = torch.where(scores == float("-inf"), 0.0, torch.exp(scores - joint))
        out[rows] = torch.lerp(out[rows].float(), value, share[..., None]).to(out.dtype)
        lse[rows] = joint
    return out, lse if call.return_lse else call.lse()


def laid_out(call: Operands) -> Operands:
    """The call with padding as keys like the others, each segment's behind its own: what a library
    takes that gives no log-sum-exp. On a device this waits for it."""
    counts = call.padding_counts()
    if counts is None:
        return replace(call, padding=None)
    assert call.padding is not None
    _, offsets = call.offsets()
    sizes = [stop - start for start, stop in itertools.pairwise(offsets)]
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for made, tensor, one in zip(
        parts, (call.k, call.v), (call.padding.key, call.padding.value), strict=True
    ):
        for own, count in zip(tensor.split(sizes), counts, strict=True):
            made += [own, one.expand(count, -1, -1)]
    counted = call.padding.counts.cumsum(0)
    cu_seqlens_k = call.cu_seqlens_k.clone()
    cu_seqlens_k[1:] += counted.to(cu_seqlens_k.dtype)
    return replace(
        call,
        k=torch.cat(parts[0]),
        v=torch.cat(parts[1]),
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_k=max(size + count for size, count in zip(sizes, counts, strict=True)),
        padding=None,
    )
