"""Packed attention by torch's FlexAttention under a mask over segments.

Asked for by name alone, on CUDA. Block masks are kept for offsets that come again, as they do in
every layer and step; reading them waits for the device.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sora_kernels.attention.operands import Operands
from sora_kernels.attention.padding import joined
from sora_kernels.dispatch import Case
from sora_kernels.triton_support import settle_caches

BLOCK = 128  # of FlexAttention's block masks


def unsupported(case: Case) -> str | None:
    if case.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{case.dtype} is not one of fp32, fp16 and bf16"
    if case.width < 16:
        return f"head_dim {case.width}; FlexAttention takes 16 and more"
    if case.device_type != "cuda":
        # For a CPU torch 2.13 compiles it without a log-sum-exp, and for sizes that are not
        # constants into C++ that does not compile.
        return f"compiled FlexAttention serves packed batches on CUDA, not on {case.device_type}"
    if case.width & (case.width - 1):
        return f"head_dim {case.width}; FlexAttention's kernel takes powers of two"
    return None


@functools.cache
def compiled() -> Callable[..., Any]:
    """FlexAttention makes its scores in memory unless it is compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    settle_caches()
    return torch.compile(flex_attention, dynamic=True)


def segment_of(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """The segment of each token: int64 `[tokens]`."""
    lengths = torch.tensor(offsets, device=device).diff()
    return torch.repeat_interleave(
        torch.arange(len(lengths), device=device), lengths, output_size=offsets[-1]
    )


def seen_blocks(
    q_offsets: Sequence[int], k_offsets: Sequence[int], block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Which blocks of keys each block of queries sees in part, and which in full: bool
    `[blocks of queries, blocks of keys]` twice, from the offsets alone.

    FlexAttention's `create_block_mask` finds the same by making the whole `[queries, keys]` mask:
    5.7 GB for 75,600 tokens.
    """
    shape = -(-q_offsets[-1] // block), -(-k_offsets[-1] // block)
    partial, full = (torch.zeros(shape, dtype=torch.bool) for _ in range(2))
    spans = zip(itertools.pairwise(q_offsets), itertools.pairwise(k_offsets), strict=True)
    for (q_first, q_last), (k_first, k_last) in spans:
        if q_first == q_last or k_first == k_last:
            continue
        touched = [
            slice(first // block, -(-last // block))
            for first, last in ((q_first, q_last), (k_first, k_last))
        ]
        inside = [
            slice(-(-first // block), last // block)
            for first, last in ((q_first, q_last), (k_first, k_last))
        ]
        partial[touched[0], touched[1]] = True
        # A segment within a block has no block of its own, and its slice runs backwards.
        full[inside[0], inside[1]] = True
    return partial & ~full, full


@functools.lru_cache(maxsize=8)
def block_mask(q_offsets: tuple[int, ...], k_offsets: tuple[int, ...], device: torch.device) -> Any:
    """FlexAttention's BlockMask of a packed batch."""
    from torch.nn.attention.flex_attention import BlockMask

    q_segment, k_segment = segment_of(q_offsets, device), segment_of(k_offsets, device)

    def same_segment(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return q_segment[query] == k_segment[key]

    blocks: Any = {}
    for prefix, seen in zip(("kv", "full_kv"), seen_blocks(q_offsets, k_offsets), strict=True):
        there = seen.to(device, torch.int32)[None, None]
        order = there.argsort(dim=-1, descending=True, stable=True)
        blocks[f"{prefix}_num_blocks"] = there.sum(dim=-1, dtype=torch.int32)
        blocks[f"{prefix}_indices"] = order.to(torch.int32)
    return BlockMask.from_kv_blocks(
        **blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=same_segment,
        seq_lengths=(q_offsets[-1], k_offsets[-1]),
    )


def run(call: Operands) -> tuple[Tensor, Tensor]:
    return joined(_without_padding, call)


def _without_padding(call: Operands) -> tuple[Tensor, Tensor]:
    if call.q.shape[0] == 0 or call.k.shape[0] == 0:
        return call.without_keys()
    q_offsets, k_offsets = call.offsets()
    result = compiled()(
        *(x.transpose(0, 1)[None] for x in (call.q, call.k, call.v)),
        block_mask=block_mask(tuple(q_offsets), tuple(k_offsets), call.q.device),
        scale=call.scale,
        return_lse=call.return_lse,
    )
    if not call.return_lse:
        return result[0].transpose(0, 1).contiguous(), call.lse()
    out, lse = result
    return out[0].transpose(0, 1).contiguous(), lse[0].transpose(0, 1).float().contiguous()
