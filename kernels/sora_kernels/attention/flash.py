"""Packed attention by FlashAttention: 3 on Hopper where it is installed, else 2.

Their `flash_attn_varlen_func` takes packed tensors and int32 offsets as they are. Asked for by name
alone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sora_kernels.attention.operands import Operands
from sora_kernels.dispatch import Case

# Where version 3 may come from: its own build, or the forward-only wheel fa3-fwd.
VERSION_3 = ("flash_attn_interface", "fa3_fwd_interface")
VERSION_2 = ("flash_attn",)
INSTALL = "pip install fa3-fwd (Hopper), or pip install flash-attn --no-build-isolation"


def candidates(capability: tuple[int, int]) -> tuple[str, ...]:
    """Modules to look for on a device, best first. Version 3 is for sm_90 alone."""
    return (*VERSION_3, *VERSION_2) if capability[0] == 9 else VERSION_2


@functools.cache
def varlen_function(capability: tuple[int, int]) -> Callable[..., Any] | None:
    for name in candidates(capability):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name).flash_attn_varlen_func
    return None


def unsupported(case: Case) -> str | None:
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"{case.dtype}; FlashAttention takes fp16 and bf16"
    if case.width % 8:
        return f"head_dim {case.width}; FlashAttention takes multiples of 8"
    if case.device_type != "cuda":
        return f"FlashAttention runs on CUDA devices, not on {case.device_type}"
    capability = torch.cuda.get_device_capability(case.device_index)
    if capability[0] < 8:
        return "FlashAttention needs compute capability 8.0"
    if varlen_function(capability) is None:
        return f"it is not installed: {INSTALL}"
    return None


def run(call: Operands) -> tuple[Tensor, Tensor]:
    function = varlen_function(torch.cuda.get_device_capability(call.q.device))
    assert function is not None
    return serve(function, call)


def serve(function: Callable[..., Any], call: Operands) -> tuple[Tensor, Tensor]:
    """`function` is a `flash_attn_varlen_func`, of either version."""
    tokens, heads, _ = call.q.shape
    if tokens == 0 or call.k.shape[0] == 0:
        return call.without_keys()
    dense = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    cu_q, cu_k = (cu.to(torch.int32) for cu in (call.cu_seqlens_q, call.cu_seqlens_k))
    result = function(
        *dense,
        cu_q,
        cu_k,
        call.max_seqlen_q,
        call.max_seqlen_k,
        softmax_scale=call.scale,
        causal=False,
        return_attn_probs=call.return_lse,
    )
    out = result[0] if isinstance(result, tuple) else result
    if not call.return_lse:
        return out, call.lse()
    lse = result[1]
    if lse.shape != (heads, tokens):
        raise RuntimeError(
            f"flash: a log-sum-exp of {[*lse.shape]}; [heads, tokens] {[heads, tokens]} is due "
            "(flash-attn 2.6 and newer)"
        )
    # Version 2 gives +inf where a query has no keys.
    lse = lse.transpose(0, 1)
    return out, torch.where(lse == float("inf"), float("-inf"), lse).contiguous()
