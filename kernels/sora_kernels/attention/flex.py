"""Packed attention by torch's FlexAttention under a mask over segments.

Asked for by name alone, on CUDA. Block masks are kept for offsets that come again, as they do in
every layer and step; reading them waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sora_kernels.attention.operands import Operands
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


@functools.lru_cache(maxsize=8)
def block_mask(q_offsets: tuple[int, ...], k_offsets: tuple[int, ...], device: torch.device) -> Any:
    """FlexAttention's BlockMask of a packed batch."""
    from torch.nn.attention.flex_attention import create_block_mask

    q_segment, k_segment = segment_of(q_offsets, device), segment_of(k_offsets, device)

    def same_segment(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return q_segment[query] == k_segment[key]

    return create_block_mask(
        same_segment, None, None, q_offsets[-1], k_offsets[-1], device=device, BLOCK_SIZE=BLOCK
    )


def run(call: Operands) -> tuple[Tensor, Tensor]:
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
