"""Packed attention by xformers' `memory_efficient_attention` under a `BlockDiagonalMask`.

Asked for by name alone. The mask is made from lengths on the host, so a device is waited for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from sora_kernels.attention.operands import Operands
from sora_kernels.attention.padding import laid_out
from sora_kernels.dispatch import Case

INSTALL = "pip install xformers"


@functools.cache
def _fmha() -> Any:
    """`xformers.ops.fmha`, or None."""
    if importlib.util.find_spec("xformers") is None:
        return None
    return importlib.import_module("xformers.ops.fmha")


def unsupported(case: Case) -> str | None:
    if case.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{case.dtype} is not one of fp32, fp16 and bf16"
    if "lse" in case.traits:
        return "its log-sum-exp has no packed form in every version"
    if case.width % 8:
        return f"head_dim {case.width}; its kernels take multiples of 8"
    if case.device_type != "cuda":
        return f"xformers runs on CUDA devices, not on {case.device_type}"
    if _fmha() is None:
        return f"it is not installed: {INSTALL}"
    return None


def run(call: Operands) -> tuple[Tensor, Tensor]:
    return serve(_fmha(), call), call.lse()


def serve(fmha: Any, call: Operands) -> Tensor:
    """`fmha` is `xformers.ops.fmha`. Segments without queries or without keys are left out."""
    call = laid_out(call)
    q, k, v = call.q, call.k, call.v
    q_offsets, k_offsets = call.offsets()
    lengths = [
        (q_offsets[i + 1] - q_offsets[i], k_offsets[i + 1] - k_offsets[i])
        for i in range(len(q_offsets) - 1)
    ]
    live = [i for i, pair in enumerate(lengths) if min(pair) > 0]
    if not live:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(
        q_seqlen=[lengths[i][0] for i in live],
        kv_seqlen=[lengths[i][1] for i in live],
        device=q.device,
    )
    q_rows, k_rows = (
        torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in live]).to(q.device)
        if len(live) < len(lengths)
        else None
        for offsets in (q_offsets, k_offsets)
    )
    operands = (
        x if rows is None else x[rows] for x, rows in ((q, q_rows), (k, k_rows), (v, k_rows))
    )
    out = fmha.memory_efficient_attention_forward(
        *(x[None] for x in operands), attn_bias=mask, scale=call.scale
    )[0]
    if q_rows is None:
        return out
    return torch.zeros(q.shape, dtype=q.dtype, device=q.device).index_copy(0, q_rows, out)
