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
from sora_kernels.attention.padding import joined
from sora_kernels.dispatch import Case

# Where version 3 may come from: its own build, or the forward-only wheel fa3-fwd.
VERSION_3 = ("flash_attn_interface", "fa3_fwd_interface")
VERSION_2 = ("flash_attn",)
# What a build of version 3 was made without; its setup.py writes it beside the module.
CONFIGURATIONS = {
    "flash_attn_interface": "flash_attn_config",
    "fa3_fwd_interface": "fa3_fwd_config",
}
WIDTHS = (64, 96, 128, 192, 256)  # that version 3 has kernels for; others are rounded up
INSTALL = "pip install fa3-fwd (Hopper), or pip install flash-attn --no-build-isolation"


def candidates(capability: tuple[int, int]) -> tuple[str, ...]:
    """Modules to look for on a device, best first. Version 3 is for sm_90 alone."""
    return (*VERSION_3, *VERSION_2) if capability[0] == 9 else VERSION_2


def lacks(name: str, dtype: torch.dtype, width: int) -> str | None:
    """What an installed module was built without and this dtype and head_dim need."""
    configuration = CONFIGURATIONS.get(name)
    if configuration is None or importlib.util.find_spec(configuration) is None:
        return None
    flags = importlib.import_module(configuration).CONFIG["build_flags"]
    if dtype == torch.float16 and flags.get("FLASHATTENTION_DISABLE_FP16"):
        return f"{dtype}; {name} is built without it, and takes bf16"
    built = [size for size in WIDTHS if not flags.get(f"FLASHATTENTION_DISABLE_HDIM{size}")]
    if width > max(built, default=0):
        return f"head_dim {width}; {name} is built for {built}"
    return None


@functools.cache
def find(
    capability: tuple[int, int], dtype: torch.dtype, width: int
) -> tuple[Callable[..., Any] | None, str]:
    """The first that is installed and has what is needed, or None and why there is none."""
    reasons = []
    for name in candidates(capability):
        if importlib.util.find_spec(name) is None:
            continue
        reason = lacks(name, dtype, width)
        if reason is None:
            return importlib.import_module(name).flash_attn_varlen_func, ""
        reasons.append(reason)
    return None, "; ".join(reasons) or f"it is not installed: {INSTALL}"


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
    function, reason = find(capability, case.dtype, case.width)
    return reason if function is None else None


def run(call: Operands) -> tuple[Tensor, Tensor]:
    capability = torch.cuda.get_device_capability(call.q.device)
    function, reason = find(capability, call.q.dtype, call.q.shape[2])
    assert function is not None, reason
    return serve(function, call)


def serve(function: Callable[..., Any], call: Operands) -> tuple[Tensor, Tensor]:
    """`function` is a `flash_attn_varlen_func`, of either version."""
    return joined(functools.partial(_without_padding, function), call)


def _without_padding(function: Callable[..., Any], call: Operands) -> tuple[Tensor, Tensor]:
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
